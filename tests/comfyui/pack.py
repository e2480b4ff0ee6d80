"""What the tests add to the server: small models, a caption without a text encoder, and a place to stop at in the middle of a node.

Loaded by the server as a custom node; imports ComfyUI's modules.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.utils
import folder_paths
import server
import torch

from tests.oracles import library

library.allow_small()

# While the first file is there a node that has something done makes the second and waits, until it is interrupted or the first goes.
HOLD, HELD = (Path(folder_paths.base_path) / name for name in ("hold", "held"))
EVENTS = Path(folder_paths.base_path) / "events.jsonl"

update = comfy.utils.ProgressBar.update_absolute
send = server.PromptServer.send_sync


def held(self: Any, value: int, total: int | None = None, preview: Any = None) -> None:
    """ComfyUI's own, and before it the wait."""
    if HOLD.exists() and value > 0:
        HELD.touch()
        waiting = threading.Event()
        while HOLD.exists() and not management.interrupt_processing:
            waiting.wait(0.01)
    update(self, value, total, preview)


def kept(self: Any, event: Any, data: Any, sid: Any = None) -> None:
    """ComfyUI's own, and every message to the page as a line of ``EVENTS``."""
    if isinstance(event, str):
        with EVENTS.open("a") as lines:
            lines.write(json.dumps([event, data], default=str) + "\n")
    send(self, event, data, sid)


comfy.utils.ProgressBar.update_absolute = held
server.PromptServer.send_sync = kept


class Caption:
    """Conditioning of ``tokens`` random vectors, the same for the same seed."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 -- ComfyUI's name
        """The seed, and the shape."""
        number = ("INT", {"default": 0, "min": 0})
        return {"required": {"seed": number, "tokens": number, "width": number}}

    def make(self, seed: int, tokens: int, width: int) -> tuple[Any]:
        """What CLIPTextEncode gives, without a text encoder."""
        vectors = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed))
        return ([[vectors, {"pooled_output": None}]],)


NODE_CLASS_MAPPINGS = {"TestCaption": Caption}
