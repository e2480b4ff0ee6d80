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
PLANNED: dict[Face, str] = RUN | {"node": "ComfyUI plans its runs itself"}
DRY = "none; needed unless `dry_run`"


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class OverwriteOptions(Table):
    """The option for replacing an output that is there."""

    overwrite: Annotated[
        bool, Option(help="Replace the output if it exists.", section="Output", kind=Flag(), missing=RUN)
    ] = False


@dataclass(frozen=True, kw_only=True)
class WriteOptions(OverwriteOptions):
    """The same, and whether anything is written at all."""

    dry_run: Annotated[
        bool,
        Option(
            help="Print the plan and the memory it takes, then stop.", section="Output", kind=Flag(), missing=PLANNED
        ),
    ] = False


def require_output(output: object, *, dry_run: bool) -> None:
    """Raise UsageError where a run has to write and no output has a name."""
    if output is None and not dry_run:
        raise UsageError("the request names no output; add `output`, or `dry_run` to see the plan.")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ShardOptions(Table):
    """The options for the number of files of a model."""

    shard_size: Annotated[
        int | str | None,
        Option(help="Write a folder of shards of at most this size, e.g. 5GB.", section="Output", kind=Size()),
    ] = None

    @property
    def shard_bytes(self) -> int | None:
        """``shard_size`` in bytes."""
        return cast("int | None", self.shard_size)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ThreadOptions(Table):
    """The option for the number of threads."""

    threads: Annotated[
        int | None,
        Option(
            help="Use this many worker threads.",
            section="Machine",
            kind=Integer(1, 256),
            default="all cores",
            missing=RUN,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ReaderOptions(ThreadOptions):
    """The option for reading files."""

    reader: Annotated[
        Literal["auto", "mmap", "pread"],
        Option(
            help="Read files through mmap or pread; the output is the same.",
            section="Machine",
            kind=Choice(READERS),
            missing=RUN,
        ),
    ] = "auto"


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DeviceOptions(Table):
    """The option for the device that computes."""

    device: Annotated[
        str,
        Option(
            help="Compute on this device: auto, cpu, cuda (every GPU) or cuda:NUMBER.",
            section="Machine",
            kind=DeviceName(),
            missing=RUN,
        ),
    ] = "auto"


@dataclass(frozen=True, kw_only=True)
class GpuOptions(DeviceOptions):
    """The options for the device that computes, and its memory."""

    gpu_memory: Annotated[
        int | str | None,
        Option(
            help="Take at most this much memory of each GPU, e.g. 8GB.",
            section="Machine",
            kind=Size(),
            default="80 % of what is free",
            missing=RUN,
        ),
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
        Option(
            help="Skip and list LoRA keys that match nothing in the model, instead of failing.",
            section="Checks",
            kind=Flag(),
            missing=RUN,
        ),
    ] = False


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ForceOptions(Table):
    """Whether the preflight may be overruled."""

    force: Annotated[
        bool,
        Option(
            help="Merge even where a check finds that the models do not belong together.",
            section="Checks",
            kind=Flag(),
            missing=RUN,
        ),
    ] = False


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class NonFiniteOptions(Table):
    """The option for NaN and infinity."""

    non_finite: Annotated[
        Literal["refuse", "keep"],
        Option(
            help="Refuse NaN and infinity, or keep them.",
            section="Number format",
            kind=Choice(NON_FINITE),
            flag="nonfinite",
            missing=RUN,
        ),
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
            help="How much of the output to check for rounding loss.",
            section="Checks",
            kind=Choice(MEASURES),
            missing=RUN,
        ),
    ] = "sample"
    resume: Annotated[
        bool,
        Option(
            help="Keep finished work if the run is stopped; the same command then goes on from there.",
            section="Output",
            kind=Flag(),
            missing=RUN,
        ),
    ] = False
