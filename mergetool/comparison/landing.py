"""The distance of a merge from its anchor, on a sample, before anything is written.

The distance of a result is the norm of its change over the norm of the anchor, both over all of the model's parts. Beside it stands what the expression is made of: how far x lies from y in every x - y. A factor that makes much more of a difference than any
training did leaves what the model has learned, whatever the factor: 171 times a difference of 0.01 % is a small step, 20 times 5 % is none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergetool.comparison.energies import percent
from mergetool.comparison.finding import Finding
from mergetool.comparison.samples import Samples, middle_rows, most_of
from mergetool.ops.program import Add, Apply, Load, Program, Scale, Subtract
from mergetool.quant.encoding import Floats
from mergetool.recipe.plan import Plan
from mergetool.recipe.steps import MERGED, Step, window_of

FAR = 0.25
"""A result farther than this from its anchor is warned of. Of the embedded family a merge that moved 23 % kept 76 % of the prompts, one of 26 % none
(4 x striped), one of 30 % still 86 % (2 x hollow), and one of 233 % none; no fine-tune moved its base by more than 17 % (docs/explanation/lab.md)."""
REFUSED = 3.0
"""A result farther than this is refused: at three times the anchor's norm nothing of the anchor decides any more."""
LEAST = 1e-3
"""The least share of elements that change in float32; with fewer the merge is as good as a copy."""


@dataclass(frozen=True, slots=True)
class Landing:
    """A merge's distance from its anchor, as the sample measures it.

    ``distance`` is a share of the anchor's norm; the share of elements that change at all is counted in float32. ``differences`` are the
    distances of x from y for every x - y of the expression. ``unmeasured`` counts parts that merge methods make, which need whole
    parameters.
    """

    anchor: str
    distance: float
    changed: float
    elements: int
    differences: tuple[tuple[str, str, float], ...]
    unmeasured: int = 0

    def findings(self) -> Iterator[Finding]:
        """The distance in words: a note, a warning beyond `FAR`, an error beyond `REFUSED`."""
        if not self.elements:
            return
        apart = "".join(f"; {x} is {percent(share)} from {y}" for x, y, share in self.differences)
        moves = f"moves {self.anchor} by {percent(self.distance)}{apart}"
        if not self.distance < REFUSED:
            yield Finding(
                "error",
                f"{moves}: more than {percent(REFUSED)} leaves nothing of {self.anchor} but its names; lower the factors",
            )
        elif self.distance > FAR:
            yield Finding(
                "warn",
                f"{moves}: more than {percent(FAR)}, pictures may turn to noise; lower the factors, or look first with mergetool sample",
            )
        elif self.changed < LEAST:
            count = round(self.changed * self.elements)
            yield Finding(
                "warn",
                f"{moves}: {count} of {self.elements} sampled elements change in float32, so the output is as good as a copy of {self.anchor}; "
                "raise the factors",
            )
        else:
            yield Finding("note", moves)

    def record(self) -> dict[str, Any]:
        """The figures for JSON; a distance beyond float32 is null."""
        return {
            "anchor": self.anchor,
            "distance": self.distance if math.isfinite(self.distance) else None,
            "changed": self.changed,
            "differences": [{"model": x, "base": y, "distance": share} for x, y, share in self.differences],
        }


def measure(plan: Plan, samples: Samples, differences: tuple[tuple[str, str, float], ...] = ()) -> Landing:
    """Measure where ``plan`` lands, from the ``samples`` of its inputs. Raises what reading raises."""
    moved = norm = 0.0
    changed = elements = unmeasured = 0
    parts, most = plan.inputs[0].anatomy.own, most_of(plan.inputs[0])
    for step in (step for tensor in plan.tensors for step in tensor.steps if step.elements and step.part in parts):
        if step.program is not None and step.program.calls:
            unmeasured += 1
            continue
        start, count = middle_rows(step.elements, parts[step.part].shape[-1] if parts[step.part].shape else 1, most)
        if not count or not parts[step.part].dtype.blendable:
            continue
        with np.errstate(over="ignore", invalid="ignore"):
            base, result = _sampled(plan, step, samples, start, count)
            delta = result.astype(np.float64) - base
        scale = step.elements / count
        moved += scale * float(np.square(delta).sum())
        norm += scale * float(np.square(base.astype(np.float64)).sum())
        if step.reason == MERGED:
            changed += int(np.count_nonzero(delta))
            elements += count
    distance = math.sqrt(moved / norm) if norm and math.isfinite(moved) else math.inf if moved else 0.0
    return Landing(plan.expression.anchor, distance, changed / max(1, elements), elements, differences, unmeasured)


def _sampled(plan: Plan, step: Step, samples: Samples, start: int, count: int) -> tuple[Floats, Floats]:
    """The anchor's elements and the result's, before rounding; equal ones where a part of another shape is kept."""
    anchor, part = plan.inputs[0], plan.inputs[0].anatomy.parts[step.part]
    operands = [samples.values(window, start, count) for window in step.windows]
    result = _run(step.program, operands) if step.program is not None else operands[0]
    if step.base is not None:
        return operands[step.base], result
    return (samples.values(window_of(0, anchor, part), start, count) if step.windows[0].input else result), result


def _run(program: Program, operands: list[Floats]) -> Floats:
    registers: dict[int, Floats] = {}
    for each in program.instructions:
        match each:
            case Load():
                registers[each.register] = operands[each.model]
            case Scale():
                registers[each.register] = registers[each.register] * np.float32(each.factor)
            case Add():
                registers[each.register] = registers[each.register] + registers[each.other]
            case Subtract():
                registers[each.register] = registers[each.register] - registers[each.other]
            case Apply():
                raise ValueError("a merge method needs whole parameters")
    return registers[0]
