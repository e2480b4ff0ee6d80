"""From drawings to readings: models and merges are drawn by mergetool's own sampler, read by the checker, and the readings kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ZImageTransformer2DModel
from numpy.typing import NDArray
from torch import Tensor

import mergetool
from benchmarks import provenance
from mergetool.sampler.parts import Components, WeightedLora
from mergetool.sampler.request import Pictures, Shot, Stage
from mergetool.sampler.studio import Studio
from mergetool.verification import images
from training import batched, checker
from training.claims.drawings import NAIVE, Drawing, Mix, scenes
from training.models import CHANNELS, REDUCTION
from training.recipes import SHIPPED
from training.world import Scene

READER = 1
"""Raised when something else is read of a picture: every drawing is then read again."""

EVALUATION, AROUND = 0.002, 0.02
"""Seconds of one core for one picture through the transformer once, and for its decoding and reading; of the first drawings, later the measured ones' rate."""

MEASURES = tuple(field.name for field in dataclasses.fields(images.Measures))


class _Quicker(Studio):
    """mergetool's sampler, with the blocks of transformers in `training.batched`."""

    def _load(self, stage: Stage) -> ZImageTransformer2DModel:
        made = super()._load(stage)
        if "forward" not in vars(made):
            batched.use(made)
        return made


Readings = dict[str, NDArray[Any]]
"""One value a picture. adherent, figures (the asked ones, each in its colour), relation (those, and where they lie), striped, hollow; the
"colour distance" and "structural distance" from what a drawing is compared with; where verify's measures are asked, those."""


