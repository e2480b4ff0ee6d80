"""The pieces of a plan: inputs, places of their elements, and steps that fill tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from mergetool.arch import Anatomy, Part
from mergetool.checkpoint.dtypes import DType
from mergetool.checkpoint.reader import Checkpoint
from mergetool.checkpoint.widened import WidenedCheckpoint
from mergetool.errors import FamilyError
from mergetool.ops.program import Load, Program
from mergetool.quant.encoding import Encoding
from mergetool.quant.quantiser import Quantiser

if TYPE_CHECKING:
    from mergetool.models import OpenedModel
    from mergetool.recipe.plan import Plan

MERGED = "merged"
SET_TO_0 = "`multipliers` to 0"
COPY = Program((Load(0, 0),))


@dataclass(frozen=True, slots=True)
class Input:
    """One model of the expression: its name there, its checkpoint and its anatomy.

    A LoRA's anatomy has the parts that it changes, with the change as their values. ``unmatched`` names what of it changes
    none, with the reason; ``remarks`` are what to warn of; ``widens`` are the parts of which it wants more columns than the model has, with their
    number. A model that is an expression has the ``plan`` that computes it.
    """

    name: str
    checkpoint: Checkpoint
    anatomy: Anatomy
    is_lora: bool = False
    unmatched: tuple[tuple[str, str], ...] = ()
    remarks: tuple[str, ...] = ()
    plan: Plan | None = None
    widens: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, opened: OpenedModel, plan: Plan | None = None) -> Input:
        """An opened model, which ``plan`` computes unless it lies in files."""
        remarks = [f"{opened.name} {note}" for note in opened.notes]
        if plan is not None:
            remarks += [f"{opened.name}: {text}" for text in plan.remarks()]
        return cls(opened.name, opened.checkpoint, opened.anatomy, remarks=tuple(remarks), plan=plan)

    def widened(self, widths: Mapping[str, int]) -> Input:
        """The same model with so many columns of some parts, as `WidenedCheckpoint` has them. Raises FamilyError for a quantised one."""
        narrow = {
            name: part
            for name, width in widths.items()
            if (part := self.anatomy.parts.get(name)) is not None and part.shape[1:] < (width,)
        }
        if not narrow:
            return self
        for part in narrow.values():
            if part.encoding is not None or part.stored.rows != self.checkpoint.tensors[part.stored.tensor].shape[0]:
                raise FamilyError(
                    f'tensor "{part.stored.tensor}" of {self.name} has {part.shape[1]} columns, where the LoRA wants {widths[part.name]}, and it '
                    "is quantised or of several parts, so that it cannot be widened; give the unquantised model."
                )
        parts = {
            name: replace(part, shape=(part.shape[0], widths[name])) if name in narrow else part
            for name, part in self.anatomy.parts.items()
        }
        checkpoint = WidenedCheckpoint(
            self.checkpoint, {part.stored.tensor: widths[name] for name, part in narrow.items()}
        )
        return replace(self, checkpoint=checkpoint, anatomy=replace(self.anatomy, parts=parts))

    def leaves(self) -> Iterator[Input]:
        """The models and LoRAs in files that it is made of: itself, or all that its plan reads."""
        if self.plan is None:
            yield self
        else:
            for model in self.plan.inputs:
                yield from model.leaves()


@dataclass(frozen=True, slots=True)
class Window:
    """The place of one operand of a part in a stored tensor.

    It is bytes ``[start, start + elements * itemsize)``. Of a quantised weight the rows from ``row`` on, as ``encoding`` decodes them,
    float32; ``start`` is then 0.
    """

    input: int
    tensor: str
    start: int
    dtype: DType
    encoding: Encoding | None = None
    row: int = 0

    @property
    def first_element(self) -> int:
        """The index of its first element in the stored tensor."""
        if self.encoding is not None:
            return self.row * self.encoding.width
        return self.start // self.dtype.itemsize

    def nbytes(self, elements: int) -> int:
        """Stored bytes of its first ``elements``, scales included."""
        if self.encoding is not None:
            return sum(span.size for span in self.encoding.spans(self.row, elements // self.encoding.width))
        return elements * self.dtype.bits // 8


@dataclass(frozen=True, slots=True)
class Step:
    """One part of one output tensor: elements ``[first, first + elements)`` of it.

    ``program`` is None for a bit-for-bit copy of ``windows[0]``; otherwise its models index ``windows``.
    ``reason`` is ``"merged"`` or why the part is not. ``base`` is the window of the anchor's elements, which what is
    merged is measured against; the program may not need it. ``multiplier`` is the one of ``multipliers`` that is in the program, 0 where it is
    the reason.
    """

    part: str
    first: int
    elements: int
    program: Program | None
    windows: tuple[Window, ...]
    reason: str
    base: int | None = None
    multiplier: Fraction = Fraction(1)


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the output file and the steps that fill it, in order.

    With a ``quantiser`` it is a whole weight: the steps give its float32 values, of ``shape``, and it becomes the stored
    tensors of ``entries``. A tensor with ``constant`` bytes has no steps.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    steps: tuple[Step, ...]
    quantiser: Quantiser | None = None
    constant: bytes | None = None

    @property
    def stored_as(self) -> str:
        """The dtype or the container of the output, as ``dtype`` and ``quant`` name them."""
        return self.quantiser.quant if self.quantiser else self.dtype.name

    @property
    def layer(self) -> str:
        """The module whose weight this is."""
        return self.name.removesuffix(".weight")

    def entries(self) -> list[tuple[str, DType, tuple[int, ...]]]:
        """Name, dtype and shape of every stored tensor."""
        if self.quantiser is None:
            return [(self.name, self.dtype, self.shape)]
        return self.quantiser.entries(self.layer, (self.shape[0], self.shape[1]))


def window_of(column: int, model: Input, part: Part) -> Window:
    """The window of a part; ``column`` is the model's place among the inputs."""
    stored = part.stored
    if part.encoding is not None:
        return Window(column, stored.tensor, 0, part.dtype, part.encoding, stored.row)
    return Window(column, stored.tensor, stored.row * model.checkpoint.tensors[stored.tensor].row_nbytes, part.dtype)
