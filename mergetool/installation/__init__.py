"""Diagnoses of the installation: Python, packages, kernels, GPUs, ComfyUI and disks."""
