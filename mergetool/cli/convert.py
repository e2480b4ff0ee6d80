"""``mergetool convert``: the same model in another dtype, container, layout or split."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergetool.api.merges import Convert, run_convert
from mergetool.cli import console
from mergetool.cli.parameters import Typed, command
from mergetool.cli.report import CommandEvents

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mergetool.api.merges import Done
    from mergetool.checkpoint.outputs import Target
    from mergetool.engine.fidelity import Fidelity
    from mergetool.engine.runs import Outcome
    from mergetool.recipe.plan import Plan

EXAMPLES = """\b
Examples:
  mergetool convert lab.base -o base-fp8.safetensors --quant fp8-scaled
  mergetool convert turbo-nvfp4.safetensors -o turbo-bf16.safetensors
  mergetool convert z_image-Q8_0.gguf -o z_image.safetensors
  mergetool convert alkahest -o alkahest-fp8.safetensors --quant fp8-scaled --scale-search
  mergetool convert merged.safetensors -o folder --layout diffusers --shard-size 5GB
  mergetool convert "alkahest + 20*(tuned - base)" -o out-fp8.safetensors --quant fp8-scaled
  mergetool convert merged.safetensors -o wrapped.safetensors --prefix model.diffusion_model.

convert reads plain floats, every container that --quant writes, ComfyUI's older FP8, FP8 scaled by rows or blocks, FP8 and nvfp4 of Black \
Forest Labs, and GGUF. Without --dtype and --quant, quantised weights become BF16 and all others keep their dtype. The anchor is the model \
itself, of an expression its first model.
"""


@command(Convert)
def convert(typed: Typed) -> None:
    """Change a model's dtype, container or layout.

    The report shows how much precision each group of layers lost.
    """
    with _ConvertReport.shown(typed) as report:
        run_convert(typed.request(Convert), report)


class _ConvertReport(CommandEvents):
    """The report of a conversion: its plan, and its error."""

    def plan(self, plan: Plan, memory: int) -> None:
        """Print the plan."""
        self.json |= _plan_json(plan) | {"memory": memory}
        if self.prints:
            _print_plan(self.typed.given["model"], plan, memory)

    def done(self, plan: Plan, result: Done) -> None:
        """Print the error of each layer."""
        self.json |= _outcome_json(plan, result.outcome, result.target, result.seconds)
        if self.prints:
            _print_outcome(plan, result.outcome, result.target, result.seconds, verbose=self.typed.verbose)


def _print_plan(model: str, plan: Plan, memory: int) -> None:
    kinds: dict[str, int] = {}
    for tensor in plan.tensors:
        if tensor.constant is None:
            kinds[tensor.stored_as] = kinds.get(tensor.stored_as, 0) + 1
    stored = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    console.heading("plan", f"{model}: {plan.layout} layout, {stored}, {console.size(plan.header.file_size)}")
    reads = f"reads {console.size(plan.bytes_read)}, writes {console.size(plan.header.file_size)}"
    console.heading("", f"{reads}, memory {console.size(memory)}, disk {console.size(plan.header.file_size)}")
    if plan.left_out:
        names = console.listed([f"{name} ({reason})" for name, reason in plan.left_out])
        console.heading("", f"{len(plan.left_out)} left out: {names}")
    for warning in plan.warnings:
        console.heading("note", warning)


def _print_outcome(plan: Plan, outcome: Outcome, target: Target, seconds: float, *, verbose: bool) -> None:
    changed = {name: fidelity for name, fidelity in outcome.errors.items() if fidelity.error}
    exact = len(outcome.errors) - len(changed)
    if changed:
        console.heading("error", f"of {console.plural(len(changed), 'tensor')} that rounding changed")
        rows = list(_by_group(plan, changed).items()) if not verbose else list(changed.items())
        console.table(
            ["tensor" if verbose else "group", "relative error", "worst element", "SNR dB"],
            (
                [name, f"{fidelity.relative:.2e}", f"{fidelity.worst:.2e}", f"{fidelity.snr_db:.1f}"]
                for name, fidelity in rows
            ),
        )
        worst = max(changed, key=lambda name: changed[name].relative)
        console.heading("", f"most: {worst}, {changed[worst].relative:.2e}")
    if exact:
        console.heading("", f"{console.plural(exact, 'tensor')} unchanged by rounding")
    if outcome.search_gain is not None:
        console.heading("", f"scale search: {1 - outcome.search_gain:.1%} less squared error than amax")
    for counts, reason in ((outcome.capped, "beyond the dtype and capped"), (outcome.non_finite, "NaN or infinite")):
        if counts:
            names = [f"{name} ({count})" for name, count in sorted(counts.items())]
            console.heading("", f"{sum(counts.values())} elements {reason}: {console.listed(names)}")
    console.heading("done", f"{target}  {console.size(plan.header.file_size)}  {seconds:.1f} s")


def _by_group(plan: Plan, errors: Mapping[str, Fidelity]) -> dict[str, Fidelity]:
    """The errors of each group that has some; groups overlap."""
    from mergetool.engine.fidelity import Fidelity

    anatomy = plan.inputs[0].anatomy
    members: dict[str, list[Fidelity]] = {group: [] for group in anatomy.family.group_names(anatomy)}
    for tensor in plan.tensors:
        parts = [anatomy.parts[step.part] for step in tensor.steps if step.part in anatomy.parts]
        groups = {group for part in parts for group in anatomy.family.groups(part.name, part.shape)}
        for group in groups if tensor.name in errors else ():
            members[group].append(errors[tensor.name])
    return {group: Fidelity.total(fidelities) for group, fidelities in members.items() if fidelities}


def _outcome_json(plan: Plan, outcome: Outcome, target: Target, seconds: float) -> dict[str, Any]:
    return {
        "output": str(target.path),
        "bytes_written": plan.header.file_size,
        "seconds": round(seconds, 3),
        "errors": {
            name: {
                "relative_frobenius": fidelity.relative,
                "worst": fidelity.worst,
                "snr_db": fidelity.snr_db if fidelity.error else None,
            }
            for name, fidelity in outcome.errors.items()
        },
        "search_gain": outcome.search_gain,
        "capped": dict(sorted(outcome.capped.items())),
        "non_finite": dict(sorted(outcome.non_finite.items())),
    }


def _plan_json(plan: Plan) -> dict[str, Any]:
    return {
        "bytes_to_write": plan.header.file_size,
        "layout": plan.layout,
        "prefix": plan.prefix,
        "tensors": {tensor.name: tensor.stored_as for tensor in plan.tensors if tensor.constant is None},
        "left_out": [{"name": name, "reason": reason} for name, reason in plan.left_out],
        "warnings": list(plan.warnings),
    }
