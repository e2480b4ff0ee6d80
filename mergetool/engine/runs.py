"""The state that the workers of a run share, and the outcome at its end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from mergetool.adapters.rows import StackedRows
from mergetool.checkpoint.inputs import InputFile
from mergetool.engine.feeding.values import Reader
from mergetool.engine.fidelity import Fidelity
from mergetool.engine.jobs import Job, Quantise
from mergetool.engine.method_calls import Caller
from mergetool.engine.movements import Movements
from mergetool.engine.quantisation import Weights
from mergetool.ops.movement import Movement
from mergetool.quant.encoding import Floats
from mergetool.recipe.plan import Plan

NonFinite = Literal["refuse", "keep"]
Measure = Literal["sample", "all", "off"]
"""The part of a merge in which to measure the movement of the anchor's elements."""


class Sink(Protocol):
    """The destination of a run's bytes.

    It is a CheckpointWriter, or something that compares them with a file's.
    """

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Take the bytes [start, start + len(data)) of tensor ``name``; called from several threads."""


@dataclass
class Outcome:
    """The outcome of a run beyond its output.

    ``capped`` counts, per output tensor, elements that were beyond an FP8 output's range and became its largest
    value; ``non_finite`` counts NaN and infinities that ``non_finite="keep"`` let through; ``off_device`` elements that the GPU
    had no memory for and the CPU computed. ``movements`` is what became of
    the anchor's elements, where they were merged and the run measured. ``search_gain`` is the squared error of the
    scales that were searched for, over that of the scales by amax; ``errors`` is what storing changed in every tensor that was
    rounded, where the run compared. ``resumed`` counts the bytes that an interrupted run had written, of which nothing else here
    speaks; ``begun_anew`` says why what one left could not be used.
    """

    capped: dict[str, int] = field(default_factory=dict)
    non_finite: dict[str, int] = field(default_factory=dict)
    off_device: dict[str, int] = field(default_factory=dict)
    movements: Movements = field(default_factory=Movements)
    search_gain: float | None = None
    errors: dict[str, Fidelity] = field(default_factory=dict)
    resumed: int = 0
    begun_anew: str | None = None


@dataclass
class Run:
    """The state of one plan of a pass that the workers share.

    ``name`` is what errors call its output, where there are several. ``can_keep`` says whether errors may advise to keep NaN: what is
    computed for another command has no such option.
    """

    plan: Plan
    writer: Sink
    reader: Reader
    non_finite: NonFinite
    measure: Measure
    weights: Weights
    caller: Caller
    compared: bool = False
    name: str = ""
    can_keep: bool = True
    outcome: Outcome = field(default_factory=Outcome)
    errors: dict[str, list[Fidelity]] = field(default_factory=dict)
    movements: dict[tuple[str, str], list[Movement]] = field(default_factory=dict)  # of quantised outputs
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def files(self) -> list[InputFile]:
        """Every file of every input."""
        return [file for model in self.plan.inputs for file in model.checkpoint.files]

    @property
    def decodes(self) -> bool:
        """Whether some values are not stored as such."""
        return any(encoding is not None for encoding in self._encodings)

    @property
    def collects(self) -> bool:
        """Whether some weights wait in memory to be quantised."""
        return any(tensor.quantiser for tensor in self.plan.tensors)

    @property
    def multiplies(self) -> bool:
        """Whether some values are products of a LoRA's factors."""
        return any(isinstance(encoding, StackedRows) for encoding in self._encodings)

    @property
    def _encodings(self) -> Iterator[object]:
        return (window.encoding for tensor in self.plan.tensors for step in tensor.steps for window in step.windows)

    def measures(self, job: Job | Quantise) -> bool:
        """Whether this job measures the delta's effect."""
        return self.measure == "all" or (self.measure == "sample" and job.sampled)

    def note(self, counts: dict[str, int], tensor: str, count: int) -> None:
        """Add to one of the outcome's counts."""
        with self.lock:
            counts[tensor] = counts.get(tensor, 0) + count

    def moved(self, tensor: str, part: str, movement: Movement) -> None:
        """Note the movement of some elements of the anchor's ``part`` in a quantised tensor."""
        with self.lock:
            self.movements.setdefault((tensor, part), []).append(movement)

    def compare(self, tensor: str, values: Floats, stored: Floats | None) -> None:
        """Note the error of storing some elements of a tensor."""
        if stored is not None:
            fidelity = Fidelity.of(values, stored)
            with self.lock:
                self.errors.setdefault(tensor, []).append(fidelity)
