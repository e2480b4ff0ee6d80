"""What two models differ by, as a LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergetool.lora.extract import Extraction
    from mergetool.options.differences import DiffOptions


@dataclass(frozen=True)
class Extracted:
    """A difference LoRA that was written to ``output`` in ``seconds``."""

    output: Path
    extraction: Extraction
    options: DiffOptions
    seconds: float
