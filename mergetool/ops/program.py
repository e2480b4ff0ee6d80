"""A program: the exact list of float32 operations that one element of a merge goes through.

The engine, the CUDA path and the oracle all execute the same program, so their results are equal bit for bit.
Each instruction is one IEEE float32 operation, rounded to nearest even, never contracted with its neighbour:

* ``Load(r, model)``      r = float32(x), exact for every dtype that is narrower than float32;
* ``Scale(r, factor)``    r = r * factor;
* ``Add(r, s)``           r = r + s;
* ``Subtract(r, s)``      r = r - s;
* ``Apply(r, ...)``       r = what a merge method makes of other registers. It needs a whole parameter at a time.

The result is register 0; it is rounded once to the output dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

ParameterValue = Fraction | bool | str | tuple[Fraction, ...]
"""The values of a merge method's parameters, numbers exactly as they were written."""


@dataclass(frozen=True, slots=True)
class Load:
    """``register = float32(models[model])``."""

    register: int
    model: int


@dataclass(frozen=True, slots=True)
class Scale:
    """``register *= factor``; the factor is already rounded to float32."""

    register: int
    factor: float


@dataclass(frozen=True, slots=True)
class Add:
    """``register += other``."""

    register: int
    other: int


@dataclass(frozen=True, slots=True)
class Subtract:
    """``register -= other``."""

    register: int
    other: int


@dataclass(frozen=True, slots=True)
class Apply:
    """``register = method(arguments, parameters)``; an argument that is None is zero everywhere."""

    register: int
    method: str
    arguments: tuple[int | None, ...]
    parameters: tuple[tuple[str, ParameterValue], ...] = ()


Instruction = Load | Scale | Add | Subtract | Apply


@dataclass(frozen=True, slots=True)
class Program:
    """Instructions over a few registers; the result is left in register 0."""

    instructions: tuple[Instruction, ...]

    @property
    def registers(self) -> int:
        """The number of float32 registers that the program needs at once."""
        return 1 + max(step.register for step in self.instructions)

    @property
    def calls(self) -> tuple[Apply, ...]:
        """Its method calls; a program with any is run over whole parameters."""
        return tuple(step for step in self.instructions if isinstance(step, Apply))

    @property
    def models(self) -> tuple[int, ...]:
        """The models that it loads, each once, in load order."""
        return tuple(dict.fromkeys(step.model for step in self.instructions if isinstance(step, Load)))
