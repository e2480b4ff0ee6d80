"""Triton kernels and their launchers; imports torch and triton only, nothing of mergetool."""
