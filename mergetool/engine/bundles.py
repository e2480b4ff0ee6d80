"""Run the jobs of several plans side by side, so that every input byte is read once.

A part goes by its canonical name, wherever the plans store it: its chunks are the same in all plans of a pass, and what several
plans read of it is fetched once for all. What only one of the plans does is a bundle of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mergetool.checkpoint.reader import Checkpoint
from mergetool.engine import quantisation
from mergetool.engine.device import CPU, Device
from mergetool.engine.jobs import Cuts, Grain, Job, Quantise, cut, grain, jobs
from mergetool.ops.common import Shared, share
from mergetool.ops.program import Load, Program
from mergetool.recipe.plan import Plan
from mergetool.recipe.steps import Step, Window

MOST_HELD = 1 << 29
"""Elements of quantised weights that the plans of one pass may collect, 2 GB: six outputs of full-size Z-Image."""

StepKey = tuple[str, int, int]
"""The key of a step in several plans: its part, its elements, and the number of such steps before it."""


@dataclass(frozen=True, slots=True)
class Operands:
    """The windows that a bundle's jobs read, each once.

    ``columns[k]`` are the places of job k's windows among ``windows``, ``programs[k]`` what it executes, None for a copy; operands
    beyond the windows are the results of ``common``.
    """

    windows: tuple[tuple[Checkpoint, Window], ...]
    columns: tuple[tuple[int, ...], ...]
    programs: tuple[Program | None, ...]
    common: tuple[Program, ...] = ()

    @classmethod
    def of(cls, steps: Sequence[tuple[Plan, Step]]) -> Operands:
        """The windows that the steps for one part read, in one plan or several."""
        windows: list[tuple[Checkpoint, Window]] = []
        places: dict[object, int] = {}
        columns = []
        for plan, step in steps:
            column = []
            for window in step.windows:
                checkpoint = plan.inputs[window.input].checkpoint
                # An encoding by identity: equal ones may still be of other values (see `StackedRows`).
                key = checkpoint, window.tensor, window.start, window.dtype, window.row, id(window.encoding)
                if key not in places:
                    places[key] = len(windows)
                    windows.append((checkpoint, window))
                column.append(places[key])
            columns.append(tuple(column))
        programs = [
            _reading(step.program, column) for (_, step), column in zip(steps, columns, strict=True) if step.program
        ]
        costly = [i for i, (_, w) in enumerate(windows) if w.encoding is not None or w.dtype.bits == 8]
        shared = share(programs, len(windows), costly) if len(programs) > 1 else Shared((), tuple(programs))
        shared_programs = iter(shared.programs)
        whole = tuple(next(shared_programs) if step.program else None for _, step in steps)
        return cls(tuple(windows), tuple(columns), whole, shared.common)

    @property
    def registers(self) -> int:
        """The most registers that its programs need."""
        return Shared(self.common, tuple(program for program in self.programs if program)).registers


@dataclass(frozen=True, slots=True)
class Bundle:
    """A group of jobs of several plans over the same elements of one part.

    Each has its plan's place in the pass.
    """

    jobs: tuple[tuple[int, Job], ...]
    operands: Operands

    @property
    def phase(self) -> int | None:
        """The phase of its jobs, None where none has one."""
        return next((job.phase for _, job in self.jobs if job.phase is not None), None)

    @property
    def capacity(self) -> int:
        """Elements that the CPU makes room for."""
        if len(self.jobs) == 1:
            return self.jobs[0][1].capacity
        return self.jobs[0][1].count


@dataclass(frozen=True, slots=True)
class EncodeJob:
    """A piece of a quantised weight to be encoded for one plan.

    A scale may be searched for it first. The plan is one of the pass.
    """

    run: int
    job: Quantise

    @property
    def jobs(self) -> tuple[tuple[int, Quantise]]:
        """The plan's place in the pass, and the job."""
        return ((self.run, self.job),)

    @property
    def phase(self) -> int:
        """Its phase."""
        return self.job.phase

    @property
    def capacity(self) -> int:
        """Elements that the CPU makes room for."""
        return self.job.capacity


Work = Bundle | EncodeJob


def passes(plans: Sequence[Plan], device: Device = CPU) -> list[list[int]]:
    """Put the plans into passes, by their places: into one, where that works.

    Plans with quantised outputs share a pass when they quantise the same weights in the same order, and together hold at most
    `MOST_HELD` elements of them. A GPU runs one plan at a time.
    """
    if device.is_gpu:
        return [[number] for number in range(len(plans))]
    sharing: list[tuple[object, int, list[int]]] = []  # what they quantise, elements held, the plans
    plain = []
    for number, plan in enumerate(plans):
        tensors = [tensor for tensor in plan.tensors if tensor.quantiser]
        if not tensors:
            plain.append(number)
            continue
        shape, held = _quantised_shape(plan), sum(quantisation.capacities(tensors))
        place = next((i for i, (s, h, _) in enumerate(sharing) if s == shape and h + held <= MOST_HELD), len(sharing))
        before: tuple[object, int, list[int]] = sharing.pop(place) if place < len(sharing) else (shape, 0, [])
        sharing.insert(place, (shape, before[1] + held, [*before[2], number]))
    together = [members for _, _, members in sharing]
    if plain:
        together[:1] = [sorted([*plain, *(together[0] if together else [])])]
    return together


