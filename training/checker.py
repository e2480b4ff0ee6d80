"""Reads figures, colours, relation and character off a picture of the closed world, by measurement only.

read(picture).matches(scene)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from training.world import (
    HOLLOW,
    PALETTE,
    SHAPES,
    STRIPE_PERIOD,
    STRIPE_WIDTH,
    Figure,
    Picture,
    Placing,
    Scene,
    silhouette,
    stripe_colour,
)

MARGIN = 4
"""Width in pixels of the frame that is ground in every picture of this world, but for a corner of a figure."""

SAME = 60.0
"""Euclidean RGB distance up to which a pixel counts as of a palette colour; the closest two colours are 104 apart."""

OTHER = 40.0
"""Distance from which a pixel is not the ground's: two fifths of that of the closest colours, so a thin wall of a soft picture is seen."""

CLEAR = 0.6
"""Least share of the frame, and of a figure, that must be of its colour."""

CORE = 0.75
"""Pixels of a patch that are this far from the ground, as a share of the farthest: its inside, without the edge."""

OVERLAP = 0.7
"""Least intersection over union of a silhouette, with its soft edge, with its shape. Other shapes come close, so the best one counts."""

SPECK = 0.012
"""Share of the picture up to which a patch is no figure. The smallest figure of this world has 0.05."""

LARGEST = 0.5
"""Largest share of the picture that is one figure."""

STRIPED = 0.5
"""Least contrast of the ground's stripes, as a share of what a perfect striped picture has."""

HOLE = 0.35
"""Least share of ground where a figure's hole would be."""

_NAMES = tuple(PALETTE)
_COLOURS = np.array(list(PALETTE.values()), np.float32)


@dataclass(frozen=True, slots=True)
class Seen:
    """One figure of a picture; a name is None where nothing of this world is recognised.

    ``overlap`` is the intersection over union of its silhouette with the best shape's, ``hole`` the ground's share of where its hole
    would be: 0 for a whole figure and 1 for a perfect hollow one. ``x`` and ``y`` are its centre in pixels.
    """

    shape: str | None
    colour: str | None
    overlap: float
    hole: float
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Reading:
    """What a picture shows. ``stripes`` is the contrast of the ground's stripes: 0 plain, 1 perfect."""

    ground: str | None
    figures: tuple[Seen, ...] = ()
    stripes: float = 0.0

    @property
    def striped(self) -> bool:
        return self.stripes >= STRIPED

    @property
    def hollow(self) -> bool:
        """Whether every figure has its hole."""
        return bool(self.figures) and all(figure.hole >= HOLE for figure in self.figures)

    @property
    def scene(self) -> Scene | None:
        """The scene that the picture shows, None where a part of it is not recognised or it has other than one or two figures."""
        if self.ground is None or not 1 <= len(self.figures) <= 2:
            return None
        relation, found = None, list(self.figures)
        if len(found) == 2:
            beside = abs(found[0].x - found[1].x) >= abs(found[0].y - found[1].y)
            relation = "left of" if beside else "above"
            found.sort(key=lambda seen: seen.x if beside else seen.y)
        figures = tuple(Figure(seen.shape, seen.colour) for seen in found if seen.shape and seen.colour)
        return Scene(figures, self.ground, relation) if len(figures) == len(found) else None

    def matches(self, scene: Scene) -> bool:
        """Whether ground, figures and relation are those of ``scene``."""
        return self.scene == scene


