"""The arithmetic contract and its implementations: cpu.py (torch, or compiled) and cuda.py (Triton)."""
