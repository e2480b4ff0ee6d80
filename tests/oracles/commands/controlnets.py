"""Loading a ControlNet as ComfyUI's loader node does."""

from __future__ import annotations

from typing import Any

import comfy.controlnet
import torch
from safetensors.torch import save_file


def controlnet(path: str, out: str) -> dict[str, Any]:
    """Writes the parameters that a ControlNet's file gives its class in float32 to the file ``out``; the log names what it lacks."""
    made = comfy.controlnet.load_controlnet(path)
    state = made.control_model.state_dict()
    save_file({name: value.to(torch.float32).contiguous().clone() for name, value in state.items()}, out)
    return {"kind": type(made).__name__}


COMMANDS = {"controlnet": controlnet}
