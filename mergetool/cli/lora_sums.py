"""``mergetool lora resize``, ``merge``, ``orthogonal``, ``common``: a LoRA made of others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mergetool.api.loras import (
    LoraCommon,
    LoraMerge,
    LoraOrthogonal,
    LoraResize,
    run_lora_common,
    run_lora_merge,
    run_lora_orthogonal,
    run_lora_resize,
)
from mergetool.cli import console, loads
from mergetool.cli.diff_ranks import GROUPS, in_group
from mergetool.cli.parameters import Typed, command
from mergetool.cli.report import CommandEvents

if TYPE_CHECKING:
    from mergetool.api.loras import Summed, SumPlan
    from mergetool.lora.combine import CombinedModule
    from mergetool.lora.gathering import Gathering

EXAMPLES = {
    "resize": """\b
Examples:
  mergetool lora resize style.safetensors -o style-4.safetensors --rank 4
  mergetool lora resize style.safetensors -o style-small.safetensors --rank-thresh 0.99
  mergetool lora resize style.safetensors -o style-cut.safetensors --rule ratio --rank-thresh 0.1
  mergetool lora resize style.safetensors -o style-150.safetensors --budget 150MB

LORA is a file or a PEFT folder in any spelling; LoHa, LoKr and whole differences become LoRAs. --rank-thresh keeps the fewest singular values \
that hold that share of a module's energy, or what --rule says (`mergetool diff --help` has the rules). --budget divides a file's size among \
the modules so that the total error is least. mergetool cuts the weakest part of each module; a module that needs no cut keeps its factors \
bit for bit.
""",
    "merge": """\b
Examples:
  mergetool lora merge style.safetensors:0.8 detail.safetensors:-0.3 -o both.safetensors
  mergetool lora merge style.safetensors detail.safetensors:0.5 -o both-8.safetensors --rank 8
  mergetool lora merge style.safetensors detail.safetensors other.safetensors -o all.safetensors --budget 300MB
  mergetool lora merge style.safetensors:0.8 detail.safetensors --set refiner=0 --set ffn=0.5 -o partly.safetensors

LORA is a file or a PEFT folder in any spelling. A colon and a number set its strength; without them it is 1, and a negative one takes the \
LoRA away. Without a rank, threshold or budget the sum is exact: mergetool puts the factors side by side, so ranks add up, and multiplies \
strengths into the factors or the alphas, whichever rounds less. The residual is what that rounding changed. With a rank, threshold or budget \
it cuts the exact sum. GROUP is a group, a glob or re:REGEX as in `mergetool merge`.
""",
    "orthogonal": """\b
Examples:
  mergetool lora orthogonal style.safetensors detail.safetensors -o style-only.safetensors
  mergetool lora orthogonal style.safetensors detail.safetensors -o style-only-8.safetensors --rank 8

Each module becomes A - c * B with c = <A, B> / <B, B>, sums of products over all elements, so nothing in it points along B. Modules that only \
A changes stay as they are. Without a rank, ranks add up as in `mergetool lora merge`.
""",
    "common": """\b
Examples:
  mergetool lora common style.safetensors other.safetensors -o both-have.safetensors
  mergetool lora common style.safetensors other.safetensors -o shared.safetensors --rank-thresh 0.99

