"""LoRA files: which parts of a model they change, in whatever spelling, and by what. Reads what it needs, never imports torch."""

from mergetool.adapters.adapter import Adapter, Change
from mergetool.adapters.reading import LoraFile, is_lora, open_lora

__all__ = ["Adapter", "Change", "LoraFile", "is_lora", "open_lora"]
