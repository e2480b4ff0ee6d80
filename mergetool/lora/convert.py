"""A LoRA under other names: the same factors, spelled for another program.

Bits are kept wherever they can be. A scale moves into an ``.alpha`` where the spelling has one; where it has none it is multiplied into
``up``, which is exact for powers of two, and said where it is not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mergetool import __version__
from mergetool.adapters import Change, LoraFile
from mergetool.adapters.values import low_rank
from mergetool.checkpoint.dtypes import DType
from mergetool.checkpoint.names import quoted
from mergetool.errors import DataError
from mergetool.lora import output as lora_file
from mergetool.ops.cpu import TORCH
from mergetool.recipe.provenance import display_names

KeyFormat = Literal["default", "diffusers", "comfyui", "kohya"]
KEY_FORMATS: tuple[KeyFormat, ...] = ("default", "diffusers", "comfyui", "kohya")


@dataclass(frozen=True, slots=True)
class Spelling:
    """How one format writes a module: prefix, with underscores or dots, ends of the factors' names, and whether there is an alpha."""

    prefix: str
    down: str
    up: str
    flat: bool = False
    fused: bool = False
    alpha: Literal["never", "where needed", "always"] = "always"


SPELLINGS: Mapping[str, Spelling] = {
    "default": Spelling("diffusion_model.", ".lora_A.weight", ".lora_B.weight", alpha="where needed"),
    "diffusers": Spelling("transformer.", ".lora_A.weight", ".lora_B.weight", alpha="never"),
    "comfyui": Spelling("diffusion_model.", ".lora_down.weight", ".lora_up.weight", fused=True),
    "kohya": Spelling("lora_unet_", ".lora_down.weight", ".lora_up.weight", flat=True),
}


@dataclass(frozen=True, slots=True)
class Module:
    """The factors of one module: ``up`` [out, rank] and ``down`` [rank, in] in the dtype they are stored in, and the scale."""

    up: Tensor
    down: Tensor
    scale: float
    dtype: DType


@dataclass
class Converted:
    """What was done: modules written, and those whose ``up`` had to be rounded again, with the largest relative error."""

    modules: int = 0
    rounded: dict[str, float] = field(default_factory=dict)


def convert(file: LoraFile, output: Path, key_format: KeyFormat, *, overwrite: bool = False) -> Converted:
    """Write ``file`` in another format: a whole file, or none.

    Raises DataError for what no low-rank format can carry (LoHa, LoKr, whole differences, DoRA) and for parts that are changed twice,
    UsageError for an output that is not one file, OutputError and what writing raises.
    """
    lora_file.check(output, file.checkpoint.files, overwrite=overwrite)
    spelling = SPELLINGS[key_format]
    modules = dict(_modules(file))
    if spelling.fused:
        modules = _fused(file, modules)
    done = Converted(len(modules))
    tensors: dict[str, Tensor] = {}
    for module, found in modules.items():
        name = spelling.prefix + (module.replace(".", "_") if spelling.flat else module)
        up, scale = found.up, found.scale
        if scale != 1 and spelling.alpha != "always":
            folded = (up.double() * scale).to(up.dtype)
            error = _relative(folded.double(), up.double() * scale)
            if error == 0 or spelling.alpha == "never":
                up, scale = folded, 1.0
                if error:
                    done.rounded[module] = error
        tensors[name + spelling.down], tensors[name + spelling.up] = found.down, up
        if scale != 1 or spelling.alpha == "always":
            tensors[f"{name}.alpha"] = torch.tensor(scale * len(found.down), dtype=torch.float32)
    lora_file.write(output, tensors, _metadata(file, key_format), file.checkpoint.files, overwrite=overwrite)
    return done


