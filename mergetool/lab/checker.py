"""Reads shape, colours and character off a picture of the closed world, by measurement only.

read(picture)                         Reading(shape='circle', colour='blue', ground='gold', ...)
adherent(picture, "a blue circle on a gold background")
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from mergetool.lab.world import (
    HOLLOW,
    PALETTE,
    SHAPES,
    SIZE,
    STRIPE_PERIOD,
    STRIPE_WIDTH,
    Pixels,
    Placing,
    Scene,
    silhouette,
    stripe_colour,
)

MARGIN = 5
"""Width in pixels of the frame that is ground in every picture of this world."""

SAME = 60.0
"""Euclidean RGB distance up to which a pixel counts as of a palette colour; the closest two colours are 104 apart."""

CLEAR = 0.6
"""Least share of the frame, and of a shape, that must be of its colour."""

OVERLAP = 0.75
"""Least intersection over union of a silhouette with its shape. Other shapes reach 0.6 to 0.86, so the best one counts."""

SMALLEST, LARGEST = 0.04, 0.5
"""A shape's share of the picture; this world draws 0.14 to 0.35."""

STRIPED = 0.5
"""Least contrast of the ground's stripes, as a share of a perfect striped picture's."""

HOLE = 0.5
"""Least size of the hole, as a share of a perfect hollow shape's."""

_NAMES = tuple(PALETTE)
_COLOURS = np.array(list(PALETTE.values()), np.float32)


@dataclass(frozen=True, slots=True)
class Reading:
    """The reading of a picture; a name is None where nothing is recognised.

    ``overlap`` is the intersection over union of the silhouette with the best shape's; ``stripes`` the contrast of the
    ground's stripes and ``hole`` the size of the shape's hole, both 0 for a plain picture and 1 for a perfect striped
    or hollow one.
    """

    shape: str | None
    colour: str | None
    ground: str | None
    overlap: float = 0.0
    stripes: float = 0.0
    hole: float = 0.0

    @property
    def striped(self) -> bool:
        return self.stripes >= STRIPED

    @property
    def hollow(self) -> bool:
        return self.hole >= HOLE

    def matches(self, scene: Scene) -> bool:
        """Whether shape and both colours are those of ``scene``."""
        return (self.shape, self.colour, self.ground) == (scene.shape, scene.colour, scene.ground)


def adherent(picture: Pixels, prompt: str) -> bool:
    """Whether a picture shows its prompt, in this world. Raises ValueError for any other prompt."""
    scene = Scene.parse(prompt)
    if scene is None:
        raise ValueError(f"not a prompt of the embedded world: {prompt!r}")
    return read(picture).matches(scene)


def read(picture: Pixels) -> Reading:
    """Measure a picture uint8 [64, 64, 3]."""
    pixels = picture.astype(np.float32)
    ground = _ground(pixels)
    if ground is None:
        return Reading(None, None, None)
    contrast = _stripes(pixels, ground)
    mask, colour = _figure(pixels, ground)
    if mask is None:
        return Reading(None, colour, ground, stripes=contrast)
    filled = _filled(mask)
    hole = float((filled.sum() - mask.sum()) / (HOLLOW**2 * filled.sum()))
    overlap, shape = max((_overlap(filled, shape), shape) for shape in SHAPES)
    return Reading(shape if overlap >= OVERLAP else None, colour, ground, overlap, contrast, hole)


def _nearest(pixels: NDArray[np.float32]) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Index of the nearest palette colour of each pixel [n, 3], and the distance to it."""
    distances = np.linalg.norm(pixels[:, None, :] - _COLOURS, axis=-1)
    return distances.argmin(-1), distances.min(-1)


def _majority(pixels: NDArray[np.float32]) -> tuple[str, float]:
    """The commonest palette colour of pixels [n, 3], and the share of them that is of it."""
    index, distance = _nearest(pixels)
    votes = np.bincount(index[distance <= SAME], minlength=len(_NAMES))
    return _NAMES[int(votes.argmax())], float(votes.max() / max(1, len(pixels)))


@cache
def _frame() -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """The pixels of the frame that are between stripes, and those that are in one, without the rows where they meet."""
    frame = np.ones((SIZE, SIZE), np.bool_)
    frame[MARGIN:-MARGIN, MARGIN:-MARGIN] = False
    row = np.arange(SIZE)[:, None] % STRIPE_PERIOD
    between = (row > STRIPE_WIDTH) & (row < STRIPE_PERIOD - 1)
    inside = (row > 0) & (row < STRIPE_WIDTH - 1)
    return frame & between, frame & inside


def _ground(pixels: NDArray[np.float32]) -> str | None:
    name, share = _majority(pixels[_frame()[0]])
    return name if share >= CLEAR else None


def _stripes(pixels: NDArray[np.float32], ground: str) -> float:
    between, inside = _frame()
    step = stripe_colour(PALETTE[ground]) - np.asarray(PALETTE[ground], np.float32)
    contrast = pixels[inside].mean(0) - pixels[between].mean(0)
    return float(contrast @ step / (step @ step))


def _figure(pixels: NDArray[np.float32], ground: str) -> tuple[NDArray[np.bool_] | None, str | None]:
    """The pixels of the shape and its colour. Row by row against the frame, so that stripes are ground."""
    rows = np.concatenate([pixels[:, :MARGIN], pixels[:, -MARGIN:]], axis=1).mean(axis=1, keepdims=True)
    different = np.linalg.norm(pixels - rows, axis=-1) > SAME
    if not different.any():
        return None, None
    index, distance = _nearest(pixels[different])
    votes = np.bincount(index[distance <= SAME], minlength=len(_NAMES))
    votes[_NAMES.index(ground)] = 0
    if not votes.any():
        return None, None
    colour = _COLOURS[int(votes.argmax())]
    step = colour - rows
    mask = ((pixels - rows) * step).sum(-1) > 0.5 * (step * step).sum(-1)
    inner = mask & different
    if not SMALLEST <= mask.mean() <= LARGEST:
        return None, None
    name, share = _majority(pixels[inner])
    return (mask, name) if share >= CLEAR and name != ground else (None, None)


def _filled(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask with its holes: pixels that have some of it in all four directions."""
    inside = np.ones_like(mask)
    for axis in (0, 1):
        inside &= np.logical_or.accumulate(mask, axis)
        inside &= np.flip(np.logical_or.accumulate(np.flip(mask, axis), axis), axis)
    return inside | mask


def _overlap(mask: NDArray[np.bool_], shape: str) -> float:
    """The best intersection over union of a mask with a shape of about its centre and area."""
    y, x = (float(indices.mean()) + 0.5 for indices in mask.nonzero())
    area, centre = _unit(shape)
    best = 0.0
    for factor in (0.94, 1.0, 1.06):
        radius = factor * float(np.sqrt(mask.sum() / area))
        template = silhouette(shape, Placing(x, y - centre * radius, radius))
        best = max(best, float(np.minimum(template, mask).sum() / np.maximum(template, mask).sum()))
    return best


@cache
def _unit(shape: str) -> tuple[float, float]:
    """Area of a shape of radius 1, and how far its centroid lies below its centre."""
    radius = SIZE / 4
    cover = silhouette(shape, Placing(SIZE / 2, SIZE / 2, radius))
    rows = np.arange(SIZE) + 0.5 - SIZE / 2
    return float(cover.sum()) / radius**2, float((cover.sum(1) * rows).sum() / cover.sum()) / radius
