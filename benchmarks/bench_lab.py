"""What the embedded family shows about merges and two stages: every table and sheet of docs/explanation/lab.md, from one script.

    python -m benchmarks.bench_lab [--pictures 200] [--only members,adherence,bridge,calibration,lora,handoff]

Tables are written between their markers in docs/explanation/lab.md, sheets to docs/pictures.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.provenance import commit, machine
from mergetool import models
from mergetool.difference.extract import extract, open_diff
from mergetool.engine import job
from mergetool.lab import checker, world
from mergetool.options.differences import DiffOptions
from mergetool.options.merging import MergeOptions
from mergetool.options.sampling import StrengthMeaning
from mergetool.sampler import sheet
from mergetool.sampler.parts import Components, WeightedLora
from mergetool.sampler.request import Pictures, Refinement, Shot, Stage
from mergetool.sampler.studio import Studio
from mergetool.verification import images
from mergetool.verification.looks import EMBEDDED_PROMPTS
from mergetool.verification.pictures import ALLOWED, KEPT_ADHERENCE

DOCS = Path(__file__).parents[1] / "docs"
SIZE = (world.SIZE, world.SIZE)
GUIDANCE = 3.0
STRENGTHS = (0.10, 0.15, 0.25, 0.40, 0.60)
IN_SHEET = 6
DRAWS = 1000
"""Runs of ``verify`` that are drawn from the pictures of a kind."""

Row = Sequence[str]

STRIPED, HOLLOW = "(lab.striped - lab.base)", "(lab.hollow - lab.deturbo)"

NAIVE = "0.5*lab.turbo + 0.5*lab.base"

CARRIED = {
    "+ striped": f"lab.alkahest + 1.25*{STRIPED}",
    "+ hollow": f"lab.alkahest + 2*{HOLLOW}",
    "+ both": f"lab.alkahest + 1.25*{STRIPED} + 0.5*{HOLLOW}",
}
"""Merges that verify should pass, by their labels in a sheet."""

BRIDGED = (
    f"lab.alkahest + 1*{STRIPED}",
    CARRIED["+ striped"],
    f"lab.alkahest + 1.5*{STRIPED}",
    f"lab.alkahest + 1*{HOLLOW}",
    CARRIED["+ hollow"],
    f"lab.alkahest + 2.5*{HOLLOW}",
    CARRIED["+ both"],
    f"lab.alkahest + 1*{STRIPED} + 1.5*{HOLLOW}",
    "lab.alkahest + 2*(lab.hollow - lab.turbo)",
)


class Lab:
    """Pictures of the embedded models and of merges of them, for one set of prompts and seeds."""

    def __init__(self, count: int, folder: Path) -> None:
        self.folder = folder
        chosen = np.random.default_rng(1).integers(len(world.SCENES), size=count)
        self.scenes = [world.SCENES[i] for i in chosen]
        self.shots = [Shot(scene.prompt, seed=2 * number) for number, scene in enumerate(self.scenes)]
        self.studio = Studio(Components.find("lab.base"))
        self._made: dict[Stage, Pictures] = {}

    def fewer(self, count: int) -> Lab:
        """The first ``count`` prompts and seeds, for what takes long."""
        part = copy.copy(self)
        part.scenes, part.shots, part._made = self.scenes[:count], self.shots[:count], {}
        return part

    def latents(self, stage: Stage) -> Tensor:
        return self.studio.first_stage(stage, self.shots, SIZE)

    def pictures(self, stage: Stage) -> Pictures:
        """What a stage draws; several tables look at the same pictures."""
        if stage not in self._made:
            self._made[stage] = self.studio.decode(self.latents(stage))
        return self._made[stage]

    def refined(self, latents: Tensor, strength: float, meaning: StrengthMeaning = "comfyui") -> Tensor:
        return self.studio.second_stage(refinement(strength, meaning), self.shots, latents)

    def merged(self, expression: str, *, protected: bool) -> str:
        """The path of a merge."""
        path = self.folder / f"{zlib.crc32(f'{expression}{protected}'.encode()):08x}.safetensors"
        with job.open_merge(expression, MergeOptions(protect=("refiner",) if protected else ())) as plan:
            job.run_merge(plan, path, overwrite=True)
        return str(path)

    def read(self, made: Pictures) -> list[checker.Reading]:
        return [checker.read(picture) for picture in made]

    def adherence(self, made: Pictures) -> float:
        return share(r.matches(s) for r, s in zip(self.read(made), self.scenes, strict=True))


def many_steps(model: str, shift: float, *, loras: tuple[WeightedLora, ...] = ()) -> Stage:
    return Stage(model, 30, GUIDANCE, shift, loras, scheduler="diffusers")


def few_steps(model: str, shift: float = 3.0, *, loras: tuple[WeightedLora, ...] = ()) -> Stage:
    return Stage(model, 4, 0.0, shift, loras, scheduler="diffusers")


def refinement(strength: float, meaning: StrengthMeaning = "comfyui") -> Refinement:
    return Refinement("lab.turbo", 4, 0.0, 3.0, (), scheduler="diffusers", strength=strength, strength_as=meaning)


def share(found: object) -> float:
    return float(np.mean(list(found)))  # type: ignore[call-overload]


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


# ---- the tables


ORIGINS = {
    "vae": "nothing; it is in every member",
    "base": "nothing, with its text encoder",
    "turbo": "base, with new refiners; four steps of a recorded path for twenty of base's with guidance",
    "deturbo": "turbo, without distillation",
    "striped": "base, on striped grounds",
    "hollow": "turbo, on hollow shapes",
    "alkahest": "the 1:1 merge of base and deturbo, refiners frozen",
}


def members(lab: Lab) -> None:
    """What the training recorded about itself."""
    record = json.loads((models.EMBEDDED / "record.json").read_text())
    rows = [
        [
            name,
            origin,
            f"{record[name]['steps']:,}",
            f"{record[name]['loss'][-1][1]:.3f}",
            f"{record[name]['seconds'] / 60:.0f} min",
        ]
        for name, origin in ORIGINS.items()
    ]
    size = sum(path.stat().st_size for path in models.EMBEDDED.rglob("*") if path.is_file()) / 1e6
    total = sum(record[name]["seconds"] for name in ORIGINS) / 60
    note = f"All folders together: {size:.1f} MB. All training: {total:.0f} minutes on {record['base']['machine']}."
    write_table("members", ["", "trained on from", "steps", "last loss", "time"], rows, lab, note)


def adherence(lab: Lab) -> None:
    """Base, turbo, and the two in a row: adherence, and how far the second stage goes from the first."""
    rows: list[Row] = []
    shown: dict[str, Pictures] = {}
    first = lab.latents(many_steps("lab.base", 6.0))
    base = lab.studio.decode(first)

    def add(name: str, evaluations: str, sigma: str, made: Pictures, reference: Pictures | None) -> None:
        drift = "" if reference is None else f"{np.mean(list(map(images.structural_distance, reference, made))):.3f}"
        colour = "" if reference is None else f"{np.mean(list(map(images.colour_distance, reference, made))):.3f}"
        rows.append([name, evaluations, sigma, percent(lab.adherence(made)), drift, colour])
        shown[name] = made

    add("base, 30 steps", "30 × 2", "1", base, None)
    add("base, 4 steps", "4 × 2", "1", lab.pictures(Stage("lab.base", 4, GUIDANCE, 6.0, scheduler="diffusers")), base)
    add("turbo, 4 steps", "4", "1", lab.pictures(few_steps("lab.turbo")), base)
    for meaning in ("comfyui", "diffusers"):
        for strength in STRENGTHS:
            levels = refinement(strength, meaning).levels()
            made = lab.studio.decode(lab.refined(first, strength, meaning))
            add(
                f"base, then turbo at {strength:.2f} ({meaning})",
                f"30 × 2 + {len(levels) - 1}",
                f"{levels[0]:.3f}",
                made,
                base,
            )
    head = ["pictures of", "evaluations", "start sigma", "adherence", "structural distance", "colour distance"]
    write_table("adherence", head, rows, lab)
    names = ["base, 30 steps", "turbo, 4 steps", *(n for n in shown if "comfyui" in n)]
    labels = ["base, 30 steps", "turbo, 4 steps", *(f"then turbo {s:.2f}" for s in STRENGTHS)]
    write_sheet("two-stages", lab, [shown[name] for name in names], labels)


def merge_stage(lab: Lab, expression: str, *, protected: bool = True) -> Stage:
    return many_steps(lab.merged(expression, protected=protected), 3.0)


def bridge(lab: Lab) -> None:
    """The bridge story: what each fine-tune adds, and what of it arrives."""
    rows: list[Row] = []
    sheets: list[Pictures] = []

    def add(name: str, stage: Stage) -> Pictures:
        made = lab.pictures(stage)
        readings = lab.read(made)
        rows.append(
            [
                name,
                percent(lab.adherence(made)),
                percent(share(r.striped for r in readings)),
                percent(share(r.hollow for r in readings)),
            ]
        )
        return made

    family = [
        add("base, 30 steps", many_steps("lab.base", 6.0)),
        add("turbo, 4 steps without guidance", few_steps("lab.turbo")),
        add("deturbo", many_steps("lab.deturbo", 3.0)),
        add("striped, a fine-tune of base", many_steps("lab.striped", 6.0)),
        add("hollow, a fine-tune of turbo", many_steps("lab.hollow", 3.0)),
    ]
    write_sheet("family", lab, family, ["base", "turbo", "deturbo", "striped", "hollow"])
    sheets.append(add(f"`{NAIVE}`", merge_stage(lab, NAIVE, protected=False)))
    add(f"`{NAIVE}`, refiners of turbo", merge_stage(lab, NAIVE))
    kept = "0.5*lab.base + 0.5*lab.turbo"
    sheets.append(add(f"`{kept}`, refiners of base", merge_stage(lab, kept)))
    sheets.append(add("alkahest", many_steps("lab.alkahest", 3.0)))
    for expression in BRIDGED:
        add(f"`{expression}`", merge_stage(lab, expression))
    sheets += [lab.pictures(merge_stage(lab, expression)) for expression in CARRIED.values()]
    write_table("bridge", ["pictures of", "adherence", "striped", "hollow"], rows, lab)
    write_sheet("bridge", lab, sheets, ["naive 1:1", "refiners kept", "alkahest", *CARRIED])


def calibration(lab: Lab) -> None:
    """How often each measurement says no, for pictures that are right and for pictures that are not."""
    rows: list[Row] = []
    generator = np.random.default_rng(5)
    shape = (len(lab.shots), *SIZE, 3)
    kinds = {
        "right": {
            "base": lab.pictures(many_steps("lab.base", 6.0)),
            "turbo": lab.pictures(few_steps("lab.turbo")),
            "alkahest": lab.pictures(many_steps("lab.alkahest", 3.0)),
            "striped": lab.pictures(many_steps("lab.striped", 6.0)),
            "hollow": lab.pictures(many_steps("lab.hollow", 3.0)),
            **{f"alkahest {name}": lab.pictures(merge_stage(lab, e)) for name, e in CARRIED.items()},
        },
        "wrong": {
            f"`{NAIVE}`": lab.pictures(merge_stage(lab, NAIVE, protected=False)),
            "alkahest + both, tenfold": lab.pictures(merge_stage(lab, f"lab.alkahest + 12.5*{STRIPED} + 5*{HOLLOW}")),
            "noise in the latents": lab.studio.decode(noise_like(lab, generator)),
            "white noise": generator.integers(0, 256, shape).astype(np.uint8),
            "nearly flat": generator.integers(100, 110, shape).astype(np.uint8),
        },
    }
    for kind, sources in kinds.items():
        for name, made in sources.items():
            measures = [images.measure(picture) for picture in made]
            right = [r.matches(s) for r, s in zip(lab.read(made), lab.scenes, strict=True)]
            noise, collapsed = [m.noise for m in measures], [m.collapsed for m in measures]
            runs = rejections(noise, collapsed, right)
            counts = [sum(noise), sum(collapsed), len(right) - sum(right)]
            rows.append([kind, name, str(len(made)), *map(str, counts), percent(runs)])
    head = ["", "pictures of", "number", "noise", "collapsed", "not adherent", f"verify of {EMBEDDED_PROMPTS} says no"]
    write_table("calibration", head, rows, lab)


def noise_like(lab: Lab, generator: np.random.Generator) -> Tensor:
    """Latents of unit variance that no model has seen."""
    side = world.SIZE // lab.studio.reduction
    return torch.from_numpy(generator.standard_normal((len(lab.shots), 16, side, side)).astype(np.float32))


def rejections(noise: Sequence[bool], collapsed: Sequence[bool], right: Sequence[bool]) -> float:
    """How often ``verify`` would say no: over draws of as many pictures as it looks at, against a parent at 100 %."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(DRAWS):
        part = generator.choice(len(noise), EMBEDDED_PROMPTS, replace=False)
        counts = [float(np.mean(np.asarray(kind)[part])) for kind in (noise, collapsed, right)]
        found.append(counts[0] > ALLOWED or counts[1] > ALLOWED or counts[2] < KEPT_ADHERENCE)
    return share(found)


