"""LoRA files, both ways: what one adds to a model, and how one is written for another program."""
