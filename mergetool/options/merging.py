"""The options that decide the bytes of a merge, besides its expression."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, cast

from mergetool.checkpoint import dtypes
from mergetool.checkpoint.dtypes import DType
from mergetool.errors import UsageError
from mergetool.ops.rounding import MODES, Mode
from mergetool.options.kinds import Choice, Flag, Integer, ModelName, Patterns, Settings, String
from mergetool.options.multipliers import Setting
from mergetool.options.table import Option, Table
from mergetool.quant import register

LAYOUTS = ("comfyui", "diffusers")
BUNDLED = ("keep", "drop", "drop-ema", "merge")
LARGEST_SEED = 2**64 - 1


@dataclass(frozen=True, kw_only=True)
class ContainerOptions(Table):
    """The options for the form of a written model; None is the anchor's."""

    dtype: Annotated[
        str | None,
        Option(
            help="Dtype of the output's floats.", kind=Choice(tuple(dtypes.OUTPUT), "DTYPE"), default="the anchor's"
        ),
    ] = None
    quant: Annotated[
        str | None,
        Option(
            help="Quantised container of the large matrices, as ComfyUI loads it.",
            kind=Choice(register.names(), "CONTAINER"),
        ),
    ] = None
    scale_search: Annotated[
        bool, Option(help="Search each tensor's scale for the least squared error.", kind=Flag())
    ] = False
    bundled: Annotated[
        str, Option(help="What becomes of VAE, text encoders, EMA and the like.", kind=Choice(BUNDLED, "WHAT"))
    ] = "keep"
    layout: Annotated[
        str | None,
        Option(
            help="Names of one file of ComfyUI's or of a folder of diffusers'.",
            kind=Choice(LAYOUTS, "LAYOUT"),
            default="the anchor's",
        ),
    ] = None

    prefix: Annotated[
        str | None,
        Option(
            help='Before every tensor name; "" for none.',
            kind=String("PREFIX", empty=True),
            default="the anchor's",
        ),
    ] = None

    @property
    def stored(self) -> DType | None:
        """The dtype for the output, if chosen."""
        return dtypes.output_dtype(self.dtype)


@dataclass(frozen=True, kw_only=True)
class PatternOptions(Table):
    """The options that select parts of the models."""

    include: Annotated[Sequence[str], Option(help="Take only these.", kind=Patterns())] = ()
    exclude: Annotated[Sequence[str], Option(help="Leave these out.", kind=Patterns())] = ()


@dataclass(frozen=True, kw_only=True)
class RoundingOptions(Table):
    """The options for how float32 is rounded."""

    rounding: Annotated[
        Mode,
        Option(
            help="stochastic keeps on average a change too small to be stored; error-feedback carries the error along a row.",
            kind=Choice(MODES, "MODE"),
        ),
    ] = "nearest"
    seed: Annotated[
        int, Option(help="Seed of stochastic rounding: the same seed, the same bytes.", kind=Integer(0, LARGEST_SEED))
    ] = 0

    def check(self) -> None:
        """Raises UsageError for a seed where nothing is random."""
        super().check()
        if self.seed and self.rounding != "stochastic":
            raise UsageError(
                f"{self.rounding} rounding draws no random numbers; leave out `seed`, or use `rounding=stochastic`."
            )


@dataclass(frozen=True, kw_only=True)
class MergeOptions(ContainerOptions, PatternOptions, RoundingOptions):
    """The options that, besides its expression, decide the bytes of a merge.

    ``keep_from`` names the model of kept tensors, ``multipliers`` are settings in order (a later one wins; see `options.multipliers`), ``dtype``,
    ``layout`` and ``prefix`` are the output's, None for the anchor's; the prefix stands before every tensor name. ``bundled`` is what becomes of
    the VAE, the text encoders and the like in the first model's file (see `recipe.bundled`).
    """

    protect: Annotated[
        Sequence[str], Option(help="Group or pattern taken bit for bit from the anchor.", kind=Patterns())
    ] = ()
    keep_from: Annotated[
        str | None,
        Option(
            help="Take protected and excluded tensors from this model.",
            kind=ModelName(),
            flag="from",
            key="from",
            default="the anchor",
        ),
    ] = None
    multipliers: Annotated[
        Mapping[str, float | str | Fraction] | Sequence[str | Setting],
        Option(
            help="Scale the change in a group: 0 leaves the anchor, 1 is the expression; layers=linear(0.2,1) runs over depth, preset:NAME is a "
            "named set; later wins.",
            kind=Settings(),
            flag="set",
            key="set",
        ),
    ] = ()

    title: Annotated[
        str | None, Option(help="Title in the output's metadata (modelspec.title).", kind=String("TEXT"))
    ] = None

    @property
    def settings(self) -> tuple[Setting, ...]:
        """``multipliers`` in their one form."""
        return cast(tuple[Setting, ...], self.multipliers)
