"""Kernels and their launchers: Triton's for GPUs, compiled ones for the processor.

They import torch, triton and numpy only, nothing of mergetool.
"""
