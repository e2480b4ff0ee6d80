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
BUNDLED = ("encoders", "keep", "drop", "drop-ema", "merge")
LARGEST_SEED = 2**64 - 1


@dataclass(frozen=True, kw_only=True)
class ContainerOptions(Table):
    """The options for the form of a written model; None is the anchor's."""

    dtype: Annotated[
        str | None,
        Option(
            help="Store floating-point tensors in this dtype.",
            section="Number format",
            kind=Choice(tuple(dtypes.OUTPUT), "DTYPE"),
            default="the anchor's",
        ),
    ] = None
    quant: Annotated[
        str | None,
        Option(
            help="Quantise the large matrices into this container, which ComfyUI loads.",
            section="Number format",
            kind=Choice(register.names(), "CONTAINER"),
        ),
    ] = None
    scale_search: Annotated[
        bool,
        Option(
            help="With `quant`: search each tensor's scale for the least squared error.",
            section="Number format",
            kind=Flag(),
        ),
    ] = False
    bundled: Annotated[
        str,
        Option(
            help="Of all-in-one files merge the text encoders and keep the rest, keep all of the anchor's, drop it, drop EMA alone, or merge the VAE too.",
            section="Output",
            kind=Choice(BUNDLED, "WHAT"),
        ),
    ] = "encoders"
    layout: Annotated[
        str | None,
        Option(
            help="Name the tensors as ComfyUI does (one file) or as diffusers does (a folder).",
            section="Output",
            kind=Choice(LAYOUTS, "LAYOUT"),
            default="the anchor's",
        ),
    ] = None

    prefix: Annotated[
        str | None,
        Option(
            help='Put this before every tensor name; "" puts nothing.',
            section="Output",
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

    include: Annotated[Sequence[str], Option(help="Act on these parts only.", section="Parts", kind=Patterns())] = ()
    exclude: Annotated[Sequence[str], Option(help="Leave these parts out.", section="Parts", kind=Patterns())] = ()


@dataclass(frozen=True, kw_only=True)
class RoundingOptions(Table):
    """The options for how float32 is rounded."""

    rounding: Annotated[
        Mode,
        Option(
            help="Round to the stored dtype this way: stochastic keeps small changes on average, error-feedback carries the error along each row.",
            section="Number format",
            kind=Choice(MODES, "MODE"),
        ),
    ] = "nearest"
    seed: Annotated[
        int,
        Option(
            help="Seed of stochastic rounding; the same seed gives the same bytes.",
            section="Number format",
            kind=Integer(0, LARGEST_SEED),
        ),
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
    """The options that decide the bytes of a merge, besides its expression.

    ``keep_from`` names the model of kept tensors. ``multipliers`` are settings in order; a later one wins (see `options.multipliers`).
    ``dtype``, ``layout`` and ``prefix`` are the output's, None for the anchor's; the prefix stands before every tensor name. ``bundled``
    decides about the VAE, the text encoders and the like beside a model in its file (see `recipe.bundled`).
    """

    protect: Annotated[
        Sequence[str],
        Option(help="Keep this group or pattern bit for bit as the anchor has it.", section="Parts", kind=Patterns()),
    ] = ()
    keep_from: Annotated[
        str | None,
        Option(
            help="Take protected and excluded tensors from this model.",
            section="Parts",
            kind=ModelName(),
            flag="from",
            key="from",
            default="the anchor",
        ),
    ] = None
    multipliers: Annotated[
        Mapping[str, float | str | Fraction] | Sequence[str | Setting],
        Option(
            help="Multiply the change in a group: 0 keeps the anchor, 1 is the expression, linear(0.2,1) runs over depth; preset:NAME is a named "
            "set. The last setting wins.",
            section="Parts",
            kind=Settings(),
            flag="set",
            key="set",
        ),
    ] = ()

    title: Annotated[
        str | None,
        Option(help="Write this title into the metadata (modelspec.title).", section="Output", kind=String("TEXT")),
    ] = None

    @property
    def settings(self) -> tuple[Setting, ...]:
        """``multipliers`` in their one form."""
        return cast(tuple[Setting, ...], self.multipliers)
