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
            help="tensors derives every tensor again and compares it; bytes compares the whole file, header and metadata too.",
            kind=Choice(DEPTHS),
        ),
    ] = "tensors"
    images: Annotated[
        bool | None,
        Option(
            help="Make pictures, or stop after the weights.",
            kind=Flag(),
            key="pictures",
            default="where that takes minutes",
        ),
    ] = None
    clip: Annotated[
        Path | str | None, Option(help="Folder of a CLIP model, to score how pictures fit prompts.", kind=File())
    ] = None
    report: Annotated[Path | str | None, Option(help="Write all of it as one HTML page.", kind=File("FILE.html"))] = (
        None
    )

    @property
    def page(self) -> Path | None:
        """``report`` in its one form."""
        return cast("Path | None", self.report)


@dataclass(frozen=True, kw_only=True)
class InputsOptions(Table):
    """The option for where the inputs of a recorded merge are."""

    inputs: Annotated[
        Mapping[str, str] | Sequence[str],
        Option(help="Where an input is now.", kind=NamedModels(), flag="input", missing=KNOWN),
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
            help="Keep what comes out, in this file or folder.",
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
        Option(help="Model to measure a file without recipe against.", kind=Models(), missing=KNOWN),
    ] = ()

    def check(self) -> None:
        """Raises UsageError for a place for bytes that are not made."""
        super().check()
        if self.write_to is not None and self.depth != "bytes":
            raise UsageError("`write_to` keeps what `depth=bytes` makes again; add that.")