def bundles(plans: Sequence[Plan], size: int | None = None) -> list[Work]:
    """Gather the work of one pass, in the order of its leading plan.

    That is the first plan with quantised outputs, or else the first one.

    ``size`` is as for `grain`. The plans must be those of one of `passes`, so that the phases of all are the same.
    """
    places = [_places(plan) for plan in plans]
    cuts = _common_cuts(plans, places, size)
    sequences = [list(jobs(plan, size, cut)) for plan, cut in zip(plans, cuts, strict=True)]
    encodings = [[job for job in sequence if isinstance(job, Quantise)] for sequence in sequences]
    waiting = [
        {(place[job.tensor.name, job.step.first], job.start): job for job in sequence if isinstance(job, Job)}
        for place, sequence in zip(places, sequences, strict=True)
    ]
    operands: dict[tuple[StepKey, tuple[int, ...]], Operands] = {}
    work: list[Work] = []
    leader = next((number for number, sequence in enumerate(encodings) if sequence), 0)
    for number in sorted(range(len(plans)), key=lambda number: number != leader):
        encoded = 0
        for job in sequences[number]:
            if isinstance(job, Quantise):
                if number == leader:
                    work += [
                        EncodeJob(other, sequence[encoded]) for other, sequence in enumerate(encodings) if sequence
                    ]
                    encoded += 1
                continue
            key = places[number][job.tensor.name, job.step.first], job.start
            together = tuple((other, jobs_at.pop(key)) for other, jobs_at in enumerate(waiting) if key in jobs_at)
            if together:
                members = tuple(other for other, _ in together)
                if (key[0], members) not in operands:
                    operands[key[0], members] = Operands.of([(plans[other], job.step) for other, job in together])
                work.append(Bundle(together, operands[key[0], members]))
    return work


def pieces(work: Work) -> Iterator[Work]:
    """Cut work into chunks for the CPU, where one job is larger and can be cut."""
    if isinstance(work, EncodeJob) or len(work.jobs) > 1:
        yield work
        return
    ((number, job),) = work.jobs
    for part in cut(job):
        yield Bundle(((number, part),), work.operands)


def bytes_read(plans: Sequence[Plan]) -> int:
    """Count the tensor bytes that one pass reads, shared ones once."""
    operands: dict[int, tuple[Operands, int]] = {}
    for unit in bundles(plans):
        if isinstance(unit, Bundle):
            operands[id(unit.operands)] = unit.operands, unit.jobs[0][1].step.elements
    return sum(window.nbytes(elements) for used, elements in operands.values() for _, window in used.windows)


def _places(plan: Plan) -> dict[tuple[str, int], StepKey]:
    """Steps by output tensor and first element, where other plans have the same."""
    seen: Counter[tuple[str, int]] = Counter()
    keys = {}
    for tensor in plan.tensors:
        for step in tensor.steps:
            key = step.part, step.elements
            keys[tensor.name, step.first] = (*key, seen[key])
            seen[key] += 1
    return keys


def _common_cuts(
    plans: Sequence[Plan], places: Sequence[dict[tuple[str, int], StepKey]], size: int | None
) -> list[Cuts]:
    """The cuts of each plan's steps, the same in all plans for the same part."""
    common: dict[StepKey, Grain] = {}
    for plan, place in zip(plans, places, strict=True):
        for tensor in plan.tensors:
            for step in tensor.steps:
                own, key = grain(tensor, step, plan.options, size), place[tensor.name, step.first]
                common[key] = common[key] | own if key in common else own
    return [{step: common[key] for step, key in place.items()} for place in places]


def _quantised_shape(plan: Plan) -> object:
    """The traits of a plan that decide its phases and their work."""
    places = _places(plan)
    tensors = tuple(
        (tensor.shape, quantisation.padded(tensor), tuple(places[tensor.name, step.first] for step in tensor.steps))
        for tensor in plan.tensors
        if tensor.quantiser
    )
    return plan.options.scale_search, plan.options.rounding == "error-feedback", tensors


def _reading(program: Program, column: Sequence[int]) -> Program:
    """A program with the windows that its loads mean by their place in ``column``."""
    return Program(
        tuple(
            replace(step, model=column[step.model]) if isinstance(step, Load) else step for step in program.instructions
        )
    )
