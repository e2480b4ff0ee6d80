"""The report of a merge and its JSON: the plan before, the outcome after.

The other commands that merge print with it too.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from mergetool.cli import console
from mergetool.cli.report import CommandEvents

if TYPE_CHECKING:
    from mergetool.api.merges import Done
    from mergetool.checkpoint.outputs import Target
    from mergetool.comparison.preflight import Preflight
    from mergetool.engine.movements import Movements
    from mergetool.engine.runs import Outcome
    from mergetool.ops.movement import Movement
    from mergetool.recipe.plan import Plan
    from mergetool.recipe.steps import OutputTensor

WORTH_ADVICE = 0.99  # less of a delta than this came through: say that another rounding keeps it
WORTH_LISTING = 0.02  # more of the moved elements than this left no trace: say in which groups


class MergeReport(CommandEvents):
    """Prints the plan of a merge, and its result."""

    def plan(self, plan: Plan, memory: int) -> None:
        """The plan, of a dry run with every tensor."""
        self.json |= plan_json(plan, memory)
        if self.prints:
            print_plan(plan, memory, every_tensor=self.typed.verbose or self.typed.given.get("dry_run", False))

    def checked(self, checked: Preflight) -> None:
        """The preflight's measurements."""
        self.json |= checked.record()

    def done(self, plan: Plan, result: Done) -> None:
        """The outcome."""
        self.json |= outcome_json(plan, result.outcome, result.target, result.seconds)
        if self.prints:
            print_outcome(plan, result.outcome, result.target, result.seconds, verbose=self.typed.verbose)


def print_plan(plan: Plan, memory: int, *, every_tensor: bool) -> None:
    from mergetool.options.multipliers import setting_text
    from mergetool.quant.weights import is_side_tensor

    family = plan.inputs[0].anatomy.family.name
    dtypes = "/".join(sorted({t.stored_as for t in plan.tensors if t.dtype.blendable and not is_side_tensor(t.name)}))
    count = sum(step.elements for tensor in plan.tensors for step in tensor.steps)
    console.heading(
        "plan",
        f"{family}, {console.plural(len(plan.tensors), 'tensor')}, {console.parameters(count)} parameters, {dtypes}, "
        f"{plan.layout} layout",
    )
    console.heading("", str(plan.expression.graph))
    console.heading("anchor", f"{plan.expression.anchor}: names, dtypes, layout and kept tensors are its")
    if plan.options.settings:
        console.heading("", "set " + ", ".join(map(setting_text, plan.options.settings)))
    if every_tensor:
        for tensor in plan.tensors:
            reasons = dict.fromkeys(step.reason for step in tensor.steps)
            scaled = "".join(f"  {scale}" for scale in _scales(tensor))
            console.heading("", f"{tensor.name}  {list(tensor.shape)} {tensor.stored_as}  {', '.join(reasons)}{scaled}")
    reasons_of = plan.reasons()
    console.heading("", " · ".join(f"{len(names)} {reason}" for reason, names in reasons_of.items()))
    for reason, names in reasons_of.items():
        if reason.startswith("not in ") and not every_tensor:
            console.heading("", f"{reason}: {console.listed(names)}")
    if plan.left_out:
        console.heading(
            "", f"{len(plan.left_out)} left out: " + console.listed([f"{n} ({r})" for n, r in plan.left_out])
        )
    console.heading(
        "",
        f"reads {console.size(plan.bytes_read)}, writes {console.size(plan.header.file_size)}, "
        f"memory {console.size(memory)}, disk {console.size(plan.header.file_size)}",
    )
    for warning in plan.warnings:
        console.heading("note", warning)


def _scales(tensor: OutputTensor) -> list[str]:
    """The multipliers other than 1 in a tensor: "x 0.5", or by part where those of a fused tensor differ."""
    multipliers = {step.part: step.multiplier for step in tensor.steps}
    if len(set(multipliers.values())) > 1:
        return [
            f"{part.removesuffix('.weight').rpartition('.')[2]} x {float(by):.6g}" for part, by in multipliers.items()
        ]
    return [f"x {float(by):.6g}" for by in set(multipliers.values()) if by not in (0, 1)]  # 0 is a reason of its own


