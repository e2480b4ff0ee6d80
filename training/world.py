"""The closed world of the new family: prompts of one or two figures, and the pictures that are right for them.

scene = Scene.parse("a red circle left of a blue square on a gold background")
render(scene, place(scene, SIZES[0], generator), SIZES[0])      uint8 [64, 64, 3]
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]

SIZES = ((64, 64), (80, 48), (48, 80))
"""Width and height of the pictures that are trained; the first is the usual one."""

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (215, 45, 40),
    "green": (40, 160, 70),
    "blue": (45, 75, 215),
    "gold": (240, 200, 45),
    "purple": (145, 60, 185),
    "pink": (245, 150, 190),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross", "diamond")
RELATIONS = ("left of", "above")

STRIPE_PERIOD, STRIPE_WIDTH = 12, 4
"""Rows from one stripe to the next, and rows in a stripe: two thirds of a striped ground keep its colour."""

STRIPE_STRENGTH = 0.45
"""How far a stripe is moved from the ground's colour towards black, or white where the ground is dark."""

HOLLOW = 0.33
"""Radius of the round hole of a hollow figure, as a share of the figure's."""

SINGLES = 0.25
"""Share of the pictures that show one figure."""

HELD_OUT = 10
"""One pair prompt in so many is never trained on."""

REACH = 1.12
"""How far a figure reaches from its centre at most, in radii."""

_FINE = 4  # drawn this many times larger, and averaged
_PROMPT = re.compile(r"a (\w+) (\w+)(?: (left of|above) a (\w+) (\w+))? on a (\w+) background")


@dataclass(frozen=True, slots=True)
class Figure:
    """One shape of one colour."""

    shape: str
    colour: str


@dataclass(frozen=True, slots=True)
class Scene:
    """What a prompt asks for: one figure, or two and how the first lies to the second. All colours differ."""

    figures: tuple[Figure, ...]
    ground: str
    relation: str | None = None

    @property
    def prompt(self) -> str:
        """E.g. "a red circle left of a blue square on a gold background"."""
        named = [f"a {figure.colour} {figure.shape}" for figure in self.figures]
        return f"{f' {self.relation} '.join(named)} on a {self.ground} background"

    @property
    def held_out(self) -> bool:
        """Whether this scene is kept from training; only pairs are."""
        return self.relation is not None and zlib.crc32(self.prompt.encode()) % HELD_OUT == 0

    @classmethod
    def parse(cls, prompt: str) -> Scene | None:
        """The scene of a prompt of this world, None for any other text."""
        found = _PROMPT.fullmatch(" ".join(prompt.lower().split()))
        if found is None:
            return None
        colour, shape, relation, other_colour, other_shape, ground = found.groups()
        figures = (Figure(shape, colour), *([Figure(other_shape, other_colour)] if relation else []))
        colours = {ground, *(figure.colour for figure in figures)}
        known = colours <= PALETTE.keys() and all(figure.shape in SHAPES for figure in figures)
        return cls(figures, ground, relation) if known and len(colours) == len(figures) + 1 else None

    @classmethod
    def random(
        cls, generator: np.random.Generator, size: tuple[int, int] = SIZES[0], *, held_out: bool = False
    ) -> Scene:
        """A scene that a picture of ``size`` has room for: of the trained ones, or a pair that is held out."""
        while True:
            count = 1 if not held_out and generator.random() < SINGLES else 2
            colours = generator.choice(len(PALETTE), count + 1, replace=False)
            names = [tuple(PALETTE)[i] for i in colours]
            figures = tuple(Figure(SHAPES[generator.integers(len(SHAPES))], name) for name in names[1:])
            fitting = RELATIONS if size[0] == size[1] else RELATIONS[:1] if size[0] > size[1] else RELATIONS[1:]
            relation = fitting[generator.integers(len(fitting))] if count == 2 else None
            scene = cls(figures, names[0], relation)
            if scene.held_out == held_out:
                return scene


@dataclass(frozen=True, slots=True)
class Placing:
    """Centre and radius of a figure, in pixels."""

    x: float
    y: float
    radius: float