def _modules(file: LoraFile) -> Iterator[tuple[str, Module]]:
    """Every module under its canonical name, q, k and v apart."""
    if file.unmatched:
        key, reason = file.unmatched[0]
        raise DataError(
            f'"{file.name}": {quoted(key)} cannot be converted ({reason}; {len(file.unmatched)} such keys in all).'
        )
    for part, changes in file.changes.items():
        change, kind = changes[0], changes[0].adapter.kind
        if len(changes) > 1:
            raise DataError(
                f'"{file.name}" changes {quoted(part)} {len(changes)} times; it has to be one to be converted.'
            )
        if kind != "lora" or "mid" in change.adapter.tensors or "dora_scale" in change.adapter.tensors:
            what = {"full": "a whole difference", "loha": "a LoHa", "lokr": "a LoKr", "lora": "a DoRA or LoCon"}[kind]
            raise DataError(
                f'"{file.name}": {quoted(change.adapter.module)} is {what}, which these formats cannot carry; '
                "`mergetool lora bake` adds it to a checkpoint."
            )
        yield part.removesuffix(".weight"), _module(file, change)


def _module(file: LoraFile, change: Change) -> Module:
    adapter = change.adapter
    info = [file.checkpoint.tensors[adapter.tensors[role]] for role in ("up", "down")]
    dtype = max((one.dtype for one in info), key=lambda dtype: dtype.bits)
    plain = Change(adapter, change.part, change.row, change.rows)
    found = low_rank(file, plain, scaled=False)
    assert found is not None
    up, down = (torch.from_numpy(values).to(TORCH[dtype]) for values in found)
    kernel = adapter.shape[2:]
    if kernel:
        up, down = up.reshape(*up.shape, 1, 1), down.reshape(len(down), adapter.shape[1], *kernel)
    return Module(up, down, adapter.scale, dtype)


def _fused(file: LoraFile, modules: Mapping[str, Module]) -> dict[str, Module]:
    """ComfyUI's modules: q, k and v of a block as one, block-diagonal unless they were one before."""
    together: dict[str, dict[str, Module]] = {}
    for part, module in modules.items():
        stored = file.family.stored_name(f"{part}.weight", "comfyui" if "comfyui" in file.family.layouts else "plain")
        together.setdefault(stored.removesuffix(".weight"), {})[part] = module
    fused = {}
    for stored, found in together.items():
        if not stored.endswith(".qkv"):
            (fused[stored],) = found.values()
            continue
        ordered = [found.get(f"{stored.removesuffix('.qkv')}.to_{letter}") for letter in "qkv"]
        fused[stored] = _one(ordered)
    return fused


def _one(parts: list[Module | None]) -> Module:
    """q, k and v (rows in that order; None for one that is not changed) as one pair of factors."""
    there = [part for part in parts if part is not None]
    first = there[0]
    rows = len(first.up)
    same = len(there) == 3 and all(torch.equal(part.down, first.down) and part.scale == first.scale for part in there)
    if same:
        return Module(torch.cat([part.up for part in there]), first.down, first.scale, first.dtype)
    scales = {part.scale for part in there}
    dtype = max((part.dtype for part in there), key=lambda dtype: dtype.bits)
    scale = scales.pop() if len(scales) == 1 else 1.0
    up = torch.zeros(3 * rows, sum(len(part.down) for part in there), dtype=TORCH[dtype])
    column = 0
    for i, part in enumerate(parts):
        if part is None:
            continue
        values = part.up if part.scale == scale else (part.up.double() * (part.scale / scale))
        up[i * rows : (i + 1) * rows, column : column + len(part.down)] = values.to(TORCH[dtype])
        column += len(part.down)
    return Module(up, torch.cat([part.down.to(TORCH[dtype]) for part in there]), scale, dtype)


def _relative(found: Tensor, exact: Tensor) -> float:
    norm = float(torch.linalg.vector_norm(exact))
    return float(torch.linalg.vector_norm(found - exact)) / norm if norm else 0.0


def _metadata(file: LoraFile, key_format: str) -> dict[str, str]:
    name = display_names([file.name])[file.name]
    recipe = {"lora": name, "key_format": key_format, "fingerprint": file.checkpoint.fingerprint()}
    return {"format": "pt", "mergetool.version": __version__, "mergetool.convert": json.dumps(recipe, sort_keys=True)}
