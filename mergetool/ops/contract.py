"""The contract of the merge arithmetic, for every implementation.

An implementation works on one chunk of at most ``capacity`` elements at a time and keeps ``registers`` float32
vectors. Every operation is one IEEE float32 operation per element, rounded to nearest even and never contracted with
another, so all implementations give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from mergetool.checkpoint.dtypes import DType
from mergetool.ops.movement import Movement
from mergetool.ops.program import Add, Apply, Load, Program, Scale, Subtract
from mergetool.ops.rounding import NEAREST, Rounding


class Ops(Protocol):
    """Float32 registers over one chunk of elements."""

    def load(self, register: int, raw: memoryview, dtype: DType) -> None:
        """Set a register from a chunk's stored little-endian bytes. The register's length becomes the chunk's."""

    def scale(self, register: int, factor: float) -> None:
        """Multiply a register by a float32 number."""

    def add(self, register: int, other: int) -> None:
        """Add one register to another, element by element."""

    def subtract(self, register: int, other: int) -> None:
        """Subtract ``other`` from ``register``, element by element."""

    def is_finite(self, register: int) -> bool:
        """True when a register holds neither NaN nor infinity."""

    def first_non_finite(self, register: int) -> tuple[int, int]:
        """Count a register's elements that are NaN or infinite, and find the first.

        The second number is the first one's index.
        """

    def store(
        self, register: int, dtype: DType, rounding: Rounding = NEAREST, first: int | None = None
    ) -> tuple[memoryview, int]:
        """Round a register to ``dtype``; also the number of elements beyond the dtype's range.

        ``first`` names the register that ``measure`` will be asked about; the chunk's last load went there.

        fp32 and fp64 take every float32 as it is, whatever the rounding. Finite elements beyond the range become infinity in
        fp16 and bf16, and all elements beyond it the largest finite value of their sign in the FP8 types, which have no
        (e4m3) or no useful (e5m2) infinity. The view is valid until the next ``store``.
        """

    def measure(self, register: int, first: int, dtype: DType) -> Movement:
        """Measure how far the last ``store`` moved from the register ``first``.

        The store was of this register to this dtype.

        Counts are exact; the energies are sums in float64 over sums in float32 of at most 1024 elements.
        """


def execute(
    program: Program, ops: Ops, load: Callable[[int, int], None], apply: Callable[[Apply], None] | None = None
) -> None:
    """Run ``program`` on ``ops``.

    ``load(register, model)`` sets a register from a model's stored elements, ``apply`` does a method call; a program that has none
    needs no ``apply``.
    """
    for step in program.instructions:
        match step:
            case Load():
                load(step.register, step.model)
            case Scale():
                ops.scale(step.register, step.factor)
            case Add():
                ops.add(step.register, step.other)
            case Subtract():
                ops.subtract(step.register, step.other)
            case Apply():
                assert apply is not None
                apply(step)
