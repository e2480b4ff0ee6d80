"""Several plans in one pass: their jobs over the same elements side by side, so that every input byte is read once.

A part goes by its canonical name, wherever the plans store it: its chunks are the same in all plans of a pass, and what one plan reads
of an element is fetched once for all. What only one of the plans does is a bundle of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count as counting
from math import lcm

from mergetool.checkpoint.reader import Checkpoint
from mergetool.engine import jobs as cutting
from mergetool.engine import quantising
from mergetool.engine.device import Device
from mergetool.engine.jobs import CHUNK, Grain, Job, Quantise, grain
from mergetool.ops.program import Load, Program
from mergetool.ops.sharing import Shared, share
from mergetool.recipe.plan import Plan
from mergetool.recipe.steps import OutputTensor, Step, Window

MOST_HELD = 1 << 29
"""Elements of quantised weights that the plans of one pass may collect together, 2 GB; six plans of full-size Z-Image."""

Part = tuple[str, int, int]
"""A part's name, its elements, and how many steps of the plan had both before."""


@dataclass(frozen=True, slots=True)
class Operands:
    """What the jobs of a bundle read: each window once, though several may want it.

    ``columns[k]`` are the places of job k's windows among ``windows``. ``shared`` are the programs of the jobs that have one.
    """

    windows: tuple[tuple[Checkpoint, Window], ...]
    columns: tuple[tuple[int, ...], ...]
    shared: Shared

    @classmethod
    def of(cls, steps: Sequence[tuple[Plan, Step]]) -> Operands:
        """Those of the steps of several plans for one part."""
        windows: list[tuple[Checkpoint, Window]] = []
        places: dict[object, int] = {}
        columns = []
        for plan, step in steps:
            column = []
            for window in step.windows:
                checkpoint = plan.inputs[window.input].checkpoint
                # By identity: what is equal as an encoding may still be of other values (see `StackedRows`).
                key = checkpoint, window.tensor, window.start, window.dtype, window.row, id(window.encoding)
                if key not in places:
                    places[key] = len(windows)
                    windows.append((checkpoint, window))
                column.append(places[key])
            columns.append(tuple(column))
        programs = [
            _over(step.program, column)
            for (_, step), column in zip(steps, columns, strict=True)
            if step.program is not None
        ]
        costly = [i for i, (_, w) in enumerate(windows) if w.encoding is not None or w.dtype.bits == 8]
        return cls(tuple(windows), tuple(columns), share(programs, len(windows), costly))

    def program(self, place: int, jobs: Sequence[tuple[int, Job | Quantise]]) -> Program | None:
        """What job ``place`` of a bundle executes."""
        own = [isinstance(job, Job) and job.step.program is not None for _, job in jobs]
        return self.shared.programs[sum(own[:place])] if own[place] else None


@dataclass(frozen=True, slots=True)
class Bundle:
    """Jobs of several plans over the same elements of one part, each with its plan's place in the pass; or one `Quantise`."""

    jobs: tuple[tuple[int, Job | Quantise], ...]
    operands: Operands | None = None

    @property
    def phase(self) -> int | None:
        """The latest phase of its jobs: that of all which have one."""
        return max((job.phase for _, job in self.jobs if job.phase is not None), default=None)

    @property
    def capacity(self) -> int:
        """Elements that the CPU makes room for."""
        if len(self.jobs) == 1:
            return self.jobs[0][1].capacity
        return max(job.count for _, job in self.jobs if isinstance(job, Job))
