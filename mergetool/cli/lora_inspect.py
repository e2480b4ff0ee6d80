"""``mergetool lora inspect``: a LoRA file's contents, and who loads it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mergetool.api.lora_checks import LoraInspect, run_lora_inspect
from mergetool.cli import console, loads
from mergetool.cli.parameters import Typed, command
from mergetool.cli.report import CommandEvents

if TYPE_CHECKING:
    from mergetool.adapters.describe import ChangedPart, Contents
    from mergetool.adapters.dora_in_comfyui import Difference
    from mergetool.adapters.loaders import Loading
    from mergetool.adapters.lora_file import LoraFile
    from mergetool.api.lora_checks import LoraContents

EXAMPLES = """\b
Examples:
  mergetool lora inspect style.safetensors
  mergetool lora inspect style.safetensors --plot style.png
  mergetool lora inspect ./peft-folder --json

The page tells for ComfyUI and for five releases of diffusers whether they load all of the LoRA, part of it or none, and why. Norms are those \
of the whole change at strength 1, ||scale * up @ down||.
"""

GROUPS = (
    *("q", "k", "v", "out", "ffn", "adaln", "norm", "embedder", "final", "pad"),
    *("clip_l", "clip_h", "clip_g", "t5", "text_encoder"),
)
"""A part is counted in the first of these that it is in."""


@command(LoraInspect)
def inspect(typed: Typed) -> None:
    """Show what a LoRA holds, and who loads it.

    The page has its spelling, trainer, ranks, alphas, targets and norms, and which programs load it whole.
    """
    with _Contents.shown(typed) as report:
        run_lora_inspect(typed.request(LoraInspect), report)


class _Contents(CommandEvents):
    """The contents of the file."""

    def done(self, plan: LoraFile, result: LoraContents) -> None:
        """All of it."""
        self.json |= _json(plan, result.contents, result.loading, result.in_comfyui)
        if not self.prints:
            return
        _print(plan, result.contents, result.loading, verbose=self.typed.verbose)
        in_comfyui = result.in_comfyui
        if in_comfyui is not None:
            console.heading(
                "dora",
                f"ComfyUI's weights are {100 * in_comfyui.share:.3g} % of the change away from training's in "
                f"{console.plural(in_comfyui.parts, 'part')}; most in {in_comfyui.part}, {100 * in_comfyui.largest:.3g} %",
            )
        if self.typed.given.get("plot") is not None:
            console.heading("plot", str(self.typed.given["plot"]))


def _print(file: LoraFile, contents: Contents, loaded: Sequence[Loading], *, verbose: bool) -> None:
    from mergetool.adapters import unmatched

    size = sum(stored.size for stored in file.checkpoint.files)
    console.heading("lora", f"{file.name}  {console.size(size)}  for {file.family.name}")
    made_for = file.made_for
    if made_for is not None:
        console.heading("for", made_for.told)
    console.heading("keys", file.dialect)
    console.heading("trainer", file.trainer or "it does not say")
    kinds = Counter(target.kind for target in contents.targets) + Counter(
        {f"{kind} that is not read": count for kind, count in file.unread.items()}
    )
    console.heading(
        "changes",
        f"{console.plural(len(contents.targets), 'parameter')} · "
        + ", ".join(f"{n} {kind}" for kind, n in kinds.items()),
    )
    if contents.ranks:
        console.heading("rank", f"{_spread(contents.ranks)}{' (mixed)' if len(set(contents.ranks)) > 1 else ''}")
    console.heading("alpha", _alphas(contents))
    console.heading("dtype", ", ".join(f"{count} {dtype}" for dtype, count in contents.dtypes.items()))
    console.heading("targets", "")
    console.table(["group", "parts", "rank min/med/max", "norm"], _by_group(contents.targets))
    _print_blocks(contents, verbose=verbose)
    loads.print_all(loaded, verbose=verbose)
    encoders = sum("text_encoder" in target.groups for target in contents.targets)
    if encoders and loaded:
        console.heading("", f"{console.plural(encoders, 'parameter')} of text encoders not counted")
    reasons: dict[str, list[str]] = {}
    for key, reason in unmatched.left_aside(file):
        reasons.setdefault(reason, []).append(key)
    for reason, keys in reasons.items():
        console.heading(
            "unread", f"{len(keys)} keys, {reason}: {console.listed(keys, most=len(keys) if verbose else 2)}"
        )
    if contents.non_finite:
        names = console.listed(contents.non_finite, most=1000 if verbose else 4)
        console.heading("damaged", f"{len(contents.non_finite)} tensors hold NaN or infinity: {names}")
    for warning in file.warnings:
        console.heading("warning", warning)


def _print_blocks(contents: Contents, *, verbose: bool) -> None:
    from mergetool.adapters.describe import by_block, total

    console.heading("norms", "Frobenius norm of the change, by block")
    rows = [[block, str(len(held)), f"{total(held):.4g}"] for block, held in by_block(contents.targets)]
    console.table(["block", "parts", "norm"], rows)
    if verbose:
        for target in contents.targets:
            rank = f"rank {target.rank}  " if target.rank is not None else ""
            console.heading("", f"{target.part}  {rank}scale {target.scale:g}  norm {target.norm:.4g}")


def _by_group(targets: tuple[ChangedPart, ...]) -> list[list[str]]:
    from mergetool.adapters.describe import total

    rows = []
    for name in (*GROUPS, "other"):
        held = [target for target in targets if name == next((g for g in GROUPS if g in target.groups), "other")]
        if held:
            ranks = sorted(target.rank for target in held if target.rank is not None)
            rows.append([name, str(len(held)), _spread(ranks) if ranks else "", f"{total(held):.4g}"])
    return rows


def _spread(ranks: list[int]) -> str:
    return f"{ranks[0]} / {ranks[len(ranks) // 2]} / {ranks[-1]}"


def _alphas(contents: Contents) -> str:
    said = sorted((alpha, count) for alpha, count in contents.alphas.items() if alpha is not None)
    shown = [f"{alpha:g} ({count})" for alpha, count in said[:8]] + (["..."] if len(said) > 8 else [])
    if None in contents.alphas:
        shown.append(f"none stated ({contents.alphas[None]}), so a scale of 1")
    return ", ".join(shown) or "of no meaning here"


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _json(
    file: LoraFile, contents: Contents, loaded: Sequence[Loading], in_comfyui: Difference | None
) -> dict[str, Any]:
    from mergetool.adapters.describe import by_block, total

    ranks = contents.ranks
    return {
        "lora": file.name,
        "bytes": sum(stored.size for stored in file.checkpoint.files),
        "family": file.family.name,
        "made_for": None if file.made_for is None else file.made_for.told,
        "dialect": file.dialect,
        "trainer": file.trainer,
        "rank": {"min": ranks[0], "median": ranks[len(ranks) // 2], "max": ranks[-1]} if ranks else None,
        "alphas": [{"alpha": alpha, "modules": count} for alpha, count in contents.alphas.items()],
        "dtypes": contents.dtypes,
        "blocks": {block: _number(total(held)) for block, held in by_block(contents.targets)},
        "targets": [
            {
                "part": target.part,
                "kind": target.kind,
                "shape": list(target.shape),
                "rank": target.rank,
                "scale": target.scale,
                "norm": _number(target.norm),
            }
            for target in contents.targets
        ],
        "loading": loads.as_json(loaded),
        "unmatched": [{"key": key, "reason": reason} for key, reason in file.unmatched],
        "text_encoder": list(file.text_encoder),
        "unread": dict(file.unread),
        "non_finite": list(contents.non_finite),
        "dora_in_comfyui": None if in_comfyui is None else {"parts": in_comfyui.parts, "share": in_comfyui.share},
        "warnings": list(file.warnings),
    }
