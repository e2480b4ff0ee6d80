"""The options of a verification: its depth, and its pictures."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, cast, get_args

from mergetool.errors import UsageError
from mergetool.options.kinds import Choice, File, Flag, Models, NamedModels, OutputPath
from mergetool.options.pictures import PicturesOptions
from mergetool.options.running import OverwriteOptions, ThreadOptions
from mergetool.options.table import Face, Option, Table

Depth = Literal["tensors", "bytes"]
DEPTHS: tuple[Depth, ...] = get_args(Depth)

KNOWN: dict[Face, str] = {"recipe": "a recipe knows where its models are"}


@dataclass(frozen=True, kw_only=True)
class LookOptions(PicturesOptions):
    """The options of a verification that every face has, the recipe's too."""

    depth: Annotated[
        Depth,
        Option(
            help="Derive every tensor again and compare it, or every byte of the file, with header and metadata.",
            section="Checks",
            kind=Choice(DEPTHS),
        ),
    ] = "tensors"
    images: Annotated[
        bool | None,
        Option(
            help="Make pictures too, or check the weights alone.",
            section="Checks",
            kind=Flag(),
            key="pictures",
            default="pictures on a GPU or of a small model",
        ),
    ] = None
    clip: Annotated[
        Path | str | None,
        Option(
            help="Score how well pictures fit their prompts with the CLIP model in this folder.",
            section="Checks",
            kind=File(),
        ),
    ] = None
    report: Annotated[
        Path | str | None, Option(help="Write the results as one HTML page.", section="Output", kind=File("FILE.html"))
    ] = None

    @property
    def page(self) -> Path | None:
        """``report`` in its one form."""
        return cast("Path | None", self.report)


@dataclass(frozen=True, kw_only=True)
class InputsOptions(Table):
    """The option for where the inputs of a recorded merge are."""

    inputs: Annotated[
        Mapping[str, str] | Sequence[str],
        Option(
            help="Where an input of the merge is now.",
            section="Models",
            kind=NamedModels(),
            flag="input",
            missing=KNOWN,
        ),
    ] = ()

    @property
    def places(self) -> Mapping[str, str]:
        """``inputs`` in their one form."""
        return cast("Mapping[str, str]", self.inputs)


@dataclass(frozen=True, kw_only=True)
class RebuildOptions(InputsOptions, ThreadOptions, OverwriteOptions):
    """The options for making a recorded merge again."""

    write_to: Annotated[
        str | os.PathLike[str] | None,
        Option(
            help="Keep the merge that is made again, in this file or folder.",
            section="Output",
            kind=OutputPath(),
            flag="output",
            short="-o",
            missing={"recipe": "what it makes is its output"},
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(LookOptions, RebuildOptions):
    """The options for verifying a file."""

    parents: Annotated[
        Sequence[str],
        Option(
            help="Measure a file without a recipe against this model.", section="Models", kind=Models(), missing=KNOWN
        ),
    ] = ()

    def check(self) -> None:
        """Raises UsageError for a place for bytes that are not made."""
        super().check()
        if self.write_to is not None and self.depth != "bytes":
            raise UsageError("`write_to` keeps the file that only `depth=bytes` makes again; add `depth=bytes`.")
