"""What is drawn for every claim of PLAN.md, "What is measured afterwards". A drawing is a plain value: model, settings, prompts and size."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from mergetool.options.sampling import StrengthMeaning
from mergetool.sampler.request import Refinement
from training.recipes import RECIPES, SHIPPED
from training.world import SIZES, Scene

Prompts = Literal["all", "one", "two", "held out"]

MULTIPLIERS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
STRENGTHS = (0.10, 0.15, 0.25, 0.40, 0.60)
LORA_STRENGTHS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.25)
SHARES = (0.5, 0.75, 1.0)
"""Of the best multiplier of each delta alone, where both are added."""

CHECKED = 0.15
"""Strength of verify's second stage."""

SEED = 21
"""Of the prompts, which are others than those of the gates; the noise of picture n has the seed 2 n."""

DELTAS = {"striped": "striped - base", "hollow": "hollow - deturbo"}
PARENTS = {"striped": ("base",), "hollow": ("turbo", "deturbo")}
"""Carriers that a delta's fine-tune came from: with them at multiplier 1 it is that fine-tune, or next to it."""

WRONG = {"hollow - turbo": "hollow", "hollow - base": "hollow", "striped - deturbo": "striped"}
LORAS = ("turbo - alkahest", "base - alkahest")
STAGE_PROMPTS: tuple[Prompts, ...] = ("one", "two", "held out")
MADE = ("noise in the latents", "white noise", "nearly flat")
"""Pictures that no model draws."""


@dataclass(frozen=True, slots=True)
class Way:
    """How a model is sampled."""

    steps: int
    guidance: float
    shift: float


MANY, FEW = Way(30, 3.0, 3.0), Way(4, 0.0, 3.0)
WAYS = {name: Way(*RECIPES[name].drawn_with, RECIPES[name].shift) for name in SHIPPED}
"""Of the members; a merge is drawn by its first model's, and one of two members by MANY."""


@dataclass(frozen=True, slots=True)
class Mix:
    """A member by its name, or a merge of members and other mixes, with the refiners of the one named ``refiners``, "" for merged ones."""

    expression: str
    refiners: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The members and mixes that it is made of."""
        return tuple(dict.fromkeys(re.findall(r"[a-z_]+", self.expression)))

    @property
    def label(self) -> str:
        """For people."""
        shown = re.sub(r"[a-z_]+", lambda name: LABELS.get(name[0], name[0]), self.expression)
        kept = self.refiners and not self.expression.startswith(self.refiners)  # a carrier's own go without saying
        return f"`{shown}`{f', refiners of {self.refiners}' if kept else ''}"


NAIVE = {
    f"mean_{other}{f'_{kept}' if kept else ''}": Mix(f"0.5*base + 0.5*{other}", kept)
    for other in ("turbo", "deturbo")
    for kept in ("", "base", other)
}
LABELS = {
    name: f"({mix.expression}{f', refiners of {mix.refiners}' if mix.refiners else ''})" for name, mix in NAIVE.items()
}
CARRIERS = {name: Mix(name) for name in ("alkahest", "base", "turbo", "deturbo")} | NAIVE


@dataclass(frozen=True, slots=True)
class Drawing:
    """One picture of each prompt by one model.

    ``lora`` is a difference LoRA and its strength, ``second`` the strength of turbo's second stage, and what it means. ``measured`` asks
    for what verify measures of every picture too.
    """

    mix: Mix
    way: Way = MANY
    prompts: Prompts = "all"
    size: tuple[int, int] = SIZES[0]
    lora: tuple[str, float] | None = None
    second: tuple[float, StrengthMeaning] | None = None
    measured: bool = False

    @property
    def name(self) -> str:
        """What its readings are kept under: every field that is not the usual one."""
        usual = {field.name: field.default for field in dataclasses.fields(self)}
        said = {key: value for key, value in dataclasses.asdict(self).items() if key not in ("mix", "way")}
        parts = [f"{key} {value}" for key, value in said.items() if value != usual[key]]
        kept = [f"refiners of {self.mix.refiners}"] if self.mix.refiners else []
        way = [f"{self.way.steps} steps, guidance {self.way.guidance:g}, shift {self.way.shift:g}"]
        return "; ".join([self.mix.expression, *kept, *way, *parts])

    @property
    def beside(self) -> Drawing | None:
        """The drawing that its pictures are compared with: what a second stage began from, what a LoRA stands for."""
        if self.second:
            return dataclasses.replace(self, second=None)
        if self.lora:
            return lora(*self.lora, self.way)[1]
        return None

    @property
    def refinement(self) -> Refinement:
        """Its second stage, of a model that is still to be named."""
        assert self.second is not None
        return Refinement("", FEW.steps, 0.0, FEW.shift, (), "euler", "diffusers", *self.second)

    @property
    def evaluations(self) -> int:
        """How often the transformer is asked for one picture, beyond what ``beside`` has drawn."""
        if self.mix.expression in MADE:
            return 0
        if self.second:
            return self.refinement.evaluations
        return self.way.steps * (2 if self.way.guidance else 1)


@cache
def scenes(prompts: Prompts, count: int, size: tuple[int, int] = SIZES[0]) -> tuple[Scene, ...]:
    """The scenes of a kind; "all" are a quarter of one figure, a quarter of held-out pairs, half of other pairs, in every four."""
    generator = np.random.default_rng(SEED)
    cycle = {"one": (0,), "two": (1,), "held out": (3,), "all": (0, 1, 2, 3)}[prompts]
    chosen: list[Scene] = []
    while len(chosen) < count:
        kind = cycle[len(chosen) % len(cycle)]
        scene = Scene.random(generator, size, held_out=kind == 3)
        if (scene.relation is None) == (kind == 0):
            chosen.append(scene)
    return tuple(chosen)


def carried(carrier: str, scales: Mapping[str, float]) -> Mix:
    """A carrier with deltas at multipliers, its refiners kept."""
    deltas = "".join(f" + {scale:g}*({delta})" for delta, scale in scales.items())
    return Mix(f"{carrier}{deltas}", carrier)


def with_delta(carrier: str, scales: Mapping[str, float]) -> Drawing:
    """The same as a drawing, by the carrier's own way."""
    return Drawing(carried(carrier, scales), WAYS.get(carrier, MANY))


