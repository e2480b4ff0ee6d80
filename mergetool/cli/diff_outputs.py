"""Reports of ``mergetool diff``: second variant, whole differences, baked checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergetool.cli import console

if TYPE_CHECKING:
    from mergetool.difference.extract import Extraction
    from mergetool.difference.layer import ExtractedLayer
    from mergetool.difference.pairs import Pairing
    from mergetool.options.differences import DiffOptions


def print_operands(pairing: Pairing, options: DiffOptions) -> None:
    """Print the operands of a difference that has more than two checkpoints."""
    loras = [model.name for model in pairing.variants if model.is_lora]
    if loras:
        console.heading(
            "", f"{' and '.join(loras)}: a LoRA, so that its change to {pairing.base.name} is the difference"
        )
    if pairing.second is None:
        return
    names = " and ".join(model.name for model in pairing.variants)
    if options.union:
        first_weight, second_weight = options.weights
        weighed = "" if options.weights == (1, 1) else f", weighed {first_weight:g} and {second_weight:g}"
        console.heading("", f"the union of {names}: the part they share once, and the part of each alone{weighed}")
    elif options.orthogonal:
        first, second = pairing.variants
        console.heading("", f"the part of {first.name} that is orthogonal to {second.name}, matrix by matrix")
    else:
        console.heading("", f"the change that {names} have in common")


def print_shared(layers: Sequence[ExtractedLayer], pairing: Pairing) -> None:
    """Print how much of each delta both have in common."""
    shares = [layer.shared for layer in layers if layer.shared is not None]
    for i, model in enumerate(pairing.variants if shares else ()):
        percents = sorted(100 * share[i] for share in shares)
        console.heading(
            "common" if i == 0 else "",
            f"{percents[0]:.2g} / {percents[len(percents) // 2]:.2g} / {percents[-1]:.2g} % of a matrix's energy in the difference to {model.name} (min/med/max)",
        )


def print_whole(extraction: Extraction, options: DiffOptions, *, verbose: bool) -> None:
    """Print the second file, and differences that would better be in it."""
    if options.full is not None:
        full = Path(options.full)
        if extraction.whole:
            energy = sum(part.energy for part in extraction.whole)
            names = [part.name for part in sorted(extraction.whole, key=lambda part: -part.energy)]
            console.heading(
                "full",
                f"{full}  {console.size(full.stat().st_size)}  {len(names)} stored whole, {_share(energy, extraction)} of the difference; "
                "for ComfyUI, beside the LoRA",
            )
            console.heading("", console.listed(names, most=len(names) if verbose else 2))
        else:
            console.heading("full", f"nothing to store whole; {full} was not written")
    wide = [layer.name for layer in extraction.layers if wider_than_whole(layer)]
    if wide:
        console.heading(
            "",
            f"{console.plural(len(wide), 'matrix')} would be smaller stored whole than at the rank that is needed: "
            f"{console.listed(wide, most=len(wide) if verbose else 2)}: `full=FILE` `full_layer=PATTERN`",
        )


def print_checkpoint(options: DiffOptions, base: str) -> None:
    """The checkpoint with the stored difference."""
    if options.checkpoint is not None:
        path = Path(options.checkpoint)
        console.heading("", f"{path}  {console.size(path.stat().st_size)}  {base} with it added")


def wider_than_whole(layer: ExtractedLayer) -> bool:
    """Whether factors at a layer's needed rank outnumber its matrix's values."""
    rows, columns = layer.shape
    return max(layer.rank, layer.wanted or 0) * (rows + columns) > rows * columns


def whole_json(extraction: Extraction, options: DiffOptions, pairing: Pairing) -> dict[str, Any]:
    """The second file, the checkpoint and the common part, for ``--json``."""
    return {
        "variant2": None if pairing.second is None else pairing.second.name,
        "full": str(options.full) if options.full is not None and extraction.whole else None,
        "whole": [
            {"name": part.name, "share": part.energy / extraction.total, "residual": part.residual}
            for part in extraction.whole
        ],
        "smaller_whole": [layer.name for layer in extraction.layers if wider_than_whole(layer)],
        "checkpoint": None if options.checkpoint is None else str(options.checkpoint),
    }


def _share(energy: float, extraction: Extraction) -> str:
    return f"{100 * energy / extraction.total if extraction.total else 0:.2g} %"