The report names modules that only one of them changes; they have nothing in common. The rank is at most the smaller of the two. \
`mergetool diff --variant2` finds the common part of checkpoints' differences.
""",
}


@command(LoraResize)
def resize(typed: Typed) -> None:
    """Make a LoRA smaller, to a rank, share or size."""
    with SumReport.shown(typed) as report:
        run_lora_resize(typed.request(LoraResize), report)


@command(LoraMerge)
def merge(typed: Typed) -> None:
    """Add LoRAs into one, exactly or at a lower rank."""
    with SumReport.shown(typed) as report:
        run_lora_merge(typed.request(LoraMerge), report)


@command(LoraOrthogonal)
def orthogonal(typed: Typed) -> None:
    """Keep the part of A that is orthogonal to B.

    Each module of A loses its component along the same module of B.
    """
    with SumReport.shown(typed) as report:
        run_lora_orthogonal(typed.request(LoraOrthogonal), report)


@command(LoraCommon)
def common(typed: Typed) -> None:
    """Keep the change that two LoRAs have in common.

    It has the directions that both write to and both read, at the strength that both have.
    """
    with SumReport.shown(typed) as report:
        run_lora_common(typed.request(LoraCommon), report)


class SumReport(CommandEvents):
    """Prints the LoRAs of a sum, and its result."""

    def plan(self, plan: SumPlan, memory: int) -> None:
        """The LoRAs, of a dry run with every module."""
        self.json |= _plan_json(plan) | {"memory": memory}
        if self.prints:
            _print_plan(plan.gathering, verbose=self.typed.verbose or self.typed.given.get("dry_run", False))
            console.heading("", f"memory at most {console.size(memory)}")

    def done(self, plan: SumPlan, result: Summed) -> None:
        """The ranks, and the file."""
        self.json |= _done_json(result)
        if self.prints:
            _print_done(plan.gathering, result, verbose=self.typed.verbose)


def _print_plan(gathering: Gathering, *, verbose: bool) -> None:
    for i, term in enumerate(gathering.terms):
        count = console.plural(len(term.file.changes), "change")
        ranks = sorted({adapter.rank for adapter in term.file.adapters if adapter.rank is not None})
        width = f", rank {_range(ranks)}" if ranks else ""
        kinds = sorted({adapter.kind for adapter in term.file.adapters} - {"lora"})
        other = f", {' and '.join(kinds)}" if kinds else ""
        console.heading(
            "" if i else "read",
            f"{float(term.strength):g} x {term.file.name}: {count}{width}{other}  {term.file.dialect}",
        )
    for warning in gathering.warnings:
        console.heading("note", warning)
    reasons: dict[str, list[str]] = {}
    for name, reason, _ in gathering.left_out:
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        shown = console.listed(names, most=len(names) if verbose else 2)
        console.heading("", f"{len(names)} left out ({reason}): {shown}")
    if verbose:
        for module in gathering.modules:
            addends = " + ".join(
                f"{float(addend.strength):g} x {addend.change.adapter.kind} {addend.change.adapter.rank or ''}".rstrip()
                for addend in module.addends
            )
            console.heading("", f"{module.part}  {list(module.shape)}  {addends}")


def _print_done(gathering: Gathering, result: Summed, *, verbose: bool) -> None:
    done, target = result.combined, result.output
    assert done is not None
    assert target is not None
    rows = []
    for group in (*GROUPS, "other"):
        chosen = [module for module in done.modules if in_group(module.groups) == group]
        if chosen:
            rows.append(_row(group, chosen))
    console.heading("ranks", "")
    console.table(["group", "modules", "rank read", "rank min/med/max", "energy", "residual"], rows)
    if done.capped:
        wanted = max(module.wanted or 0 for module in done.capped)
        capped = [f"{module.name} wants {module.wanted}" for module in done.capped]
        console.heading(
            "",
            f"{len(capped)} stopped by `rank_max`, which would have to be {wanted}: "
            f"{console.listed(capped, most=len(capped) if verbose else 2)}",
        )
    if done.empty:
        names = console.listed(done.empty, most=len(done.empty) if verbose else 2)
        console.heading("", f"{len(done.empty)} not written, nothing of them is left: {names}")
    if verbose:
        for module in done.modules:
            console.heading(
                "",
                f"{module.name}  rank {module.rank}  energy {module.energy:.5f}  residual {module.residual:.2%}  {module.dtype.name}",
            )
    lost = sum(energy for _, _, energy in gathering.left_out if energy is not None)
    kept = sum(module.total for module in done.modules)
    if lost:
        console.heading("", f"{100 * lost / (lost + kept):.2g} % of the energy is left out, which no LoRA can carry")
    console.heading(
        "done",
        f"{target}  {console.size(target.stat().st_size)}  {result.seconds:.1f} s   residual {done.residual:.2%}",
    )
    loads.print_all(result.loading, verbose=verbose)


def _row(group: str, chosen: Sequence[CombinedModule]) -> list[str]:
    ranks = sorted(module.rank for module in chosen)
    widths = sorted(module.width for module in chosen if module.width is not None)
    total = sum(module.total for module in chosen)
    energy = sum(module.energy * module.total for module in chosen) / total if total else 1.0
    residual = (sum(module.residual**2 * module.total for module in chosen) / total) ** 0.5 if total else 0.0
    return [
        group,
        str(len(chosen)),
        _range(widths) if widths else "",
        f"{ranks[0]} / {ranks[len(ranks) // 2]} / {ranks[-1]}",
        f"{energy:.5f}",
        f"{100 * residual:.2f} %",
    ]


def _range(values: Sequence[int]) -> str:
    return str(values[0]) if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


def _plan_json(plan: SumPlan) -> dict[str, Any]:
    gathering = plan.gathering
    return {
        "command": plan.command,
        "family": gathering.family.name,
        "loras": [
            {
                "name": term.file.name,
                "strength": float(term.strength),
                "dialect": term.file.dialect,
                "changes": len(term.file.changes),
                "warnings": list(term.file.warnings),
            }
            for term in gathering.terms
        ],
        "modules": [module.part for module in gathering.modules],
        "left_out": [{"name": name, "reason": reason, "energy": energy} for name, reason, energy in gathering.left_out],
    }


def _done_json(result: Summed) -> dict[str, Any]:
    done, target = result.combined, result.output
    assert done is not None
    assert target is not None
    return {
        "output": str(target),
        "bytes_written": target.stat().st_size,
        "seconds": round(result.seconds, 3),
        "residual": done.residual,
        "modules": [
            {
                "name": module.name,
                "shape": list(module.shape),
                "rank_read": module.width,
                "rank": module.rank,
                "energy": module.energy,
                "residual": module.residual,
                "norm": module.total**0.5,
                "dtype": module.dtype.name,
                "rank_wanted": module.wanted,
            }
            for module in done.modules
        ],
        "empty": done.empty,
        "loading": loads.as_json(result.loading),
    }
