"""The sheets of docs/explanation/lab.md, of pictures that were read for its tables."""

from __future__ import annotations

from pathlib import Path

from mergetool.sampler import sheet
from training.claims import drawings
from training.claims.drawings import DELTAS, Drawing, Mix, scenes
from training.claims.tables import Tables

ROWS = 6


def columns(made: Tables) -> dict[str, dict[str, Drawing]]:
    """What each sheet shows, by label. Raises Unread while the deltas have not been read."""
    best, share = made.alkahest()
    alone = {f"+ {name}": drawings.with_delta("alkahest", {DELTAS[name]: scale}) for name, scale in best.items()}
    together = drawings.with_delta("alkahest", {DELTAS[name]: share * scale for name, scale in best.items()})
    merges = {"1:1": "mean_turbo", "base's refiners": "mean_turbo_base", "turbo's refiners": "mean_turbo_turbo"}
    stages = drawings.stages("two")
    loras = {f"LoRA × {s:g}": drawings.lora("turbo - alkahest", s, drawings.FEW)[0] for s in drawings.LORA_STRENGTHS}
    return {
        "family": {name: Drawing(Mix(name), way) for name, way in drawings.WAYS.items()},
        "bridge": {
            **{label: Drawing(drawings.NAIVE[name]) for label, name in merges.items()},
            "alkahest": Drawing(Mix("alkahest")),
            **alone,
            "+ both": together,
        },
        "two-stages": {
            label.removeprefix("base, ").removesuffix(" (comfyui)"): row
            for label, row in stages.items()
            if "diffusers" not in label
        },
        "lora": loras,
    }


def write(made: Tables, folder: Path) -> None:
    """PNG files in ``folder``; pictures that are no longer in the state folder are drawn again."""
    for name, shown in columns(made).items():
        pictures = [made.bench.pictures(drawing) for drawing in shown.values()]
        first = next(iter(shown.values()))
        prompts = [scene.prompt for scene in scenes(first.prompts, made.bench.count)[:ROWS]]
        rows = list(zip(*(column[:ROWS] for column in pictures), strict=True))
        folder.mkdir(parents=True, exist_ok=True)
        sheet.sheet(rows, list(shown), prompts).save(folder / f"{name}.png", optimize=True)
