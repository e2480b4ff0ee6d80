"""A LoRA's file: whole or not there, its tensors in the order they are given."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType

import torch
from torch import Tensor

from mergetool.adapters.diffusers_header import header
from mergetool.adapters.formats import FORMATS
from mergetool.checkpoint.dtypes import I64
from mergetool.checkpoint.header import Header
from mergetool.checkpoint.inputs import InputFile
from mergetool.checkpoint.outputs import Target, lora_target
from mergetool.checkpoint.targets import TargetClaim, require_folder
from mergetool.checkpoint.writer import CheckpointWriter
from mergetool.ops.tensors import TORCH

_DTYPES = {torch_dtype: dtype for dtype, torch_dtype in TORCH.items()} | {torch.int64: I64}


def check(
    output: str | os.PathLike[str] | Target, inputs: Sequence[InputFile], *, overwrite: bool, folder: bool = False
) -> Target:
    """Choose the target of ``output``, and refuse impossible ones before the work.

    Raises what `outputs.lora_target` raises; OutputError for a folder that is not there, an existing file without ``overwrite`` or an
    input; BusyError.
    """
    target = lora_target(output, folder=folder)
    require_folder(target.path.parent)
    TargetClaim.claim(target.path, 0, target.kind, overwrite=overwrite, inputs=inputs).release()
    return target


def write(
    output: Target,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    inputs: Sequence[InputFile],
    *,
    overwrite: bool = False,
    threads: int = 1,
    extra_files: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Publish ``tensors``, each in its own dtype, at ``output``: a whole file, or none. Raises what `CheckpointWriter` raises.

    The header says ranks and scales for diffusers beside ``metadata`` (`diffusers_header`). A folder is as PEFT has it:
    adapter_model.safetensors, and ``extra_files``.
    """
    entries = [(name, _DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    with CheckpointWriter.stage(
        output,
        Header.plan(entries, {**metadata, **header({name: shape for name, _, shape in entries})}),
        overwrite=overwrite,
        inputs=list(inputs),
        extra_files=extra_files,
        stem="adapter_model",
    ) as writer:

        def put(name: str) -> None:
            writer.write(name, 0, tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)

        with ThreadPoolExecutor(threads, "write") as pool:
            list(pool.map(put, tensors))
        writer.commit()


def with_alphas_everywhere(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give every LoRA an alpha if any needs an ``.alpha`` or has a ``.lora_mid``.

    They are of the default format; else they stay as they are.

    Then the factors' names end in ``.lora_down.weight`` and ``.lora_up.weight``: diffusers 0.36 reads alphas only beside these, and
    only where every module has one, and ComfyUI reads a ``.lora_mid.weight`` only beside these. Later releases read both.
    """
    default, kohya = FORMATS["default"], FORMATS["kohya"]
    if not any(name.endswith((".alpha", ".lora_mid.weight")) for name in tensors):
        return dict(tensors)
    found = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(default.down)
        if name.endswith(default.down) and f"{module}.alpha" not in tensors:
            found[f"{module}.alpha"] = torch.tensor(float(len(tensor)))
        found[name.replace(default.down, kohya.down).replace(default.up, kohya.up)] = tensor
    return found
