"""What a user may ask of a merge besides its expression."""

from __future__ import annotations

from dataclasses import dataclass

from mergetool.checkpoint.dtypes import DType
from mergetool.errors import UsageError
from mergetool.ops.rounding import MODES, Mode
from mergetool.recipe.groups import Setting

BUNDLED = ("keep", "drop", "drop-ema", "merge")


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for besides the expression.

    ``keep_from`` names the model of kept tensors, ``multipliers`` are the settings of ``--set`` in order (a later
    one wins; see ``recipe.groups``), ``dtype`` and ``layout`` are the output's, None for the anchor's, and so is ``prefix``, before every tensor name. ``quant`` is the container of
    the output's large matrices, None for plain floats, ``scale_search`` whether its tensor scales are searched for. ``rounding`` is how every element that is
    not copied becomes the output's dtype, ``seed`` that of stochastic rounding. Raises UsageError for a rounding that
    does not exist, a negative seed, and a seed for what is not random. ``bundled`` is what becomes of the VAE, the text encoders and the like in the
    first model's file (`BUNDLED`; see `recipe.bundled`).
    """

    protect: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    multipliers: tuple[Setting, ...] = ()
    keep_from: str | None = None
    dtype: DType | None = None
    layout: str | None = None
    quant: str | None = None
    scale_search: bool = False
    prefix: str | None = None
    rounding: Mode = "nearest"
    seed: int = 0
    bundled: str = "keep"

    def __post_init__(self) -> None:
        if self.rounding not in MODES:
            raise UsageError(f'"{self.rounding}" is not a rounding; choose one of {", ".join(MODES)}.')
        if self.bundled not in BUNDLED:
            raise UsageError(
                f'"{self.bundled}" is not what can become of bundled parts; choose one of {", ".join(BUNDLED)}.'
            )
        if type(self.seed) is not int or self.seed < 0:
            raise UsageError(f"a seed is a whole number from 0, not {self.seed!r}.")
        if self.seed and self.rounding != "stochastic":
            raise UsageError(
                f"{self.rounding} rounding draws no random numbers; leave the seed out, or round stochastically."
            )