def read(picture: Picture) -> Reading:
    """Measure a picture uint8 [height, width, 3] of at least 32 pixels a side."""
    pixels = picture.astype(np.float32)
    height, width = pixels.shape[:2]
    between, inside = _frame(height, width)
    ground, share = _majority(pixels[between])
    if share < CLEAR:
        return Reading(None)
    step = stripe_colour(PALETTE[ground]) - np.asarray(PALETTE[ground], np.float32)
    contrast = float((pixels[inside].mean(0) - pixels[between].mean(0)) @ step / (step @ step))
    # Against its own row's ends, so that stripes are ground; the median, so that a corner in the frame is none.
    rows = np.median(np.concatenate([pixels[:, :MARGIN], pixels[:, -MARGIN:]], axis=1), axis=1, keepdims=True)
    patches, count = ndimage.label(np.linalg.norm(pixels - rows, axis=-1) > OTHER)
    areas = np.bincount(patches.ravel(), minlength=count + 1)
    large = [patches == n for n in range(1, count + 1) if areas[n] > SPECK * height * width]
    found = []
    for patch in large:
        others = np.any([other for other in large if other is not patch], axis=0) if len(large) > 1 else ~patch & False
        region = ndimage.binary_dilation(patch, iterations=2) & ~ndimage.binary_dilation(others)
        found.append(_figure(pixels, rows, patch, region))
    return Reading(ground, tuple(found), contrast)


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
def _frame(height: int, width: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """The pixels of the frame that are between stripes, and those that are in one, without the rows where they meet."""
    frame = np.ones((height, width), np.bool_)
    frame[MARGIN:-MARGIN, MARGIN:-MARGIN] = False
    row = np.arange(height)[:, None] % STRIPE_PERIOD
    between = (row > STRIPE_WIDTH) & (row < STRIPE_PERIOD - 1)
    inside = (row > 0) & (row < STRIPE_WIDTH - 1)
    return frame & between, frame & inside


def _figure(
    pixels: NDArray[np.float32], rows: NDArray[np.float32], patch: NDArray[np.bool_], region: NDArray[np.bool_]
) -> Seen:
    """What a connected patch that differs from the ground is; its soft edge ends within ``region``."""
    y, x = (float(indices.mean()) + 0.5 for indices in patch.nonzero())
    nothing = Seen(None, None, 0.0, 0.0, x, y)
    far = np.linalg.norm(pixels - rows, axis=-1)
    core = patch & (far >= CORE * np.percentile(far[patch], 95))
    name, share = _majority(pixels[core])
    if share < CLEAR or patch.mean() > LARGEST:
        return nothing
    step = np.asarray(PALETTE[name], np.float32) - rows
    size = (step * step).sum(-1)
    cover = np.clip(((pixels - rows) * step).sum(-1) / np.maximum(size, 1), 0, 1)
    # A row whose ground is nearly of the figure's colour says nothing about its silhouette.
    cover = cover * region
    told = np.broadcast_to(size > SAME**2, cover.shape)
    window = tuple(slice(max(0, int(i.min()) - 4), int(i.max()) + 5) for i in patch.nonzero())
    overlap, shape, placing = _match(cover[window], told[window])
    disc = silhouette("circle", Placing(placing.x, placing.y, HOLLOW * placing.radius), cover[window].shape[::-1])
    disc = disc * told[window]
    hole = float((disc * (1 - cover[window])).sum() / max(float(disc.sum()), 1e-6))
    return Seen(shape if overlap >= OVERLAP else None, name, overlap, hole, x, y)


def _match(cover: NDArray[np.float32], told: NDArray[np.bool_]) -> tuple[float, str, Placing]:
    """The shape, whole or hollow, that a silhouette [height, width] in 0 to 1 is most like: overlap, name, and where it lies.

    The overlap is the sum of the lesser over the sum of the greater cover of each pixel that is ``told``.
    """
    total = float(cover.sum())
    y = float((cover.sum(1) * (np.arange(len(cover)) + 0.5)).sum()) / total
    x = float((cover.sum(0) * (np.arange(cover.shape[1]) + 0.5)).sum()) / total
    best = (0.0, SHAPES[0], Placing(x, y, 1.0))
    for shape in SHAPES:
        for hollow in (False, True):
            area, below = _unit(shape, hollow)
            for factor in (0.92, 0.97, 1.02, 1.07):
                radius = factor * float(np.sqrt(total / area))
                placing = Placing(x, y - below * radius, radius)
                template = _template(shape, placing, cover.shape[::-1], hollow)
                overlap = float(
                    np.minimum(template, cover)[told].sum() / max(np.maximum(template, cover)[told].sum(), 1e-6)
                )
                best = max(best, (overlap, shape, placing), key=lambda found: found[0])
    return best


def _template(shape: str, placing: Placing, size: tuple[int, ...], hollow: bool) -> NDArray[np.float32]:
    cover = silhouette(shape, placing, (size[0], size[1]))
    if hollow:
        cover = cover - silhouette("circle", Placing(placing.x, placing.y, placing.radius * HOLLOW), (size[0], size[1]))
    return np.clip(cover, 0, 1)


@cache
def _unit(shape: str, hollow: bool) -> tuple[float, float]:
    """Area of a shape of radius 1, and how far its centroid lies below its centre."""
    radius = 16.0
    cover = _template(shape, Placing(32, 32, radius), (64, 64), hollow)
    offsets = np.arange(64) + 0.5 - 32
    return float(cover.sum()) / radius**2, float((cover.sum(1) * offsets).sum() / cover.sum()) / radius
