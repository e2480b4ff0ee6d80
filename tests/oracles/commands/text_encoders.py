"""All-in-one files as ComfyUI's checkpoint loader opens them, with their text encoders."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest.mock import patch

import comfy.clip_model
import comfy.model_management
import comfy.sd
import comfy.utils
import comfy_extras.nodes_model_merging as nodes
import torch
from safetensors.torch import save_file

from tests.oracles.commands.loras import CPU
from tests.oracles.commands.models import values

ABSENT = "clip_l.transformer.text_projection.weight"
"""What SDXL's files do not have, and ComfyUI leaves as the memory was."""
Sizes = dict[str, dict[str, Any]]


def _opened(path: str, sizes: Sizes) -> tuple[Any, Any]:
    """The diffusion model and the text encoders, which have these sizes instead of the published ones."""
    options = {f"{name}_model_config": dict(size) for name, size in sizes.items()} | {"dtype": torch.float32}
    words = next(iter(sizes.values()))["vocab_size"]
    with patch.object(comfy.clip_model, "CLIPEmbeddings", partial(comfy.clip_model.CLIPEmbeddings, vocab_size=words)):
        model, clip, _, _ = comfy.sd.load_checkpoint_guess_config(path, output_vae=False, te_model_options=options)
    return model, clip


def _written(model: Any, clip: Any, out: str) -> None:
    """Writes the parameters of both in float32, patches applied, encoders' under ``text_encoders.``."""
    comfy.model_management.unload_all_models()  # encoders on the processor are loaded at once, and would take no patches
    found = {}
    for patcher in (model, clip.patcher):
        patcher.patch_model(device_to=CPU)
    found.update(values(model))
    for name, value in clip.cond_stage_model.state_dict().items():
        if name != ABSENT:
            found[f"text_encoders.{name}"] = value.float().contiguous().clone()
    save_file(found, out)


def encoders(model: str, sizes: Sizes, out: str) -> dict[str, Any]:
    """Writes what is in an all-in-one file; the log tells of missing tensors."""
    _written(*_opened(model, sizes), out)
    return {}


def encoders_patch(model: str, sizes: Sizes, lora: str, out: str, strength: float = 1.0) -> dict[str, Any]:
    """The node LoraLoader with one strength for both; ``patched`` are the encoders' tensors that it was added to."""
    patcher, clip = _opened(model, sizes)
    file, metadata = comfy.utils.load_torch_file(lora, safe_load=True, return_metadata=True)
    patcher, clip = comfy.sd.load_lora_for_models(patcher, clip, file, strength, strength, lora_metadata=metadata)
    patched = sorted(clip.patcher.patches)
    _written(patcher, clip, out)
    return {"patched": patched}


def encoders_merge(one: str, other: str, sizes: Sizes, ratio: float, out: str) -> dict[str, Any]:
    """The nodes ModelMergeSimple and CLIPMergeSimple; ``ratio`` is the share of the first."""
    first, second = _opened(one, sizes), _opened(other, sizes)
    (model,) = nodes.ModelMergeSimple().merge(first[0], second[0], ratio)
    (clip,) = nodes.CLIPMergeSimple().merge(first[1], second[1], ratio)
    _written(model, clip, out)
    return {}


COMMANDS = {"encoders": encoders, "encoders_patch": encoders_patch, "encoders_merge": encoders_merge}
