"""All directions of one delta above a cut, with a certificate that none was missed.

A Krylov search proposes directions Q; a float32 projection A Q = U diag(s) V^T gives values that are never above the true ones
(Cauchy interlacing), so as many as exceed the cut exist. That there are no more follows from Haynsworth's law of inertia for
A^T A - c, c the squared cut: none is outside if

    ||R||^2 + || sum_{s_j^2 < c} C_j C_j^T / (c - s_j^2) || < c,        R = A (1 - V V^T),  C_j = A^T A v_j - s_j^2 v_j.

||R||^2 is at most the energy outside, which certifies without doubt where that is below c. Elsewhere it is bounded by ``COLUMNS``
random vectors w: ||M|| <= FACTOR sqrt(2 / pi) max ||M w||, but for a chance of FACTOR^-COLUMNS = 2e-10 (Dixon 1983; Halko, Martinsson
& Tropp 2011, lemma 4.1), with M = (R^T R)^q, whose root makes the bound as tight as q steps allow. A cut so near the edge of a flat
tail that ``POWERS`` steps do not part them is left to the whole spectrum.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mergetool.lowrank.krylov import BlockKrylov, Products, orthonormal_rows
from mergetool.lowrank.range_finder import LARGEST_BASIS, Projection, project

COLUMNS = 16
FACTOR = 4.0
POWERS = 16

_SETTLED = 1e-3
"""The last energy above the cut may have risen by this share in the last block when the directions are tried."""

_REFINEMENTS = 3
_ATTEMPTS = 3  # each with a basis half as large again: what is near the cut but no flat tail comes into it

Cut = Callable[[float], float]
"""A function from the largest energy (squared singular value) to the energy above which all directions are kept."""


def strongest_above(
    products: Products, cut: Cut, most: int, generator: torch.Generator
) -> tuple[Projection, int] | None:
    """Find every direction of the delta above ``cut``, and how many of the first these are.

    That number is ``most`` + 1 where there are more than ``most``, and the directions are then not to be used. None where only the
    whole spectrum can tell: more than a share ``LARGEST_BASIS`` of it is above, or the cut lies in, or just above, a flat tail.
    """
    krylov = BlockKrylov(products, generator)
    limit = int(LARGEST_BASIS * products.short)
    before, next_size, attempts = krylov.energies, 0, 0
    while krylov.size < limit and attempts < _ATTEMPTS:
        krylov.expand(min(max(32, krylov.size // 4), limit - krylov.size))
        energies = krylov.energies
        wanted = cut(float(energies[0]))
        count = int((energies > wanted).sum())
        if count > most and float(energies[most]) > 1.02 * wanted:
            return Projection(*_nothing(products)), most + 1
        if krylov.size >= next_size and _is_settled(before, energies, count):
            above_cut = _attempt(products, krylov.strongest(krylov.size), cut, generator)
            if above_cut is not None:
                return above_cut
            next_size, attempts = krylov.size * 3 // 2, attempts + 1
        before = energies
    return None


def above(products: Products, rows: Tensor, cut: Cut, generator: torch.Generator) -> tuple[Projection, int] | None:
    """Do as `strongest_above`, from orthonormal ``rows`` [k, short] float64 found before.

    None also where they are too few.
    """
    return _attempt(products, rows, cut, generator)


def _is_settled(before: Tensor, now: Tensor, count: int) -> bool:
    """True when another block has changed nothing above the cut, and is mostly below it."""
    if len(before) <= count or len(now) < count + 16:
        return False
    return count == 0 or float(now[count - 1] - before[count - 1]) <= _SETTLED * float(now[count - 1])


def _attempt(products: Products, rows: Tensor, cut: Cut, generator: torch.Generator) -> tuple[Projection, int] | None:
    """The projection onto ``rows`` and the number above; None when there may be more outside them."""
    projection = project(products, rows)
    for step in range(_REFINEMENTS):
        wanted = cut(float(projection.energies[0]))
        count = int((projection.energies > wanted).sum())
        if products.total - float(projection.energies[:count].sum()) < wanted:
            return projection, count
        back = products.back(projection.left)
        coupling = _coupling(projection, back, wanted)
        if coupling < wanted / 8 or step == _REFINEMENTS - 1:
            enough = wanted - coupling
            outside = (
                _largest_outside(products, projection.right.double(), enough, generator) if enough > 0 else math.inf
            )
            return (projection, count) if outside < enough else None
        projection = project(products, orthonormal_rows(back))
    return None


def _coupling(projection: Projection, back: Tensor, wanted: float) -> float:
    """The norm of sum C_j C_j^T / (c - s_j^2) over the directions below the cut; ``back`` [k, short] is U^T A."""
    below = projection.energies < wanted
    energies = projection.energies[below]
    rest = back[below] - energies.sqrt()[:, None] * projection.right[below].double()
    rest *= (energies / (wanted - energies)).sqrt()[:, None]
    return float(torch.linalg.matrix_norm(rest @ rest.T, 2)) if len(rest) else 0.0


def _largest_outside(products: Products, rows: Tensor, enough: float, generator: torch.Generator) -> float:
    """A bound of ||A (1 - rows^T rows)||^2 from above, no tighter than shows on which side of ``enough`` it is."""
    columns = torch.randn(COLUMNS, products.short, generator=generator).double()
    logarithm = torch.zeros(COLUMNS, dtype=torch.float64)
    columns -= (columns @ rows.T) @ rows
    bound = 0.0
    for power in range(1, POWERS + 1):
        image = products.image(columns)
        ahead = products.back(image)
        ahead -= (ahead @ rows.T) @ rows
        certain = float((image.double().square().sum(0) / columns.square().sum(1).clamp_min(1e-300)).max())
        norms = torch.linalg.vector_norm(ahead, dim=1).clamp_min(1e-300)
        logarithm += norms.log()
        columns = ahead / norms[:, None]
        bound = math.exp((float(logarithm.max()) + math.log(FACTOR * math.sqrt(2 / math.pi))) / power)
        if bound < enough or certain > enough:
            break
    return bound


def _nothing(products: Products) -> tuple[Tensor, Tensor, Tensor]:
    empty = torch.empty(0, dtype=torch.float64)
    return torch.empty(products.long, 0), empty, torch.empty(0, products.short)
