"""Sums of LoRAs: merge them, resize them, measure how they interfere."""