def print_outcome(plan: Plan, outcome: Outcome, target: Target, seconds: float, *, verbose: bool) -> None:
    console.heading("done", f"{target}  {console.size(plan.header.file_size)}  {seconds:.1f} s")
    if outcome.resumed:
        console.heading(
            "resumed", f"{console.size(outcome.resumed)} were finished before; the figures below are of the rest"
        )
    if outcome.begun_anew is not None:
        console.heading("note", f"could not resume ({outcome.begun_anew}); started over")
    for counts, reason in (
        (outcome.capped, "beyond the dtype and capped"),
        (outcome.non_finite, "NaN or infinite"),
        (outcome.off_device, "computed by the CPU, since the GPU had no memory left"),
    ):
        if counts:
            names = [f"{name} ({count})" for name, count in sorted(counts.items())]
            console.heading("", f"{sum(counts.values())} elements {reason}: {console.listed(names)}")
    _print_rounding(plan, outcome.movements, verbose=verbose)
    if outcome.search_gain is not None:
        console.heading("", f"scale search: {1 - outcome.search_gain:.1%} less squared error than amax")
    console.heading("next", f"mergetool verify {shlex.quote(str(target.path))}")


def _print_rounding(plan: Plan, movements: Movements, *, verbose: bool) -> None:
    """Print the part of the delta, and of its elements, that the output's dtype let through.

    The groups are listed where one of them lost something that a user could miss.
    """
    from mergetool.engine.jobs import SAMPLED, SAMPLED_PIECES
    from mergetool.quant.weights import is_side_tensor

    floats = [t for t in plan.tensors if t.dtype.blendable and not is_side_tensor(t.name)]
    dtypes = {tensor.stored_as for tensor in floats if tensor.quantiser or tensor.dtype.bits < 32}
    total = movements.total
    if not (dtypes and total.moved):
        return
    to, mode = "/".join(sorted(dtypes)), plan.options.rounding
    if mode == "nearest" and total.projection < WORTH_ADVICE:
        lost = _percent(1 - total.projection)
        console.heading("delta", f"rounding to {to} lost {lost} of the change; --rounding stochastic keeps it")
    else:
        how = "rounding" if mode == "nearest" else f"{mode} rounding"
        console.heading("delta", f"{how} to {to} kept {_percent(total.projection)} of the change")
    groups = {name: m for name, m in (*movements.groups(plan).items(), ("all", total)) if m.moved}
    if verbose or any(map(_lost, groups.values())):
        console.table(
            ["group", "moved", "left no trace", "below half a unit", "kept"],
            [_rounding_row(name, m) for name, m in groups.items()],
        )
    if movements.sampled:
        share = SAMPLED_PIECES if any(tensor.quantiser for tensor in floats) else SAMPLED
        console.heading("", f"one chunk in {share} of large tensors was measured; --measure all looks at every element")


def _lost(movement: Movement) -> bool:
    return movement.projection < WORTH_ADVICE or movement.eaten > WORTH_LISTING * movement.moved


def _rounding_row(name: str, movement: Movement) -> list[str]:
    shares = (movement.eaten / movement.moved, movement.below_half_ulp / movement.moved, movement.projection)
    return [name, console.parameters(movement.moved), *map(_percent, shares)]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def plan_json(plan: Plan, memory: int) -> dict[str, Any]:
    return {
        "expression": str(plan.expression.graph),
        "anchor": plan.expression.anchor,
        "family": plan.inputs[0].anatomy.family.name,
        "layout": plan.layout,
        "inputs": [model.name for model in plan.inputs],
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.header.file_size,
        "memory": memory,
        "actions": {reason: len(names) for reason, names in plan.reasons().items()},
        "tensors": [
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "dtype": tensor.stored_as,
                "steps": [
                    {"part": step.part, "action": step.reason, "multiplier": float(step.multiplier)}
                    for step in tensor.steps
                ],
            }
            for tensor in plan.tensors
        ],
        "left_out": [{"name": name, "reason": reason} for name, reason in plan.left_out],
        "padded": [
            {
                "tensor": padding.tensor,
                "models": list(padding.models),
                "from": list(padding.shape),
                "to": list(padding.to),
                "as_in": list(padding.wider),
                "factor": float(padding.factor),
            }
            for padding in plan.padded
        ],
        "warnings": list(plan.warnings),
        "metadata": dict(plan.header.metadata),
    }


def outcome_json(plan: Plan, outcome: Outcome, target: Target, seconds: float) -> dict[str, Any]:
    movements = outcome.movements
    return {
        "output": str(target.path),
        "seconds": round(seconds, 3),
        "search_gain": outcome.search_gain,
        "capped": dict(sorted(outcome.capped.items())),
        "non_finite": dict(sorted(outcome.non_finite.items())),
        "off_device": dict(sorted(outcome.off_device.items())),
        "resumed": outcome.resumed,
        "begun_anew": outcome.begun_anew,
        "rounding": {
            "mode": plan.options.rounding,
            "seed": plan.options.seed,
            "sampled": movements.sampled,
            "total": movements.total.record(),
            "groups": {name: movement.record() for name, movement in movements.groups(plan).items()},
            "tensors": {name: movement.record() for name, movement in movements.tensors().items()},
        },
    }
