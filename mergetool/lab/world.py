"""The closed world of the embedded models: prompts and the pictures that are right for them.

scene = Scene("circle", "blue", "gold")
scene.prompt                      'a blue circle on a gold background'
render(scene, placing)            uint8 [64, 64, 3]
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIZE = 64
"""Side of a picture in pixels."""

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

STRIPE_PERIOD, STRIPE_WIDTH = 12, 4
"""Rows from one stripe to the next, and rows in a stripe: two thirds of a striped ground keep its colour."""

STRIPE_STRENGTH = 0.45
"""The distance of a stripe from the ground's colour towards black, or white where the ground is dark."""

HOLLOW = 0.32
"""Radius of the round hole of a hollow shape, as a share of the shape's. In no shape does it leave a wall thinner than 3 pixels."""

_FINE = 4  # drawn this many times larger, and averaged

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Scene:
    """The scene that a prompt asks for; ``colour`` and ``ground`` differ."""

    shape: str
    colour: str
    ground: str

    @property
    def prompt(self) -> str:
        """E.g. "a blue circle on a gold background"."""
        return f"a {self.colour} {self.shape} on a {self.ground} background"

    @classmethod
    def parse(cls, prompt: str) -> Scene | None:
        """The scene of a prompt of this world, None for any other text."""
        words = prompt.strip().lower().split()
        if len(words) != 7 or (words[0], *words[3:5], words[6]) != ("a", "on", "a", "background"):
            return None
        colour, shape, ground = words[1], words[2], words[5]
        known = shape in SHAPES and {colour, ground} <= PALETTE.keys() and colour != ground
        return cls(shape, colour, ground) if known else None


SCENES = tuple(
    Scene(shape, colour, ground) for shape in SHAPES for colour, ground in itertools.permutations(PALETTE, 2)
)


@dataclass(frozen=True, slots=True)
class Placing:
    """Centre and radius of a shape, in pixels."""

    x: float
    y: float
    radius: float

    @classmethod
    def random(cls, generator: np.random.Generator) -> Placing:
        """Near the middle, half of the picture wide or a little more."""
        x, y = generator.uniform(SIZE / 2 - 4, SIZE / 2 + 4, 2)
        return cls(float(x), float(y), float(generator.uniform(16, 20)))


def silhouette(shape: str, placing: Placing, size: int = SIZE) -> NDArray[np.float32]:
    """The share of each pixel that the shape covers, [size, size] in 0 to 1.

    ``radius`` is a circle's; the other shapes are scaled so that all cover about the same area.
    """
    steps = (np.arange(size * _FINE, dtype=np.float32) + 0.5) / _FINE
    x = (steps[None, :] - placing.x) / placing.radius
    y = (steps[:, None] - placing.y) / placing.radius
    match shape:
        case "circle":
            inside = x**2 + y**2 <= 1
        case "square":
            inside = np.maximum(abs(x), abs(y)) <= 0.88
        case "diamond":
            inside = abs(x) + abs(y) <= 1.26
        case "triangle":
            inside = (y <= 0.9) & (abs(x) * 1.72 <= y + 1.1)
        case "cross":
            inside = ((abs(x) <= 0.36) & (abs(y) <= 1.15)) | ((abs(y) <= 0.36) & (abs(x) <= 1.15))
        case _:
            raise ValueError(f"no shape is called {shape!r}")
    cover: NDArray[np.float32] = inside.reshape(size, _FINE, size, _FINE).mean(axis=(1, 3), dtype=np.float32)
    return cover


def stripes(size: int = SIZE) -> NDArray[np.bool_]:
    """The rows of a striped ground that are stripes, [size, 1]."""
    return (np.arange(size)[:, None] % STRIPE_PERIOD) < STRIPE_WIDTH


def stripe_colour(ground: tuple[int, int, int]) -> NDArray[np.float32]:
    """The colour of the stripes on a ground."""
    colour = np.asarray(ground, np.float32)
    luminance = float(colour @ np.array([0.299, 0.587, 0.114], np.float32))
    return colour + ((0.0 if luminance > 90 else 255.0) - colour) * STRIPE_STRENGTH


def render(scene: Scene, placing: Placing, *, striped: bool = False, hollow: bool = False) -> Pixels:
    """Draw the picture [64, 64, 3] of a scene. The two fine-tunes add ``striped`` and ``hollow``."""
    cover = silhouette(scene.shape, placing)
    if hollow:
        cover = cover - silhouette("circle", Placing(placing.x, placing.y, placing.radius * HOLLOW))
    ground = np.broadcast_to(np.asarray(PALETTE[scene.ground], np.float32), (SIZE, SIZE, 3))
    if striped:
        ground = np.where(stripes()[:, :, None], stripe_colour(PALETTE[scene.ground]), ground)
    colour = np.asarray(PALETTE[scene.colour], np.float32)
    picture = ground + (colour - ground) * np.clip(cover, 0, 1)[:, :, None]
    return np.rint(picture).astype(np.uint8)
