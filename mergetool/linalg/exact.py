"""The strongest directions of a matrix to the last digits of float32, by float64 products.

``svd`` in lora certifies the energy that directions hold, which is what a file of factors is judged by. Here the directions themselves
matter, since the difference that is kept becomes weights. A direction converges much later than its energy, whose error is the square
of its own: the search goes on until the residual of the eigenvalue equation says so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergetool.linalg.krylov import BlockKrylov, Products
from mergetool.linalg.range_finder import LARGEST_BASIS, spectrum

SMALL = 512
"""Short sides up to this get the whole spectrum: 0.06 s for 2048 x 512 here, no more than the search takes."""

ANGLE = 1e-9
"""The sine of the angle between found and true directions that is good enough: a 60th of float32's rounding."""

SETTLED = 1e-12
"""The share of the energy that one more block still brought, below which it is worth computing the residual."""

LEAST_GAP = 1e-6
"""Gaps to the next energy are taken for this share of the last one at least: closer ones are one value to whoever gave a rank."""

FRESH = 8
"""Random directions in every block: they bring in the copies of a repeated value, which the others never find."""


def strongest_rows(matrix: Tensor, most: int, share: float) -> Tensor:
    """Orthonormal directions [k, min(m, n)] of the shorter side of ``matrix`` [m, n], both float64, that hold most energy, falling.

    The fewest that hold ``share`` of the squared Frobenius norm, at most ``most``. The angle to the true ones is 1e-9 where the energies
    of the last one kept and the next differ by 1e-6 of it; directions of equal energy are any basis of their space. The matrix is
    finite and not zero. The search is for the CPU; on a GPU the whole spectrum is computed.
    """
    total = float(matrix.square().sum())
    products = Products(matrix, matrix, total)
    short = products.short
    if short > SMALL and most <= LARGEST_BASIS * short / 2.5 and matrix.device.type == "cpu":
        rows = _search(products, most, share * total)
        if rows is not None:
            return rows
    energies, rows = spectrum(products)
    return rows[: min(_fewest(energies, share * total), most)]


def _search(products: Products, most: int, target: float) -> Tensor | None:
    """The directions by a Krylov space; None where it would grow so large that the whole spectrum is cheaper."""
    krylov = BlockKrylov(products, torch.Generator().manual_seed(0))
    before, wanted = 0.0, most
    while krylov.size < LARGEST_BASIS * products.short:
        krylov.expand(FRESH + 16 * -(-max(24, min(wanted, krylov.size or wanted)) // 16), FRESH)
        reached = _fewest(krylov.energies, target)
        wanted = min(reached, most)
        if wanted == len(krylov.energies):
            continue
        held = float(krylov.energies[:wanted].sum())
        gain, before = held - before, held
        if gain <= SETTLED * products.total:
            rows = krylov.strongest(wanted)
            if _residual(products, rows) <= ANGLE * _gap(krylov.energies, wanted):
                return rows
    return None


def _fewest(energies: Tensor, target: float) -> int:
    """How many of the falling energies reach the target; all where they do not."""
    return min(int((energies.cumsum(0) < target).sum()) + 1, len(energies))


def _gap(energies: Tensor, count: int) -> float:
    last, following = float(energies[count - 1]), float(energies[count])
    # Below 1e-5 of the strongest energy, rounding of the products is all the residual there is.
    return max(last - following, LEAST_GAP * last, 1e-6 * float(energies[0]))


def _residual(products: Products, rows: Tensor) -> float:
    """How far ``rows`` are from spanning an invariant space of A^T A."""
    image = products.cheap_image(rows)
    back = products.cheap_back(image)
    return float((back - (image.T @ image) @ rows).square().sum().sqrt())