def lora(lab: Lab) -> None:
    """The difference LoRA of turbo against alkahest, at strengths, beside the full difference."""
    path = lab.folder / "turbo-minus-alkahest.safetensors"
    options = DiffOptions(rank_thresh=0.995, rank_max=0, exclude=("refiner",))
    with open_diff("lab.alkahest", "lab.turbo", options) as pairing:
        done = extract(pairing, path, options)
    rows: list[Row] = []
    columns: list[Pictures] = []
    strengths = (0.1, 0.25, 0.5, 0.75, 1.0, 1.25)
    lab = lab.fewer(64)
    for strength in strengths:
        full = lab.merged(f"lab.alkahest + {strength}*(lab.turbo - lab.alkahest)", protected=True)
        row = [f"{strength:g}"]
        for stage in (few_steps, lambda model, **kind: many_steps(model, 3.0, **kind)):
            by_lora = lab.pictures(stage("lab.alkahest", loras=(WeightedLora(path, strength),)))
            by_merge = lab.pictures(stage(full))
            gap = np.median([images.psnr(a, b) for a, b in zip(by_lora, by_merge, strict=True)])
            row += [percent(lab.adherence(by_lora)), percent(lab.adherence(by_merge)), f"{gap:.1f} dB"]
            if stage is few_steps:
                columns.append(by_lora)
        rows.append(row)
    kept = sum(layer.energy * layer.total for layer in done.layers) / sum(layer.total for layer in done.layers)
    off = sum(layer.residual**2 * layer.total for layer in done.layers) / sum(layer.total for layer in done.layers)
    head = ["strength", "4 steps: LoRA", "full", "PSNR", "30 steps: LoRA", "full", "PSNR"]
    note = (
        f"{len(done.layers)} matrices, energy {kept:.4f}, residual of the stored factors {percent(off**0.5)}, "
        f"ranks {min(layer.rank for layer in done.layers)} to {max(layer.rank for layer in done.layers)}, "
        f"{path.stat().st_size / 1e6:.2f} MB."
    )
    write_table("lora", head, rows, lab, note)
    write_sheet("lora", lab, columns, [f"LoRA × {strength:g}" for strength in strengths])


