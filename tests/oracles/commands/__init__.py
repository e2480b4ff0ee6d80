"""What ComfyUI can be asked: each command takes JSON values, and returns a dictionary of them. Runs in ComfyUI's process only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.oracles.commands import (
    architectures,
    controlnets,
    loras,
    merging,
    models,
    quantising,
    sampling,
    text_encoders,
)

COMMANDS: dict[str, Callable[..., dict[str, Any]]] = {
    **models.COMMANDS,
    **loras.COMMANDS,
    **merging.COMMANDS,
    **quantising.COMMANDS,
    **architectures.COMMANDS,
    **sampling.COMMANDS,
    **controlnets.COMMANDS,
    **text_encoders.COMMANDS,
}