def curve(carrier: str, delta: str) -> dict[float, Drawing]:
    """A delta on a carrier, by its multiplier."""
    return {scale: with_delta(carrier, {delta: scale}) for scale in MULTIPLIERS}


def both_curve(carrier: str, best: Mapping[str, float]) -> dict[float, Drawing]:
    """Both deltas on a carrier, at shares of the multiplier that was best for each alone; ``best`` is by character."""
    return {
        share: with_delta(carrier, {delta: share * best[character] for character, delta in DELTAS.items()})
        for share in SHARES
    }


def stages(prompts: Prompts) -> dict[str, Drawing]:
    """Base alone, turbo alone, and the two in a row, by their label."""
    base, turbo = (Drawing(Mix(name), WAYS[name], prompts) for name in ("base", "turbo"))
    meanings: tuple[StrengthMeaning, ...] = ("comfyui", "diffusers")
    rows = {
        f"base, then turbo at {strength:.2f} ({meaning})": dataclasses.replace(base, second=(strength, meaning))
        for meaning in meanings
        for strength in STRENGTHS
    }
    return {"base alone": base, "turbo alone": turbo, **rows}


def lora(delta: str, strength: float, way: Way) -> tuple[Drawing, Drawing]:
    """Alkahest with a difference LoRA, and with the full difference, its refiners kept."""
    by_lora = Drawing(Mix("alkahest"), way, lora=(delta, strength))
    return by_lora, dataclasses.replace(by_lora, lora=None, mix=carried("alkahest", {delta: strength}))


PLAIN: dict[str, list[Drawing]] = {
    "members": [Drawing(Mix(name), WAYS[name], size=size) for size in SIZES for name in SHIPPED],
    "naive": [Drawing(mix) for mix in NAIVE.values()],
    "deltas": [row for delta in DELTAS.values() for carrier in CARRIERS for row in curve(carrier, delta).values()],
    "two-stages": [row for prompts in STAGE_PROMPTS for row in stages(prompts).values()],
    "loras": [
        row
        for delta in LORAS
        for strength in LORA_STRENGTHS
        for way in (FEW, MANY)
        for row in lora(delta, strength, way)
    ],
    "wrong": [row for delta in (*WRONG, *DELTAS.values()) for row in curve("alkahest", delta).values()],
}
"""What each table needs, in the order of the measuring; what "both" and "verify" need depends on what others show."""


def kinds(best: Mapping[str, float], share: float) -> dict[str, list[Drawing]]:
    """What verify is shown, as right and as wrong by the way it is made, not by how it looks.

    ``best`` is alkahest's multiplier of each delta alone, ``share`` its best share of them for both.
    """
    alone = [{DELTAS[name]: scale} for name, scale in best.items()]
    together = {DELTAS[name]: share * scale for name, scale in best.items()}
    tenfold = {delta: 10 * scale for delta, scale in together.items()}
    right = [carried("alkahest", scales) for scales in (*alone, together)]
    wrong = [carried("alkahest", scales) for scales in ({"hollow - turbo": best["hollow"]}, tenfold)]
    wrong = [NAIVE["mean_turbo"], NAIVE["mean_turbo_turbo"], *wrong, *map(Mix, MADE)]
    members = [Drawing(Mix(name), FEW if name == "turbo" else MANY, measured=True) for name in SHIPPED]
    return {
        "right": [*members, *(Drawing(mix, measured=True) for mix in right)],
        "wrong": [Drawing(mix, measured=True) for mix in wrong],
    }


def parents(drawing: Drawing) -> tuple[Drawing, ...]:
    """The models that verify draws beside a kind: those of its expression, those that a member began as, else itself."""
    if drawing.mix.expression in MADE:
        names: tuple[str, ...] = ("alkahest",)
    elif len(drawing.mix.names) > 1:
        names = drawing.mix.names
    else:
        names = tuple(name for name in RECIPES[drawing.mix.expression].start if name in SHIPPED)
    return tuple(Drawing(Mix(name), measured=True) for name in names) or (drawing,)


def checked(drawing: Drawing) -> Drawing | None:
    """After verify's second stage; None for pictures that no model draws."""
    return None if drawing.mix.expression in MADE else dataclasses.replace(drawing, second=(CHECKED, "comfyui"))


def verify(best: Mapping[str, float], share: float) -> list[Drawing]:
    """What the table of verify needs."""
    shown = [row for made in kinds(best, share).values() for kind in made for row in (kind, *parents(kind))]
    return [row for drawing in shown for row in (drawing, checked(drawing)) if row]
