"""What a user may ask of a merge besides its expression."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from mergetool.checkpoint.dtypes import DType


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for besides the expression.

    ``keep_from`` names the model of kept tensors, ``multipliers`` are the ``--set GROUP=MULT`` pairs in order (a later
    one wins), ``dtype`` and ``layout`` are the output's, None for the first model's.
    """

    protect: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    multipliers: tuple[tuple[str, Fraction], ...] = ()
    keep_from: str | None = None
    dtype: DType | None = None
    layout: str | None = None
