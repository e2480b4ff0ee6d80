"""The arithmetic contract (contract.py) and its implementations: cpu.py (torch) and oracle.py (numpy)."""