def place(scene: Scene, size: tuple[int, int], generator: np.random.Generator) -> tuple[Placing, ...]:
    """Where the figures of a scene lie: one near the middle, or two that do not touch."""
    width, height = size
    if scene.relation is None:
        x, y = (float(generator.uniform(side * 7 / 16, side * 9 / 16)) for side in size)
        return (Placing(x, y, float(generator.uniform(17, 21)) * min(size) / 64),)
    beside = scene.relation == "left of"
    along, across = (width, height) if beside else (height, width)
    middle = along / 2 + generator.uniform(-0.5, 0.5)
    apart = along * generator.uniform(0.447, 0.461)
    radius = along * generator.uniform(0.165, 0.178)
    placings = []
    for sign in (-1, 1):
        offset = across * (0.5 + generator.uniform(-0.11, 0.11))
        first, second = float(middle + sign * apart / 2), float(offset)
        placings.append(Placing(first, second, float(radius)) if beside else Placing(second, first, float(radius)))
    return tuple(placings)


def silhouette(shape: str, placing: Placing, size: tuple[int, int]) -> NDArray[np.float32]:
    """How much of each pixel a shape covers, [height, width] in 0 to 1.

    ``radius`` is a circle's; no other shape reaches much farther.
    """
    width, height = size
    cover = np.zeros((height, width), np.float32)
    reach = REACH * placing.radius + 1
    left, right = max(0, int(placing.x - reach)), min(width, int(placing.x + reach) + 1)
    top, bottom = max(0, int(placing.y - reach)), min(height, int(placing.y + reach) + 1)
    if left >= right or top >= bottom:
        return cover
    x = (np.arange(left * _FINE, right * _FINE, dtype=np.float32) + 0.5)[None, :] / _FINE
    y = (np.arange(top * _FINE, bottom * _FINE, dtype=np.float32) + 0.5)[:, None] / _FINE
    x, y = (x - placing.x) / placing.radius, (y - placing.y) / placing.radius
    match shape:
        case "circle":
            inside = x**2 + y**2 <= 1
        case "square":
            inside = np.maximum(abs(x), abs(y)) <= 0.88
        case "diamond":
            inside = abs(x) + abs(y) <= REACH
        case "triangle":
            inside = (y <= 0.85) & (abs(x) * 1.75 <= y + 1.1)
        case "cross":
            inside = ((abs(x) <= 0.39) & (abs(y) <= 1.1)) | ((abs(y) <= 0.39) & (abs(x) <= 1.1))
        case _:
            raise ValueError(f"no shape is called {shape!r}")
    parts = inside.reshape(bottom - top, _FINE, right - left, _FINE)
    cover[top:bottom, left:right] = parts.mean(axis=(1, 3), dtype=np.float32)
    return cover


def stripes(height: int) -> NDArray[np.bool_]:
    """The rows of a striped ground that are stripes, [height, 1]."""
    return (np.arange(height)[:, None] % STRIPE_PERIOD) < STRIPE_WIDTH


def stripe_colour(ground: tuple[int, int, int]) -> NDArray[np.float32]:
    """The colour of the stripes on a ground."""
    colour = np.asarray(ground, np.float32)
    luminance = float(colour @ np.array([0.299, 0.587, 0.114], np.float32))
    return colour + ((0.0 if luminance > 90 else 255.0) - colour) * STRIPE_STRENGTH


def render(
    scene: Scene, placings: Sequence[Placing], size: tuple[int, int], *, striped: bool = False, hollow: bool = False
) -> Picture:
    """The picture [height, width, 3] of a scene; ``striped`` and ``hollow`` are what the two fine-tunes add to it."""
    width, height = size
    picture = np.broadcast_to(np.asarray(PALETTE[scene.ground], np.float32), (height, width, 3))
    if striped:
        picture = np.where(stripes(height)[:, :, None], stripe_colour(PALETTE[scene.ground]), picture)
    for figure, placing in zip(scene.figures, placings, strict=True):
        cover = silhouette(figure.shape, placing, size)
        if hollow:
            cover = cover - silhouette("circle", Placing(placing.x, placing.y, placing.radius * HOLLOW), size)
        colour = np.asarray(PALETTE[figure.colour], np.float32)
        picture = picture + (colour - picture) * np.clip(cover, 0, 1)[:, :, None]
    return np.rint(picture).astype(np.uint8)
