"""Measurements behind every speed and memory claim, and the synthetic checkpoints they run on."""
