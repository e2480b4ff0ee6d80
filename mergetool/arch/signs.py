"""The signs of a model in its header: layouts, variants, the published models behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Shapes = Mapping[str, tuple[int, ...]]
Like = tuple[int | None, ...] | None
"""A shape with None for any number of rows or columns, or None for any shape."""
Fp16 = Literal["computed", "capped", "witnessed", "avoided"]
"""The ways of programs with fp16.

They compute in it; they cap activations, which leave its range, at 65504; they do that where the spread of one norm is small (`Family.fp16_witness`) and
else compute in bf16; or they compute in bf16 and float32 only. Programs are ComfyUI 0.30, by ``supported_inference_dtypes`` of its ``supported_models.py``
and what its models cap, and diffusers 0.42.1, by what its models cap."""
IN_FP16: Mapping[Fp16, str] = {
    "capped": "programs cap them at 65504",
    "witnessed": "ComfyUI computes in it only where the spread of one norm is small, and caps them",
    "avoided": "ComfyUI computes in bf16 or float32 only",
}
"""The same in words about activations that overflow."""


@dataclass(frozen=True, slots=True)
class Signature:
    """The signs of a model in ``layout``: tensors that it ``has``, tensors that it ``lacks``.

    Shapes count.
    """

    layout: str
    has: Mapping[str, Like]
    lacks: Mapping[str, Like] = field(default_factory=dict)

    def fits(self, shapes: Shapes) -> bool:
        """Whether ``shapes``, under the model's own names, are such a model's."""
        return _fits(self.has, self.lacks, shapes)


@dataclass(frozen=True, slots=True)
class Variant:
    """A kind of a family's models that a header tells.

    It ``has`` parts, of such shapes, and none of those that it ``lacks``. ``fp16`` is as in `Family`, where it differs from the family's.
    """

    name: str
    has: Mapping[str, Like] = field(default_factory=dict)
    lacks: Mapping[str, Like] = field(default_factory=dict)
    fp16: Fp16 | None = None

    def fits(self, shapes: Shapes) -> bool:
        """Whether ``shapes``, by canonical name, are such a model's."""
        return _fits(self.has, self.lacks, shapes)


@dataclass(frozen=True, slots=True)
class Stock:
    """A published model that others build on, and its own ancestors.

    Its header is of one of ``variants``, where a family has some. ``words`` are patterns in lower-case names and metadata; ``of`` are other stock
    models, by name, as their publishers tell it. ``distilled`` ones draw in fewer steps or without guidance.
    """

    name: str
    variants: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    of: tuple[str, ...] = ()
    distilled: bool = False


def _fits(has: Mapping[str, Like], lacks: Mapping[str, Like], shapes: Shapes) -> bool:
    return all(_is_there(*row, shapes) for row in has.items()) and not any(
        _is_there(*row, shapes) for row in lacks.items()
    )


def _is_there(name: str, like: Like, shapes: Shapes) -> bool:
    shape = shapes.get(name)
    if shape is None and name.endswith(".scale"):
        shape = shapes.get(f"{name.removesuffix('scale')}weight")
    if shape is None:
        return False
    return like is None or (
        len(like) == len(shape) and all(wanted in (None, size) for wanted, size in zip(like, shape, strict=True))
    )
