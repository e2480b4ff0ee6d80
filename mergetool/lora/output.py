"""A LoRA's file: whole or not there, its tensors in the order they are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from mergetool.checkpoint.header import Header
from mergetool.checkpoint.inputs import InputFile
from mergetool.checkpoint.targets import TargetClaim
from mergetool.checkpoint.writer import CheckpointWriter
from mergetool.errors import OutputError, UsageError
from mergetool.ops.cpu import TORCH

_DTYPES = {torch_dtype: dtype for dtype, torch_dtype in TORCH.items()}


def check(output: Path, inputs: Sequence[InputFile], *, overwrite: bool, folder: bool = False) -> None:
    """Refuse a target that could not be written, before the work whose result goes there.

    Raises OutputError for a folder that is not there, an existing file without ``overwrite`` or an input; UsageError for a name that is
    not one safetensors file's, or with ``folder`` is one's; BusyError.
    """
    if not output.parent.exists():
        raise OutputError(f'the folder "{output.parent}" does not exist; make it first.')
    if folder and output.suffix == ".safetensors":
        raise UsageError(f'a PEFT adapter is a folder: name it "{output.stem}".')
    if not folder and output.suffix != ".safetensors":
        raise UsageError(f'a LoRA is one file: name it "{output.name}.safetensors".')
    TargetClaim.claim(output, 0, "folder" if folder else "file", overwrite=overwrite, inputs=inputs).release()


def write(
    output: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    inputs: Sequence[InputFile],
    *,
    overwrite: bool = False,
    threads: int = 1,
    extra_files: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Publish ``tensors``, each in its own dtype, at ``output``: a whole file, or none. Raises what `CheckpointWriter` raises.

    An ``output`` that does not end in .safetensors is a folder, as PEFT has it: adapter_model.safetensors, and ``extra_files``.
    """
    entries = [(name, _DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    with CheckpointWriter.stage(
        output,
        Header.plan(entries, dict(metadata)),
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
