"""Kernels and their launchers, Triton's for GPUs and compiled ones for the processor; imports torch, triton and numpy only, nothing of mergetool."""
