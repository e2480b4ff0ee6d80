"""Low-rank differences: two checkpoints as a LoRA."""
