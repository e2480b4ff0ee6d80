"""LoRA files, both ways: read the change to a model, and write it for any program."""