def handoff(lab: Lab) -> None:
    """Latents handed over as they are, and through pixels."""
    first = lab.latents(many_steps("lab.base", 6.0))
    rows: list[Row] = []
    for strength in STRENGTHS:
        direct = lab.studio.decode(lab.refined(first, strength))
        begin = time.perf_counter()
        again = lab.studio.encode(lab.studio.decode(first))
        lost = time.perf_counter() - begin
        begin = time.perf_counter()
        refined = lab.refined(again, strength)
        refining = time.perf_counter() - begin
        through = lab.studio.decode(refined)
        between = np.median([images.psnr(a, b) for a, b in zip(direct, through, strict=True)])
        rows.append(
            [
                f"{strength:.2f}",
                percent(lab.adherence(direct)),
                percent(lab.adherence(through)),
                f"{between:.1f} dB",
                f"{1000 * lost / len(lab.shots):.0f} ms",
                f"{1000 * refining / len(lab.shots):.0f} ms",
            ]
        )
    base = lab.studio.decode(first)
    trip = lab.studio.decode(lab.studio.encode(base))
    loss = np.median([images.psnr(a, b) for a, b in zip(base, trip, strict=True)])
    head = ["strength", "latents", "pixels", "PSNR between", "saved a picture", "second stage a picture"]
    write_table("handoff", head, rows, lab, f"One trip through the VAE and back alone: {loss:.1f} dB.")


