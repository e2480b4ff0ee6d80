"""The arithmetic contract and its implementations on CPU and GPU.

cpu.py uses torch, or compiled code; cuda.py uses Triton. cpu.py uses torch, or compiled code; cuda.py uses Triton.
"""
