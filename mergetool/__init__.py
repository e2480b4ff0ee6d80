"""mergetool: merge diffusion-transformer checkpoints and take difference LoRAs, streaming."""

__version__ = "0.1.0"
