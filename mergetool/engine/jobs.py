"""A plan cut into jobs: chunks that stay in the cache, in output order, by the plan alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from math import lcm
from types import MappingProxyType

from mergetool.engine import quantisation
from mergetool.engine.quantisation import Piece
from mergetool.ops.rounding import NEAREST, ErrorFeedback, Rounding, Stochastic, stream_key
from mergetool.options.merging import MergeOptions
from mergetool.recipe.plan import Plan
from mergetool.recipe.steps import OutputTensor, Step

# 512 Ki elements: 1 MB of bf16 an operand, 2 MB a register. Larger chunks leave the cache, smaller ones pay for calls.
CHUNK = 1 << 19
# Error feedback needs whole rows, and many of them at a time: 6 ns an element of 2048 rows, 46 of 128.
ROWS_CHUNK = 1 << 22
# Of every part one chunk in eight is measured, the first always: without the compiled kernels what the delta did takes as
# long as the merge itself (3 ns an element), and 1 in 8 of 6 G elements is sample enough. For quantised outputs, which are
# encoded and decoded once more (7 ns), one piece in sixteen.
SAMPLED = 8
SAMPLED_PIECES = 16


@dataclass(frozen=True, slots=True)
class Job:
    """Elements ``[start, start + count)`` of one step of one output tensor.

    With a ``phase`` they belong to a quantised tensor and are only collected. What the delta did is measured on ``sampled``
    ones.
    """

    tensor: OutputTensor
    step: Step
    start: int
    count: int
    rounding: Rounding
    phase: int | None = None
    sampled: bool = True

    @property
    def capacity(self) -> int:
        """Elements that the CPU makes room for.

        It does a job larger than `CHUNK` in pieces, unless the job is of whole rows.
        """
        return self.count if self.phase is not None or self.is_of_rows else min(self.count, CHUNK)

    @property
    def is_of_rows(self) -> bool:
        """Whether it must not be cut."""
        if self.step.program is not None and self.step.program.calls:
            return True
        return isinstance(self.rounding, ErrorFeedback) or any(window.encoding for window in self.step.windows)


@dataclass(frozen=True, slots=True)
class Quantise:
    """A piece of a quantised output tensor to be encoded.

    Before that it may have its scale searched for. What the delta did is measured on the ``sampled`` pieces.
    """

    piece: Piece
    rounding: Rounding
    phase: int
    searching: bool
    sampled: bool = True

    @property
    def capacity(self) -> int:
        """Elements to make room for, padding included."""
        return self.piece.stored * quantisation.padded(self.piece.tensor)[1]


@dataclass(frozen=True, slots=True)
class Grain:
    """The cuts of a step: into multiples of ``tile`` elements, of about ``size``."""

    tile: int
    size: int

    @property
    def chunk(self) -> int:
        """Elements of a job."""
        return max(1, self.size // self.tile) * self.tile

    def __or__(self, other: Grain) -> Grain:
        """The grain that suits two steps for the same part."""
        return Grain(lcm(self.tile, other.tile), max(self.size, other.size))


Cuts = Mapping[tuple[str, int], Grain]
"""The grain of steps that begin at an element of an output tensor, where it is not as `grain` would choose."""


def grain(tensor: OutputTensor, step: Step, options: MergeOptions, size: int | None = None) -> Grain:
    """Decide how a step is cut when its plan is alone.

    It is cut into ``size`` elements (`CHUNK` without it), or whole rows where those are needed.
    """
    if step.program is not None and step.program.calls:  # a method sees the whole parameter
        return Grain(max(1, step.elements), 1)
    whole_rows = _has_feedback(tensor, step, options)
    encodings = [window.encoding for window in step.windows if window.encoding]
    rows = _row(tensor, step)
    if rows and (whole_rows or encodings):  # no row is decoded twice, and no tile of rows is cut
        tile = max((encoding.tile_rows * encoding.width for encoding in encodings), default=rows)
        return Grain(tile, ROWS_CHUNK if whole_rows else CHUNK)
    return Grain(1, CHUNK if size is None or tensor.quantiser else size)


def jobs(plan: Plan, size: int | None = None, cuts: Cuts = MappingProxyType({})) -> Iterator[Job | Quantise]:
    """Cut the work into jobs, in output order.

    Each step is in the chunks that ``cuts``, or else `grain`, says.

    A quantised tensor's jobs are in phases, numbered from 0 over the whole plan: none of a phase may begin before the last of the
    phase before it has ended. While one weight is encoded the next one is read: alternately, so that the disk has work meanwhile.
    """
    options, phase = plan.options, 0
    encoding: list[Quantise] = []
    for tensor in plan.tensors:
        if tensor.quantiser is None:
            yield from _chunks(tensor, options, size, cuts)
            continue
        filling = [replace(job, phase=phase) for job in _chunks(tensor, options, size, cuts)]
        yield from _alternately(filling, encoding)
        if options.scale_search:
            phase += 1
            yield from _quantising(tensor, options, phase, searching=True)
        phase += 1
        encoding = list(_quantising(tensor, options, phase, searching=False))
    yield from encoding


def _quantising(tensor: OutputTensor, options: MergeOptions, phase: int, *, searching: bool) -> Iterator[Quantise]:
    height = ROWS_CHUNK if options.rounding == "error-feedback" else CHUNK
    for i, piece in enumerate(quantisation.pieces(tensor, height)):
        yield Quantise(piece, _rounding(piece, options), phase, searching, i % SAMPLED_PIECES == 0)


def _alternately(filling: list[Job], encoding: list[Quantise]) -> Iterator[Job | Quantise]:
    for fill, encode in zip_longest(filling, encoding):
        if fill is not None:
            yield fill
        if encode is not None:
            yield encode


def cut(job: Job) -> Iterator[Job]:
    """Cut a job into chunks for the CPU, where it is larger and can be cut."""
    if job.phase is not None or job.is_of_rows:
        yield job
        return
    for start in range(0, job.count, CHUNK):
        rounding = job.rounding
        if isinstance(rounding, Stochastic):
            rounding = replace(rounding, first=rounding.first + start)
        yield replace(job, start=job.start + start, count=min(CHUNK, job.count - start), rounding=rounding)


def _chunks(tensor: OutputTensor, options: MergeOptions, size: int | None, cuts: Cuts) -> Iterator[Job]:
    for step in tensor.steps:
        chunk = (cuts.get((tensor.name, step.first)) or grain(tensor, step, options, size)).chunk
        for start in range(0, step.elements, chunk):
            sampled = start // chunk % SAMPLED == 0
            yield job_of(tensor, step, options, start, min(chunk, step.elements - start), sampled=sampled)


def job_of(
    tensor: OutputTensor, step: Step, options: MergeOptions, start: int, count: int, *, sampled: bool = False
) -> Job:
    """The job of some elements of a step, which has to be whole pieces of its `grain`."""
    rounding: Rounding = NEAREST
    if options.rounding == "stochastic":
        rounding = Stochastic(stream_key(options.seed, tensor.name), step.first + start)
    elif _has_feedback(tensor, step, options):
        rounding = ErrorFeedback(_row(tensor, step))
    return Job(tensor, step, start, count, rounding, sampled=sampled)


def _has_feedback(tensor: OutputTensor, step: Step, options: MergeOptions) -> bool:
    """Whether rounding errors go along the rows of a stored tensor; a quantised one does that when it is encoded."""
    return options.rounding == "error-feedback" and step.program is not None and tensor.quantiser is None


def _row(tensor: OutputTensor, step: Step) -> int:
    """A row's elements. A part of a fused 1-D tensor is a row of its own: a row never goes on from one part to the next."""
    return min(tensor.shape[-1] if tensor.shape else 1, step.elements)


def _rounding(piece: Piece, options: MergeOptions) -> Rounding:
    """The rounding of a piece's codes: by their place in the stored tensor, padding included."""
    width = quantisation.padded(piece.tensor)[1]
    if options.rounding == "stochastic":
        return Stochastic(stream_key(options.seed, piece.tensor.name), piece.row * width)
    return ErrorFeedback(width) if options.rounding == "error-feedback" else NEAREST
