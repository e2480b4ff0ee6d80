"""Make a merge again from the recipe in its metadata, and compare it byte for byte.

Headers, metadata, tensors, and every file of a folder count.

again = replay("out.safetensors", inputs={"tuned": "/models/tuned.safetensors"})
again.same        True when mergetool would write exactly these bytes today
again.reasons     else why not: a changed input, another version, an edited recipe, other tensors
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

from mergetool import models
from mergetool.checkpoint.inputs import Readable
from mergetool.checkpoint.outputs import Target, model_target
from mergetool.checkpoint.planned import first_difference, planned_files, shard_size_of
from mergetool.checkpoint.reader import Checkpoint
from mergetool.checkpoint.shards import SUFFIX, is_index
from mergetool.checkpoint.writer import CheckpointWriter
from mergetool.engine import job, merge
from mergetool.errors import CheckFailed, UsageError
from mergetool.recipe import provenance
from mergetool.verification.weights import Comparer, WeightsReport, reopen


@dataclass
class Replay:
    """The result of a replay.

    ``reasons`` say in words why the bytes are not the same, ``difference`` where the first one is outside the tensors, ``weights`` which
    tensors are others; ``kept`` is where what came out was written.
    """

    weights: WeightsReport
    size: int
    files: int
    reasons: list[str] = field(default_factory=list)
    difference: str = ""
    kept: Target | None = None

    @property
    def expression(self) -> str:
        """The expression that was merged."""
        return self.weights.expression

    @property
    def missing(self) -> list[str]:
        """The recipe's tensors that the file lacks, or has in another shape or dtype."""
        return self.weights.missing

    @property
    def extra(self) -> list[str]:
        """Tensors that only the file has."""
        return self.weights.extra

    @property
    def differing(self) -> dict[str, int]:
        """Tensors of other bytes, each with the first byte that is another."""
        return self.weights.differing

    @property
    def same(self) -> bool:
        """Whether every byte of every file equals its new version."""
        return not (self.reasons or self.difference or self.missing or self.extra or self.differing)

    def require_same(self, output: str) -> None:
        """Raises CheckFailed for a file of other bytes."""
        if not self.same:
            raise CheckFailed(f"{output} differs from the file that its recipe makes now.")


def replay(
    output: str | models.OpenedModel,
    *,
    inputs: Mapping[str, str] = MappingProxyType({}),
    write_to: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Replay:
    """Make the merge that ``output`` records again, and compare every byte. With ``write_to`` keep the new files there.

    ``inputs`` gives recorded names their places, as for `check_weights`. ``progress`` gets bytes moved and bytes to move. Raises
    DataError for a file without a recipe or with a damaged one, InputMissing for an input that is nowhere, and what planning, reading
    and writing raise.
    """
    with ExitStack() as stack:
        again = reopen(output, inputs, stack)
        stored, plan = again.opened.checkpoint, again.plan
        name = again.opened.name
        path = models.resolve(name).path
        single = path.is_file() and not is_index(path.name)
        target = path if single or path.is_dir() else path.parent
        shards = None if single else shard_size_of(_sizes(stored))
        extra = job.config_files(plan)
        planned = planned_files(
            target, plan.header, shard_size=shards, extra_files=extra, stem=job.stem_of(plan), single=single
        )
        result = Replay(again.report(), sum(file.size for file in planned), len(planned))
        result.reasons = provenance.changes(stored.metadata, plan.header.metadata)
        result.difference = first_difference(target, planned)
        result.weights.outside = [*result.reasons, *filter(None, (result.difference,))]
        sinks: list[_Sink] = []
        writer = None
        if write_to is not None:
            result.kept = _place_for(write_to, name, single=single)
            files = [*stored.files, *(file for model in plan.inputs for file in model.checkpoint.files)]
            writer = stack.enter_context(
                CheckpointWriter.stage(
                    result.kept,
                    plan.header,
                    overwrite=overwrite,
                    shard_size=shards,
                    inputs=files,
                    extra_files=extra,
                    stem=job.stem_of(plan),
                )
            )
            sinks.append(writer)
        comparer = Comparer(stored)
        if not (result.missing or result.extra):
            sinks.append(comparer)
        if sinks:
            total, moved = plan.bytes_read + plan.header.data_size, 0

            def advance(count: int) -> None:
                nonlocal moved
                moved += count
                progress(min(moved, total), total)

            outcome = merge.run(plan, _All(sinks), threads=threads, non_finite="keep", measure="off", progress=advance)
            result.weights.non_finite = outcome.non_finite
        if writer is not None:
            writer.commit()
        result.weights.bytes_compared, result.weights.differing = comparer.compared, comparer.differing
        return result


def _place_for(write_to: str | os.PathLike[str], output: str, *, single: bool) -> Target:
    """The place to keep the new file or folder, of the same kind as ``output``.

    Raises UsageError for a name of the other kind.
    """
    kept = model_target(write_to, folder=not single)
    if single == kept.is_folder:
        kind = f"one file; call it NAME{SUFFIX}" if single else f"a folder; leave out {SUFFIX}"
        raise UsageError(f'"{kept.path}" cannot hold {output}, which is {kind}.')
    return kept


class _Sink(Protocol):
    def write(self, name: str, start: int, data: memoryview) -> None: ...


class _All:
    """Gives a merge's bytes to several sinks."""

    def __init__(self, sinks: list[_Sink]) -> None:
        self._sinks = sinks

    def write(self, name: str, start: int, data: memoryview) -> None:
        for sink in self._sinks:
            sink.write(name, start, data)


def _sizes(checkpoint: Checkpoint) -> list[list[int]]:
    """The bytes of every tensor, file by file."""
    groups: dict[Readable, list[int]] = {file: [] for file in checkpoint.files}
    for name, info in checkpoint.tensors.items():
        groups[checkpoint.locate(name)[0]].append(info.nbytes)
    return list(groups.values())