# ---- where they go


def write_table(
    name: str, head: Row, rows: Sequence[Row], lab: Lab, note: str = "", *, page: str = "explanation/lab.md"
) -> None:
    """Put a table between its markers in a page of docs, with where and from how many pictures it was measured."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---", *["---:"] * (len(head) - 1)], *rows)]
    source = f"{len(lab.shots)} pictures each · commit {commit()} · {machine(DOCS)} · torch {torch.__version__}"
    text = "\n".join([*lines, "", *([note, ""] if note else []), f"<sub>{source}</sub>", ""])
    path = DOCS / page
    before = path.read_text()
    pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(before):
        raise SystemExit(f"{path} has no place for the table {name}")
    path.write_text(pattern.sub(lambda found: found[1] + text + found[2], before))
    print(f"\n{name}\n" + "\n".join(lines) + (f"\n{note}" if note else ""), flush=True)


def write_sheet(name: str, lab: Lab, columns: Sequence[Pictures], labels: Sequence[str]) -> None:
    rows = [[column[row] for column in columns] for row in range(IN_SHEET)]
    path = DOCS / "pictures" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.sheet(rows, labels, [scene.prompt for scene in lab.scenes[:IN_SHEET]]).save(path, optimize=True)


TABLES: Mapping[str, Callable[[Lab], None]] = {
    "members": members,
    "adherence": adherence,
    "bridge": bridge,
    "calibration": calibration,
    "lora": lora,
    "handoff": handoff,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--only", default=",".join(TABLES))
    options = parser.parse_args(arguments)
    commit()
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(options.pictures, Path(folder))
        for name in options.only.split(","):
            begin = time.monotonic()
            TABLES[name](lab)
            print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
