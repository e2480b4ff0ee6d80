"""The strongest directions of a matrix to the last digits of float32.

The decomposition of a LoRA is judged by the energy that its directions hold. Here the directions themselves matter, since what is left
of the matrix becomes weights. A direction converges later than its energy, whose error is the square of its own, and float32
products leave it 1e-5 off; so a quick search is followed by float64 steps, until the residual of the eigenvalue equation is small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergetool.lowrank.krylov import BlockKrylov, Products, orthonormal_rows
from mergetool.lowrank.range_finder import LARGEST_BASIS, spectrum

SMALL = 256
"""Short sides up to this get the whole spectrum at once."""

ANGLE = 1e-9
"""The sine of the angle between found and true directions that is good enough: a 60th of float32's rounding."""

SETTLED = 1e-6
"""The share of the energy that one more block of the search brought, below which float64 steps are the quicker way."""

LEAST_GAP = 1e-6
"""The share of the last energy kept that the gap to the next is taken for at least: closer ones are one value to whoever gave a rank."""

FRESH = 8
"""Random directions in every block of the search: they bring in copies of a repeated value, which the others never find."""

STEPS = 40


def strongest_rows(matrix: Tensor, most: int, share: float) -> Tensor:
    """Find the directions of ``matrix`` [m, n] that hold the most energy, on its shorter side.

    They are orthonormal, [k, min(m, n)] float64, strongest first.

    The fewest that hold ``share`` of the squared Frobenius norm, at most ``most``. The angle to the true ones is 1e-9 or less where the
    energies of the last one kept and the next differ by 1e-6 of it; of equal energies any directions in their space are right. The
    matrix is finite and not zero. On a GPU the whole spectrum is always computed.
    """
    matrix = matrix.contiguous()
    cheap = matrix.float()
    products = Products(matrix, cheap, float(matrix.double().square().sum()))
    few = share < 1 or most <= LARGEST_BASIS * products.short / 4
    if products.short > SMALL and few and not matrix.is_cuda:
        directions = _search(products, most, share)
        if directions is not None:
            return directions
    energies, rows = spectrum(products)
    return rows[: min(_fewest(energies, share * products.total), most)]


def _search(products: Products, most: int, share: float) -> Tensor | None:
    """The directions by a Krylov space and float64 steps; None where either would cost more than the whole spectrum."""
    target = share * products.total
    krylov = BlockKrylov(products, torch.Generator().manual_seed(0))
    held, wanted = 0.0, most if share == 1 else 24
    while krylov.size < LARGEST_BASIS * products.short:
        krylov.expand(FRESH + 16 * -(-max(24, min(wanted, most)) // 16), FRESH)
        wanted = min(_fewest(krylov.energies, target), most)
        before, held = held, float(krylov.energies[:wanted].sum())
        if wanted < krylov.size and held - before <= SETTLED * products.total:
            return _refined(products, krylov.strongest(min(2 * wanted + 24, krylov.size)), most, target)
    return None


def _refined(products: Products, rows: Tensor, most: int, target: float) -> Tensor | None:
    """The directions out of the span of ``rows``, which every step widens by the largest errors of the best directions."""
    images = _image(products, rows)
    for _ in range(STEPS):
        energies, turn = torch.linalg.eigh(images.T @ images)
        energies, turn = energies.flip(0).clamp_min_(0.0), turn.flip(1)
        wanted = min(_fewest(energies, target), most)
        if wanted == len(rows) < products.short:
            return None
        best = turn[:, :wanted].T @ rows
        missed = _back(products, images @ turn[:, :wanted]) - energies[:wanted, None] * best
        lengths = missed.square().sum(1).sqrt()
        if float(lengths.square().sum().sqrt()) <= ANGLE * _gap(energies, wanted):
            return orthonormal_rows(best, rounds=1)
        fresh = missed[lengths > 0] / lengths[lengths > 0, None]
        for _ in range(2):
            fresh = orthonormal_rows(fresh - (fresh @ rows.T) @ rows, rounds=1)
        if len(rows) + len(fresh) > LARGEST_BASIS * products.short:
            return None
        rows = torch.cat([rows, fresh])
        images = torch.cat([images, _image(products, fresh)], dim=1)
    return None


def _fewest(energies: Tensor, target: float) -> int:
    """The number of falling energies that reach the target; all where they do not."""
    return min(int((energies.cumsum(0) < target).sum()) + 1, len(energies))


def _gap(energies: Tensor, count: int) -> float:
    """The gap between the first ``count`` energies and the next."""
    last, following = float(energies[count - 1]), float(energies[count]) if count < len(energies) else 0.0
    # The rounding of the products is 1e-15 of the strongest energy: no residual becomes smaller.
    return max(last - following, LEAST_GAP * last, 1e-5 * float(energies[0]))


def _image(products: Products, rows: Tensor) -> Tensor:
    """A @ rows^T in float64, a thousand rows of A at a time: a copy of all would be twice its size."""
    tall = products.delta if products.tall else products.delta.T
    return torch.cat([part.double() @ rows.T for part in torch.split(tall, 1024)])


def _back(products: Products, columns: Tensor) -> Tensor:
    """columns^T @ A in float64."""
    tall = products.delta if products.tall else products.delta.T
    total = torch.zeros(columns.shape[1], products.short, dtype=torch.float64)
    for part, some in zip(torch.split(tall, 1024), torch.split(columns, 1024), strict=True):
        total += some.T @ part.double()
    return total
