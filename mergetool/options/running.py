"""The options of a run: none of them changes a byte of an output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, cast

from mergetool.errors import UsageError
from mergetool.options.kinds import Choice, DeviceName, Flag, Integer, Size
from mergetool.options.table import Face, Option, Table

READERS = ("auto", "mmap", "pread")
MEASURES = ("sample", "all", "off")
NON_FINITE = ("refuse", "keep")

RUN: dict[Face, str] = {"recipe": "the user who runs a recipe decides how"}
PLANNED: dict[Face, str] = RUN | {"node": "ComfyUI queues what is to be run"}
DRY = "none, with `dry_run`"


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class OverwriteOptions(Table):
    """The option for replacing an output that is there."""

    overwrite: Annotated[bool, Option(help="Replace an existing output.", kind=Flag(), missing=RUN)] = False


@dataclass(frozen=True, kw_only=True)
class WriteOptions(OverwriteOptions):
    """The same, and whether anything is written at all."""

    dry_run: Annotated[
        bool, Option(help="Print what would be done, with the memory it takes, and stop.", kind=Flag(), missing=PLANNED)
    ] = False


def require_output(output: object, *, dry_run: bool) -> None:
    """Raise UsageError where a run has to write and no output has a name."""
    if output is None and not dry_run:
        raise UsageError("no output is named; add `output`, or `dry_run` to see the plan.")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ShardOptions(Table):
    """The options for the number of files of a model."""

    shard_size: Annotated[
        int | str | None, Option(help="Write a folder of shards no larger than this, as in 5GB.", kind=Size())
    ] = None

    @property
    def shard_bytes(self) -> int | None:
        """``shard_size`` in bytes."""
        return cast("int | None", self.shard_size)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ThreadOptions(Table):
    """The option for the number of threads."""

    threads: Annotated[
        int | None, Option(help="Worker threads.", kind=Integer(1, 256), default="all cores", missing=RUN)
    ] = None


@dataclass(frozen=True, kw_only=True)
class ReaderOptions(ThreadOptions):
    """The option for reading files."""

    reader: Annotated[
        Literal["auto", "mmap", "pread"],
        Option(help="How files are read; same bytes.", kind=Choice(READERS), missing=RUN),
    ] = "auto"


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DeviceOptions(Table):
    """The option for the device that computes."""

    device: Annotated[
        str, Option(help="auto, cpu, cuda (every GPU) or cuda:NUMBER.", kind=DeviceName(), missing=RUN)
    ] = "auto"


@dataclass(frozen=True, kw_only=True)
class GpuOptions(DeviceOptions):
    """The options for the device that computes, and its memory."""

    gpu_memory: Annotated[
        int | str | None,
        Option(help="Most memory to take of each GPU.", kind=Size(), default="80 % of what is free", missing=RUN),
    ] = None

    @property
    def gpu_bytes(self) -> int:
        """``gpu_memory`` in bytes, 0 for the default."""
        return cast(int, self.gpu_memory or 0)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class UnmatchedOptions(Table):
    """The option for LoRA keys that match nothing."""

    skip_unmatched: Annotated[
        bool,
        Option(help="Skip (and list) LoRA keys that match nothing in the model.", kind=Flag(), missing=RUN),
    ] = False


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ForceOptions(Table):
    """Whether the preflight may be overruled."""

    force: Annotated[
        bool,
        Option(help="Merge models that do not look as if they belong together.", kind=Flag(), missing=RUN),
    ] = False


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class NonFiniteOptions(Table):
    """The option for NaN and infinity."""

    non_finite: Annotated[
        Literal["refuse", "keep"],
        Option(help="What to do with NaN and infinity.", kind=Choice(NON_FINITE), flag="nonfinite", missing=RUN),
    ] = "refuse"


@dataclass(frozen=True, kw_only=True)
class DiffRunOptions(ReaderOptions, GpuOptions, UnmatchedOptions, WriteOptions):
    """The options for running a difference."""


@dataclass(frozen=True, kw_only=True)
class MergeRunOptions(ReaderOptions, GpuOptions, NonFiniteOptions, UnmatchedOptions, ForceOptions, WriteOptions):
    """The options for running a merge."""

    measure: Annotated[
        Literal["sample", "all", "off"],
        Option(
            help="On how much of the output to measure what rounding did to the delta.",
            kind=Choice(MEASURES),
            missing=RUN,
        ),
    ] = "sample"
    resume: Annotated[
        bool,
        Option(
            help="Keep what is finished when the run is stopped; the same command then goes on from there.",
            kind=Flag(),
            missing=RUN,
        ),
    ] = False
