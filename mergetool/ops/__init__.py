"""The arithmetic contract and its implementations. cpu.py uses torch, or compiled code; cuda.py uses Triton."""