class Bench:
    """The members in a folder, drawn for ``count`` prompts; readings are kept in ``results``, pictures in ``state``."""

    def __init__(self, members: Path, results: Path, state: Path, *, count: int = 200, device: str = "cpu") -> None:
        self.members, self.results, self.state, self.count = members, results, state, count
        self.stored: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
        parts = Components(members / "text_encoder", members / "tokenizer", members / "vae")
        self.studio = Studio(parts, device) if device != "cpu" else _Quicker(parts, device)

    # ---- what is known

    def readings(self, drawing: Drawing) -> Readings | None:
        """What is kept of a drawing; None where it has not been read, or not as it would be today."""
        entry = self.stored.get(drawing.name)
        if entry is None or entry["inputs"] != self._inputs(drawing) or entry["reader"] != READER:
            return None
        return {
            key: np.array([bit == "1" for bit in value]) if isinstance(value, str) else np.array(value)
            for key, value in entry["readings"].items()
        }

    def seconds(self, drawing: Drawing) -> float:
        """An estimate of the time to draw and read it, by what the kept ones took."""
        return self._rate * _guess(drawing, self.count)

    @cached_property
    def _rate(self) -> float:
        known = [entry for entry in self.stored.values() if entry.get("guess")]
        guessed = sum(entry["guess"] for entry in known)
        return sum(entry["seconds"] for entry in known) / guessed if guessed else 1.0

    def _inputs(self, drawing: Drawing) -> str:
        """A digest of all that decides its pictures."""
        names = [*self._within(drawing.mix), *(["turbo"] if drawing.second else [])]
        names += re.findall(r"[a-z]+", drawing.lora[0]) if drawing.lora else []
        shared = [_digest(self.members / part) for part in ("text_encoder", "tokenizer", "vae")]
        what = dataclasses.replace(drawing, measured=False).name
        prompts = [scene.prompt for scene in scenes(drawing.prompts, self.count, drawing.size)]
        everything = json.dumps([what, prompts, self._weights(names), shared])
        return hashlib.sha256(everything.encode()).hexdigest()[:16]

    def _weights(self, names: Sequence[str]) -> list[str]:
        return [_digest(self.members / name / "transformer") for name in sorted(set(names))]

    def _within(self, mix: Mix) -> list[str]:
        """The members that a mix is made of."""
        members = []
        for name in mix.names:
            members += [name] if name in SHIPPED else self._within(NAIVE[name]) if name in NAIVE else []
        return members

    # ---- drawing

    def measure(self, drawing: Drawing) -> None:
        """Draw, read and keep it."""
        began, had = time.process_time(), self._picture_path(drawing).exists()
        made = self.pictures(drawing)
        read: dict[str, Any] = _read(made, scenes(drawing.prompts, self.count, drawing.size))
        if drawing.beside:
            pairs = list(zip(self.pictures(drawing.beside), made, strict=True))
            read["colour distance"] = [round(images.colour_distance(*pair), 3) for pair in pairs]
            read["structural distance"] = [round(images.structural_distance(*pair), 3) for pair in pairs]
        if drawing.measured:
            measured = [images.measure(picture) for picture in made]
            read |= {name: [round(getattr(one, name), 4) for one in measured] for name in MEASURES}
        entry = {
            "inputs": self._inputs(drawing),
            "reader": READER,
            "readings": read,
            "commit": provenance.commit(),
            "machine": provenance.machine(self.members),
            "versions": f"mergetool {mergetool.__version__}, torch {torch.__version__}",
            "device": self.studio.device,
            "date": provenance.now(),
        }
        if not had:
            entry |= {"seconds": round(time.process_time() - began, 1), "guess": round(_guess(drawing, self.count), 1)}
        self.stored[drawing.name] = entry
        self._save()

    def _save(self) -> None:
        staged = self.results.with_name(self.results.name + ".new")
        lines = [f" {json.dumps(name)}: {json.dumps(entry)}" for name, entry in self.stored.items()]
        self.results.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        os.replace(staged, self.results)

    def pictures(self, drawing: Drawing) -> Pictures:
        """Drawn, or as they were drawn before."""
        path = self._picture_path(drawing)
        if not path.exists():
            self._draw(drawing, path)
        with np.load(path) as kept:
            made: Pictures = kept["pictures"]
        return made

    def _picture_path(self, drawing: Drawing) -> Path:
        return self.state / "pictures" / f"{self._inputs(drawing)}.npz"

    def _draw(self, drawing: Drawing, path: Path) -> None:
        generator = np.random.default_rng(5)
        shape = (self.count, drawing.size[1], drawing.size[0], 3)
        latents = None
        if drawing.mix.expression == "white noise":
            made = generator.integers(0, 256, shape).astype(np.uint8)
        elif drawing.mix.expression == "nearly flat":
            made = generator.integers(100, 110, shape).astype(np.uint8)
        else:
            latents = self._latents(drawing)
            made = self.studio.decode(latents)
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_suffix(".new.npz")
        # Only pictures that a second stage may begin from keep their latents: 3 MB a drawing.
        kept = {} if latents is None or drawing.beside or not _begins(drawing) else {"latents": latents.numpy()}
        np.savez_compressed(staged, allow_pickle=False, pictures=made, **kept)
        os.replace(staged, path)

    def _latents(self, drawing: Drawing) -> Tensor:
        shots = [
            Shot(scene.prompt, seed=2 * number)
            for number, scene in enumerate(scenes(drawing.prompts, self.count, drawing.size))
        ]
        if drawing.mix.expression == "noise in the latents":
            side = (drawing.size[1] // REDUCTION, drawing.size[0] // REDUCTION)
            return torch.randn(self.count, CHANNELS, *side, generator=torch.Generator().manual_seed(5))
        if drawing.second:
            assert drawing.beside
            path = self._picture_path(drawing.beside)
            if not path.exists() or "latents" not in np.load(path):
                self._draw(drawing.beside, path)
            with np.load(path) as kept:
                first = torch.from_numpy(kept["latents"])
            second = dataclasses.replace(drawing.refinement, model=self.model(Mix("turbo")))
            return self.studio.second_stage(second, shots, first)
        loras = (WeightedLora(self._lora(drawing.lora[0]), drawing.lora[1]),) if drawing.lora else ()
        way = drawing.way
        model = self.model(drawing.mix)
        stage = Stage(model, way.steps, way.guidance, way.shift, loras, scheduler="diffusers")
        made = self.studio.first_stage(stage, shots, drawing.size)
        if len(drawing.mix.names) > 1 and drawing.mix not in NAIVE.values():
            Path(model).unlink()
        return made

    def model(self, mix: Mix) -> str:
        """Where a member is, or a merge that is written now."""
        if mix.expression in SHIPPED:
            return str(self.members / mix.expression / "transformer")
        path = self._made(repr(mix), self._within(mix))
        if not path.exists():
            places = {name: self.model(NAIVE.get(name, Mix(name))) for name in mix.names}
            expression = re.sub(r"[a-z_]+", lambda name: f'"{places[name[0]]}"', mix.expression)
            protect, keep_from = (["refiner"], places[mix.refiners]) if mix.refiners else ([], None)
            # By force: that parents do not belong together is what is measured here.
            mergetool.merge(
                expression, path, protect=protect, keep_from=keep_from, threads=1, measure="off", force=True
            )
        return str(path)

    def _made(self, what: str, names: Sequence[str]) -> Path:
        """Where a file that is made of members lies: another place for other weights."""
        key = hashlib.sha256(json.dumps([what, *self._weights(names)]).encode()).hexdigest()[:16]
        folder = self.state / "merges"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{key}.safetensors"

    def _lora(self, delta: str) -> Path:
        """The file of a difference LoRA, "variant - base"."""
        variant, base = re.findall(r"[a-z]+", delta)
        path = self._made(f"lora {delta}", [variant, base])
        if not path.exists():
            models = self.model(Mix(base)), self.model(Mix(variant))
            mergetool.diff(*models, path, rank_thresh=0.995, rank_max=0, exclude=["refiner"], threads=1)
        return path


def _begins(drawing: Drawing) -> bool:
    """Whether a second stage may begin from a drawing."""
    return drawing.measured or drawing.prompts != "all" or drawing.mix.expression in SHIPPED


def _guess(drawing: Drawing, count: int) -> float:
    return count * (drawing.evaluations * EVALUATION + AROUND)  # every size has 64 tokens, some of them filled in


def _read(made: Pictures, wanted: Sequence[Scene]) -> dict[str, str]:
    bits: dict[str, list[bool]] = {key: [] for key in ("adherent", "figures", "relation", "striped", "hollow")}
    for picture, scene in zip(made, wanted, strict=True):
        reading = checker.read(picture)
        shown = reading.scene
        figures = shown.figures if shown else ()
        bits["adherent"].append(reading.matches(scene))
        bits["figures"].append(set(figures) == set(scene.figures) and len(figures) == len(scene.figures))
        bits["relation"].append(
            shown is not None and (shown.figures, shown.relation) == (scene.figures, scene.relation)
        )
        bits["striped"].append(reading.striped)
        bits["hollow"].append(reading.hollow)
    return {key: "".join("01"[bit] for bit in values) for key, values in bits.items()}


@cache
def _digest(folder: Path) -> str:
    """Of the files of a part, by their names and bytes."""
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            whole.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return whole.hexdigest()[:16]
