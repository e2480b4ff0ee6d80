"""What ``mergetool diff`` says of a second variant, of the file of whole differences, and of the checkpoint it bakes."""

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
    """What is taken the difference of, where it is more than two checkpoints."""
    loras = [model.name for model in pairing.variants if model.is_lora]
    if loras:
        console.heading(
            "", f"{' and '.join(loras)}: a LoRA, so that its change to {pairing.base.name} is the difference"
        )
    if pairing.second is None:
        return
    names = " and ".join(model.name for model in pairing.variants)
    if options.union:
        one, two = options.weights
        weighed = "" if options.weights == (1, 1) else f", weighed {one:g} and {two:g}"
        console.heading("", f"the union of {names}: what they have in common once, and what each has alone{weighed}")
    elif options.orthogonal:
        first, second = pairing.variants
        console.heading("", f"what is orthogonal to {second.name} of {first.name}, in every matrix by itself")
    else:
        console.heading("", f"what {names} have in common")


def print_shared(layers: Sequence[ExtractedLayer], pairing: Pairing) -> None:
    """How much of each delta is common to both."""
    shares = [layer.shared for layer in layers if layer.shared is not None]
    for i, model in enumerate(pairing.variants if shares else ()):
        found = sorted(100 * share[i] for share in shares)
        console.heading(
            "common" if i == 0 else "",
            f"{found[0]:.2g} / {found[len(found) // 2]:.2g} / {found[-1]:.2g} % of a matrix's energy in the difference to {model.name} (min/med/max)",
        )


def print_whole(found: Extraction, options: DiffOptions, *, verbose: bool) -> None:
    """The second file, and what would better be in it."""
    if options.full is not None:
        full = Path(options.full)
        if found.whole:
            energy = sum(one.energy for one in found.whole)
            names = [one.name for one in sorted(found.whole, key=lambda one: -one.energy)]
            console.heading(
                "full",
                f"{full}  {console.size(full.stat().st_size)}  {len(names)} stored whole, {_share(energy, found)} of the difference; "
                "for ComfyUI, beside the LoRA",
            )
            console.heading("", console.listed(names, most=len(names) if verbose else 2))
        else:
            console.heading("full", f"nothing to store whole; {full} was not written")
    wide = [layer.name for layer in found.layers if wider_than_whole(layer)]
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
    """Whether factors of the rank that a layer has, or would need, have more values than its matrix."""
    rows, columns = layer.shape
    return max(layer.rank, layer.wanted or 0) * (rows + columns) > rows * columns


def whole_json(found: Extraction, options: DiffOptions, pairing: Pairing) -> dict[str, Any]:
    """The second file, the checkpoint and what is common, for ``--json``."""
    return {
        "variant2": None if pairing.second is None else pairing.second.name,
        "full": str(options.full) if options.full is not None and found.whole else None,
        "whole": [
            {"name": one.name, "share": one.energy / found.total, "residual": one.residual} for one in found.whole
        ],
        "smaller_whole": [layer.name for layer in found.layers if wider_than_whole(layer)],
        "checkpoint": None if options.checkpoint is None else str(options.checkpoint),
    }


def _share(energy: float, found: Extraction) -> str:
    return f"{100 * energy / found.total if found.total else 0:.2g} %"
