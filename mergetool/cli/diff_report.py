"""The report of ``mergetool diff``: pairs before, ranks and files after; and its JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergetool.cli import console, diff_outputs, diff_ranks, loads
from mergetool.cli.report import CommandEvents

if TYPE_CHECKING:
    from mergetool.api.differences import Extracted, Paired
    from mergetool.difference.layer import ExtractedLayer
    from mergetool.difference.pairs import Pair, Pairing
    from mergetool.options.differences import DiffOptions


class DiffReport(CommandEvents):
    """Prints the pairs of a difference, and its result."""

    def plan(self, plan: Paired, memory: int) -> None:
        """The pairs, of a dry run with every name."""
        self.json |= _pairing_json(plan.pairing) | {"memory": memory}
        if self.prints:
            _print_pairing(plan.pairing, verbose=self.typed.verbose or self.typed.given.get("dry_run", False))
            diff_outputs.print_operands(plan.pairing, plan.options)
            moved = console.size(plan.pairing.bytes_to_read(plan.options))
            console.heading("", f"reads {moved}, memory at most {console.size(memory)}")

    def done(self, plan: Paired, result: Extracted) -> None:
        """The ranks, and the files."""
        self.json |= _extracted_json(result, plan.pairing)
        if self.prints:
            _print_extracted(result, plan.pairing, verbose=self.typed.verbose)


def _print_pairing(pairing: Pairing, *, verbose: bool) -> None:
    from mergetool.difference.pairs import UNCHANGED

    reasons: dict[str, list[str]] = {}
    for pair in pairing.pairs:
        reasons.setdefault(_action(pair), []).append(pair.name)
    for name, reason in pairing.left_out:
        reasons.setdefault(reason, []).append(name)
    family = pairing.base.anatomy.family.name
    counts = " · ".join(f"{len(names)} {reason}" for reason, names in reasons.items())
    console.heading("pairs", f"{family}, {len(pairing.pairs) + len(pairing.left_out)} parameters · {counts}")
    for warning in pairing.warnings:
        console.heading("warn", warning)
    if verbose:
        for reason, names in reasons.items():
            for name in names:
                console.heading("", f"{name}  {reason}")
        return
    shown = [f"{name} ({reason})" for name, reason in pairing.left_out if reason != UNCHANGED]
    if shown:
        console.heading("", f"{len(shown)} left out: {console.listed(shown)}")


def _action(pair: Pair) -> str:
    """The treatment of a pair, in words."""
    return f"{pair.reason}, stored whole" if pair.whole else pair.reason or "decomposed"


def _print_extracted(result: Extracted, pairing: Pairing, *, verbose: bool) -> None:
    extraction, options, target = result.extraction, result.options, result.output
    assert extraction is not None
    diff_ranks.print_ranks(extraction, options, target, verbose=verbose)
    diff_outputs.print_shared(extraction.layers, pairing)
    for reason, energies in extraction.skipped.items():
        share = 100 * sum(energies.values()) / extraction.total if extraction.total else 0.0
        names = sorted(energies, key=lambda name: -energies[name])
        # With two variants there is one difference that was looked for, and another whose energy is known.
        unsaid = reason == "unchanged" or pairing.second is not None
        detail = "" if unsaid else f", {share:.2g} % of the difference"
        console.heading(
            "", f"{len(names)} {reason}{detail}: {console.listed(names, most=len(names) if verbose else 2)}"
        )
    for layer in extraction.layers if verbose else ():
        shown = f"rank {layer.rank}  energy {layer.energy:.5f}  residual {layer.residual:.2%}  {layer.method}"
        console.heading("", f"{layer.name}  {shown}")
    console.heading("done", f"{target}  {console.size(target.stat().st_size)}  {result.seconds:.1f} s")
    loads.print_all(result.loading, verbose=verbose)
    diff_outputs.print_whole(extraction, options, verbose=verbose)
    base = pairing.base.name
    diff_outputs.print_checkpoint(options, base)
    console.heading("next", f"load it at strength 1 on {base}; at other strengths it moves part of the way, or past")
    diff_ranks.print_spectra(extraction, options)


def _pairing_json(pairing: Pairing) -> dict[str, Any]:
    return {
        "base": pairing.base.name,
        "variant": pairing.variant.name,
        "family": pairing.base.anatomy.family.name,
        "bytes_read": pairing.bytes_read,
        "pairs": [{"name": pair.name, "action": _action(pair)} for pair in pairing.pairs],
        "left_out": [{"name": name, "reason": reason} for name, reason in pairing.left_out],
        "warnings": list(pairing.warnings),
    }


def _extracted_json(result: Extracted, pairing: Pairing) -> dict[str, Any]:
    extraction, options = result.extraction, result.options
    assert extraction is not None
    return {
        "output": str(result.output),
        "ranks": _ranks_json(options),
        "spectra": None if options.spectra is None else {"file": str(options.spectra), "searched": extraction.searched},
        "bytes_written": result.output.stat().st_size,
        "seconds": round(result.seconds, 3),
        "layers": [_layer_json(layer) for layer in extraction.layers],
        "skipped": [
            {"name": name, "reason": reason, "share": energy / extraction.total if extraction.total else 0.0}
            for reason, names in extraction.skipped.items()
            for name, energy in names.items()
        ],
        "loading": loads.as_json(result.loading),
    } | diff_outputs.whole_json(extraction, options, pairing)


def _ranks_json(options: DiffOptions) -> dict[str, Any]:
    chosen = not (options.rank or options.budget)
    return {
        "rank": options.rank,
        "budget": options.budget_bytes,
        "rule": options.rule if chosen else None,
        "rank_thresh": options.threshold if chosen and options.rule != "knee" else None,
        "rank_max": options.cap,
    }


def _layer_json(layer: ExtractedLayer) -> dict[str, Any]:
    return {
        "name": layer.name,
        "shape": list(layer.shape),
        "rank": layer.rank,
        "energy": layer.energy,
        "residual": layer.residual,
        "capped": layer.capped,
        "rank_wanted": layer.wanted,
        "below_threshold_as_stored": layer.missed,
        "energy_total": layer.total,
        "method": layer.method,
        "common_share": layer.shared,
    }
