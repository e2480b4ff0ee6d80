"""A family as the oracles are asked for it: a small model, the classes that both programs have for it, and whose names are whose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from mergetool.arch.known import KnownFamily
from tests.adapters.spellings import Written
from tests.oracles.diffusers import Diffusers
from tests.oracles.process import RefusedError

Tensors = dict[str, torch.Tensor]
Changes = dict[str, np.ndarray]
Converter = Callable[[Tensors], Tensors]


@dataclass(frozen=True)
class Place:
    """Where a tensor of diffusers' stands in ComfyUI's layout: the tensor, its first row and rows, and whether its halves are exchanged."""

    tensor: str
    row: int
    rows: int
    swapped: bool


@dataclass(frozen=True)
class Case:
    """A family with ``small`` sizes, ``configs`` of ComfyUI by published sizes, and diffusers' pipeline, ``model`` and its arguments for the small one.

    ``converter`` is diffusers' own from single files, None where the names are the same. ``spellings`` are LoRAs, of which those in ``converted`` can be written in
    every format, ``unmapped`` the beginnings of modules that ComfyUI does not know behind the prefix that `diff` writes; ``matrices`` is how many modules of the small model a LoRA can change,
    weights of ``dimensions`` but those that are stored ``in_full``.
    Of the blocks of ``stack`` all matrices are quantised but those ``kept``. ``has_one_width`` says that diffusers takes ComfyUI's names of LoRAs at the published width alone, ``renamed`` that
    ComfyUI also loads a file in diffusers' layout; ``unmerged`` are the tensors that its merge nodes leave as the first model has them, and ``resized`` is the spelling that is cut to a lower rank, the first
    of ``converted`` by default.
    """

    family: KnownFamily
    small: Mapping[str, int]
    published: Mapping[str, Mapping[str, int]]
    configs: Mapping[str, str]
    pipeline: str
    model: str
    config: Mapping[str, Any]
    matrices: int
    spellings: Mapping[str, Callable[[], Written]] = field(default_factory=dict)
    converter: Converter | None = None
    converted: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    stack: str = "blocks."
    has_one_width: bool = False
    unmapped: tuple[str, ...] = ()
    dimensions: tuple[int, ...] = (2,)
    in_full: tuple[str, ...] = ()
    renamed: bool = False
    resized: str = ""
    unmerged: tuple[str, ...] = ()

    def is_quantised(self, name: str) -> bool:
        """Whether it is a matrix of a block with sides of at least 64, and in none of the modules ``kept`` as they are."""
        shape = self.shapes("diffusers")[name]
        in_block = self.stack in name and len(shape) == 2 and min(shape) >= 64
        return in_block and not any(module in name for module in self.kept)

    @property
    def loaded_as(self) -> str:
        """ComfyUI's configuration of the small model."""
        return next(iter(self.configs.values()))

    def shapes(self, layout: str, sizes: Mapping[str, int] | None = None) -> dict[str, tuple[int, ...]]:
        return self.family.shapes(sizes or self.small, layout)

    @cached_property
    def places(self) -> dict[str, Place]:
        """The places of the small model's tensors, by diffusers' name: those of a published one as deep, whose widths its converter knows."""
        published = next(iter(self.published.values()))
        deep = {name: size for name, size in self.small.items() if name.endswith(("blocks", "layers", "norms"))}
        theirs, ours = self.shapes("comfyui", {**published, **deep}), self.shapes("comfyui")
        by = published.get("dim", 1) // self.small.get("dim", 1)  # of UNets nothing is fused
        found = {}
        for name, place in places(self.converter, theirs).items():
            is_whole = place.rows == theirs[place.tensor][0]
            rows = ours[place.tensor][0] if is_whole else place.rows // by
            found[name] = Place(in_comfyui(place.tensor), place.row // by, rows, place.swapped)
        return found

    def values(self, seed: int) -> Tensors:
        """A small model under diffusers' names, of multiples of 1/64 below 1/2: bf16 holds them, and float32 sums of a few."""
        generator = torch.Generator().manual_seed(seed)
        return {
            name: torch.randint(-31, 32, shape, generator=generator).float() / 64
            for name, shape in self.shapes("diffusers").items()
        }

    def native(self, state: Tensors) -> Tensors:
        """A model in diffusers' names under ComfyUI's, as diffusers' converter says."""
        dtype = next(iter(state.values())).dtype
        found = {in_comfyui(name): torch.zeros(shape, dtype=dtype) for name, shape in self.shapes("comfyui").items()}
        for name, tensor in state.items():
            place = self.places[name]
            value = torch.cat(tensor.chunk(2)[::-1]) if place.swapped else tensor
            found[place.tensor][place.row : place.row + place.rows] = value
        return found

    def by_diffusers(self, state: Mapping[str, np.ndarray]) -> Changes:
        """The same the other way."""
        found = {}
        for name, place in self.places.items():
            value = state[place.tensor][place.row : place.row + place.rows]
            found[name] = np.concatenate(np.split(value, 2)[::-1]) if place.swapped else value
        return found

    def mapped(self, names: Iterable[str]) -> set[str]:
        """Those of diffusers' names that ComfyUI knows in files that ``diff`` writes."""
        return {name for name in names if not name.startswith(self.unmapped or ("-",))}

    def loaded(self, diffusers: Diffusers, lora: Any) -> Changes | None:
        """What diffusers adds to a small model of zeros; None where it raises an error."""
        from tests.oracles.comparing import read

        out = lora.with_name("diffusers.safetensors")
        asked = {"pipeline": self.pipeline, "model": self.model, "config": dict(self.config)}
        try:
            diffusers.ask("load", lora=lora.parent, name=lora.name, out=out, **asked)
        except RefusedError:
            return None
        return {name: value for name, value in read(out).items() if value.any()}


def in_comfyui(name: str) -> str:
    """ComfyUI's class calls the weights of norms so, whatever a file does."""
    return f"{name.removesuffix('scale')}weight" if name.endswith(".scale") else name


def places(converter: Converter | None, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """Where diffusers' ``converter`` takes each of its tensors from: every row of ``shapes`` holds its own number."""
    if converter is None:
        return {name: Place(name, 0, shape[0], swapped=False) for name, shape in shapes.items()}
    stored = {
        name: (torch.arange(shape[0]) + (i << 20)).view(-1, *(1 for _ in shape[1:]))
        for i, (name, shape) in enumerate(shapes.items())
    }
    names, found = list(stored), {}
    for theirs, tensor in converter(dict(stored)).items():
        rows = tensor.reshape(len(tensor), -1)[:, 0]
        (index,) = set((rows >> 20).tolist())
        rows = rows & ((1 << 20) - 1)
        swapped = bool(len(rows) > 1 and rows[0] > rows[-1])
        ordered = torch.cat(rows.chunk(2)[::-1]) if swapped else rows
        assert torch.equal(ordered, torch.arange(len(rows)) + ordered[0])
        found[theirs] = Place(names[index], int(ordered[0]), len(rows), swapped)
    return found
