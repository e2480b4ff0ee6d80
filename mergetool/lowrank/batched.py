"""Truncated decompositions of many deltas of one shape, on any device.

It does the work of ``svd.decompose`` on the CPU.

    decompositions = decompose_batch(deltas, names, rule=Rule(threshold=0.995), rank_max=64)

A pass over a matrix is nearly free on a GPU (a BF16 product of all of Z-Image with 96 columns: 5 ms), while
every small operation costs a launch. So the search is not one that adapts block by block (see krylov.py): all matrices of
a batch iterate a wide block for a fixed number of steps, and only those whose certificate is not clear go on.

The iteration is a Chebyshev-filtered subspace iteration (Saad, Numerical Methods for Large Eigenvalue Problems, section 5.3;
Zhou et al. 2006) of A^T A, orthonormalised after every step. In pure noise, the slowest spectrum, 8 steps of 96 columns
missed 4e-4 of the energy of the best 64 directions of a 3840 x 3840 matrix; without the filter, 2e-3.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from mergetool.lowrank.decomposition import Algorithm, Decomposition, zero_decomposition
from mergetool.lowrank.krylov import Products, fast_bfloat16
from mergetool.lowrank.norms import energies_of
from mergetool.lowrank.range_finder import CAP_TOLERANCE, LARGEST_BASIS, ZERO, Goal, Projection, whole_spectrum
from mergetool.lowrank.rules import ENERGY, Rule
from mergetool.lowrank.svd import SMALL, check_ranks, conclude, goal_for, named_seed, safe_exponent, scaled_by
from mergetool.lowrank.tail import rank_for_energy

STEPS = 8
"""Steps of the first search."""

MORE_STEPS = 4
"""Steps of float32 for a matrix with an unclear certificate, each time; they divide the missing energy by 9."""

ROUNDS = 6
"""Certificates a matrix gets at most."""

SPARE = 32
"""Columns beyond the rank that is looked for."""

FIRST_WIDTH = 96
"""Columns of the first block where a threshold may be met by far fewer directions than the cap allows."""

DOUBT = 20.0
"""The energy missing from the strongest directions, at most, in units of the energy that one power step would add.
Measured in the slowest spectra after 4 to 14 steps: 6 to 10 at a short side of 1000, 9 to 18 at 3840."""


def decompose_batch(
    deltas: Tensor,
    names: Sequence[str],
    *,
    rank: int = 0,
    rule: Rule = ENERGY,
    rank_max: int = 0,
    seed: int = 0,
    energies: Sequence[float] | None = None,
    sketch: Tensor | None = None,
) -> list[Decomposition]:
    """Keep the strongest directions of each of ``deltas`` [B, m, n], float32 on any one device.

    Options, promises and errors are those of ``svd.decompose``, but ``rule`` is a share of the energy; ``energies`` are the squared Frobenius norms and ``sketch``
    the deltas in BF16, if the caller has them. The singular values come back on the CPU, the vectors stay on the device.
    Bytes are the same for the same call on the same machine; another device or batch differs in the last bits.
    """
    check_ranks(rank, rank_max)
    if deltas.ndim != 3 or deltas.dtype != torch.float32 or len(names) != len(deltas):
        raise TypeError(f"{len(names)} deltas are float32 [B, m, n], not {tuple(deltas.shape)} {deltas.dtype}")
    deltas = deltas.contiguous()
    totals = list(energies) if energies is not None else energies_of(deltas)
    exponents = [safe_exponent(*item) for item in zip(deltas, totals, names, strict=True)]
    found: dict[int, Decomposition] = {
        i: zero_decomposition(deltas[i], names[i]) for i, exponent in enumerate(exponents) if exponent is None
    }
    live = [i for i, exponent in enumerate(exponents) if exponent is not None]
    if len(live) < len(deltas):
        deltas, sketch = deltas[live], None if sketch is None else sketch[live]
    if any(exponents):
        deltas, sketch = torch.stack([scaled_by(d, exponents[i] or 0) for d, i in zip(deltas, live, strict=True)]), None
        totals = energies_of(deltas)
    else:
        totals = [totals[i] for i in live]
    goals = [goal_for(deltas.shape[1:], total, rank, rule, rank_max) for total in totals]
    if live:
        with ieee_float32():
            search = _Search(deltas, sketch, goals, [named_seed(seed, names[i]) for i in live])
            for place, products, projection, method in search.run():
                i = live[place]
                found[i] = conclude(products, projection, method, goals[place], names[i], exponents[i] or 0)
    return [found[i] for i in range(len(names))]


class _Ieee:
    """Count the users of IEEE products, and restore the caller's setting after the last: torch's switches are the process's."""

    lock = threading.Lock()
    users = 0
    before: tuple[str, bool] = ("highest", True)


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Compute exact float32 products inside the block, against any setting of the caller.

    There is no TF32, and BF16 products have no BF16 partial sums.
    """
    matmul = torch.backends.cuda.matmul
    with _Ieee.lock:
        if _Ieee.users == 0:
            _Ieee.before = torch.get_float32_matmul_precision(), matmul.allow_bf16_reduced_precision_reduction
            torch.set_float32_matmul_precision("highest")
            matmul.allow_bf16_reduced_precision_reduction = False
        _Ieee.users += 1
    try:
        yield
    finally:
        with _Ieee.lock:
            _Ieee.users -= 1
            if _Ieee.users == 0:
                torch.set_float32_matmul_precision(_Ieee.before[0])
                matmul.allow_bf16_reduced_precision_reduction = _Ieee.before[1]


def width_for(rank: int) -> int:
    """Columns to iterate for ``rank`` directions, a multiple of 32."""
    return -(-(rank + SPARE) // 32) * 32


@dataclass(frozen=True, slots=True)
class _Certificate:
    """The energy that a block of directions holds of the matrices [B, long, short], from float32 products.

    ``left`` [B, long, w] and ``right`` [B, short, w] are float32, ``energies`` [B, w] float64 on the CPU, falling;
    directions that are not there have zeros. ``gains`` [B, w] float64 on the CPU is what one power step would add to each
    energy. ``skew`` [B] is how far ``right`` is from orthonormal.
    """

    left: Tensor
    right: Tensor
    energies: Tensor
    gains: Tensor
    skew: list[float]


class _Search:
    """The strongest directions of deltas [B, m, n], each for its goal; ``run`` yields them as they are settled."""

    def __init__(self, deltas: Tensor, sketch: Tensor | None, goals: Sequence[Goal], seeds: Sequence[int]) -> None:
        self._deltas = deltas
        self._goals = goals
        self._seeds = seeds
        self._tall = deltas.shape[1] >= deltas.shape[2]
        self._long, self._short = max(deltas.shape[1:]), min(deltas.shape[1:])
        if sketch is None and (deltas.is_cuda or fast_bfloat16()) and self._short > SMALL:
            sketch = deltas.bfloat16()
        self._sketch = deltas if sketch is None else sketch
        cheap = self._sketch.dtype == torch.bfloat16
        self._coarse = 2.0**-5 / self._short**0.5 if cheap else 0.0  # twice what BF16 products make of an energy

    def run(self) -> Iterator[tuple[int, Products, Projection, Algorithm]]:
        """Place in the batch, its products, its directions and the method, in no particular order."""
        waiting = {self._first_width(): list(range(len(self._deltas)))}
        while waiting:
            width = min(waiting)
            places = waiting.pop(width)
            if self._short <= SMALL or width > LARGEST_BASIS * self._short:
                for place in places:
                    products = self._products(place)
                    projection = whole_spectrum(products, self._goals[place])
                    yield place, products, _on_host(projection), "gram"
                continue
            for place, projection, passes, wider in self._at_width(places, width):
                if wider is None:
                    products = self._products(place)
                    products.passes = passes
                    yield place, products, projection, "subspace"
                else:
                    waiting.setdefault(wider, []).append(place)

    def _products(self, place: int) -> Products:
        return Products(self._deltas[place], self._sketch[place], self._goals[place].total)

    def _first_width(self) -> int:
        most = max(goal.most for goal in self._goals)
        if all(goal.target is None for goal in self._goals):
            return width_for(most)
        return width_for(most) if width_for(most) <= 2 * FIRST_WIDTH else FIRST_WIDTH

    def _at_width(self, places: list[int], width: int) -> Iterator[tuple[int, Projection, int, int | None]]:
        """Every place with its directions and the passes made, or with the width that it needs instead."""
        rows = _iterate(self._matrices(self._sketch, places), self._random(places, width), STEPS, warm=False)
        passes, coarse = 2 * STEPS, self._coarse
        for remaining in reversed(range(ROUNDS)):
            matrices = self._matrices(self._deltas, places)
            certificate = _certify(matrices, rows)
            passes += 2
            unclear = []
            for i, place in enumerate(places):
                goal, energies = self._goals[place], certificate.energies[i]
                if certificate.skew[i] > 1e-5:
                    yield place, self._projection(certificate, i), passes, self._short  # never seen: the whole spectrum
                elif remaining and not _clear(goal, energies, certificate.gains[i], coarse * goal.total, width):
                    unclear.append(i)
                else:
                    yield place, self._projection(certificate, i), passes, self._wider(goal, energies, width)
            if not unclear:
                return
            rows = certificate.right[unclear]
            places = [places[i] for i in unclear]
            del certificate, matrices  # before the copies of the next round
            rows = _iterate(self._matrices(self._deltas, places), rows, MORE_STEPS, warm=True)
            passes, coarse = passes + 2 * MORE_STEPS, 0.0

    def _matrices(self, of: Tensor, places: list[int]) -> Tensor:
        chosen = of if len(places) == len(of) else of[places]
        return chosen if self._tall else chosen.mT

    def _random(self, places: list[int], width: int) -> Tensor:
        device, shape = self._deltas.device, (self._short, width)
        seeds = (self._seeds[place] for place in places)
        return torch.stack(
            [torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device) for seed in seeds]
        )

    def _projection(self, found: _Certificate, i: int) -> Projection:
        energies = found.energies[i]
        kept = int((energies > 0).sum())
        return Projection(found.left[i, :, :kept], energies[:kept], found.right[i, :, :kept].T)

    def _wider(self, goal: Goal, energies: Tensor, width: int) -> int | None:
        """The width that the threshold needs, None where this one decides: met, the cap, or no more directions."""
        if goal.target is None or goal.fewest(energies) is not None or width >= goal.most or not energies[-1] > 0:
            return None
        # From the stronger half: the weaker is still rising.
        known = energies[: (width + 1) // 2].numpy()
        wanted = rank_for_energy(known, goal.total, goal.target, (self._long, self._short))[1]
        wider = 2 * width
        while wider < width_for(wanted):  # few widths, so that matrices stay together
            wider *= 2
        return min(wider, width_for(goal.most)) if goal.most < self._short else wider


def _clear(goal: Goal, energies: Tensor, gains: Tensor, coarse: float, width: int) -> bool:
    """Whether directions that may be missing cannot change the answer to ``goal``."""
    total = goal.total
    rank = goal.fewest(energies)
    complete = not energies[-1] > 0
    if rank is not None and goal.target is not None:
        refuted = goal.refuted(rank)
        margin = goal.target - float(energies[:refuted].sum())
        decided = margin > max(DOUBT * float(gains[:refuted].sum()), 1e-9 * total) or refuted == 0
        return decided and total - float(energies[:rank].sum()) >= coarse
    if complete or width < goal.most:
        return coarse == 0.0 or total - float(energies.sum()) >= coarse
    doubt = DOUBT * float(gains[: goal.most].sum())
    rest = total - float(energies[: goal.most].sum())
    if doubt > CAP_TOLERANCE * total or rest < coarse:
        return False
    return goal.target is None or doubt <= max(goal.target - (total - rest), 1e-8 * total)


def _on_host(projection: Projection) -> Projection:
    return Projection(projection.left, projection.energies.cpu(), projection.right)


def _iterate(matrices: Tensor, columns: Tensor, steps: int, *, warm: bool) -> Tensor:
    """``steps`` steps of the filtered iteration of A^T A on ``columns`` [B, short, w] float32, for A [B, long, short].

    The filter damps the energies from 0 to ``edge``, the smallest that the block sees: T_q((A^T A - c) / c), c = edge / 2, by
    its three-term recurrence; the previous block follows each change of basis. A block that has not been through A twice
    sees nothing to filter by. The columns that come back are nearly orthonormal, the strongest first.
    """
    previous = None
    for step in range(steps):
        image = matrices @ columns.to(matrices.dtype)
        ahead = (matrices.mT @ image).double()
        columns = columns.double()
        if warm or step >= 2:
            exact = image.double()
            edge = _smallest_energy(exact.mT @ exact)[:, None, None]
            ahead -= edge / 2 * columns
            if previous is not None:
                ahead -= edge**2 / 16 * previous
        turn = _whitening(ahead.mT @ ahead)
        previous = columns @ turn
        columns = (ahead @ turn).float()
    return columns


def _whitening(gram: Tensor) -> Tensor:
    """W [B, w, w] that makes ``X @ W`` orthonormal for X^T X = ``gram`` [B, w, w] float64 (Cholesky QR).

    Columns are scaled to length 1 first, and the diagonal is shifted (Fukaya et al. 2020), so that it never fails: columns
    that depend on others come out short, columns of zeros stay zeros.
    """
    energies = gram.diagonal(dim1=1, dim2=2)
    scale = energies.clamp_min(1e-30 * energies.amax(1, keepdim=True)).clamp_min(1e-300).rsqrt()
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    scaled = gram * scale[:, :, None] * scale[:, None, :] + 1e-13 * identity
    factor = torch.linalg.cholesky_ex(scaled).L
    inverse = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
    turn: Tensor = (inverse * scale[:, None, :]).mT
    return turn


def _smallest_energy(gram: Tensor) -> Tensor:
    """The smallest eigenvalue of each of ``gram`` [B, w, w] float64, or up to a quarter less.

    It is 1 / ||gram^-16||_F^(1/16), whose error is a factor w^(1/32) at most: 0.92 to 0.99 of it in practice.
    """
    turn = _whitening(gram)
    inverse = turn @ turn.mT
    logarithm = torch.zeros(len(gram), dtype=gram.dtype, device=gram.device)
    for squarings in range(5):
        norm = torch.linalg.matrix_norm(inverse)
        logarithm += norm.log() / 2**squarings
        inverse = inverse / norm[:, None, None]
        if squarings < 4:
            inverse = inverse @ inverse
    return torch.nan_to_num((-logarithm).exp(), 0.0, 0.0, 0.0)


def _certify(matrices: Tensor, columns: Tensor) -> _Certificate:
    """Project ``matrices`` [B, long, short] float32 onto the span of ``columns`` [B, short, w], in float32."""
    basis = columns.double()
    for _ in range(2):  # the second makes up for what rounding left of the first
        basis = basis @ _whitening(basis.mT @ basis)
    overlap = basis.mT @ basis
    skew = (overlap - overlap.diagonal(dim1=1, dim2=2).round().diag_embed()).abs().amax((1, 2))
    image = (matrices @ basis.float()).double()
    energies, turn = _eigen(image.mT @ image)
    energies = torch.where(energies > energies[:, :1] * ZERO**2, energies, 0.0)
    there = energies.to(image.device)[:, None, :]
    left = torch.where(there > 0, image @ (turn / there.clamp_min(1e-300).sqrt()), 0.0).float()
    back = matrices.mT @ left
    gains = back.double().square().sum(1).cpu() - energies
    return _Certificate(left, (basis @ turn).float(), energies, gains.clamp_min(0.0), skew.tolist())


def _eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [B, w], falling, on the CPU and eigenvectors [B, w, w] on the device of ``gram`` [B, w, w] float64.

    LAPACK on the CPU's cores: cuSOLVER, as torch 2.11 calls it, takes matrices larger than 32 one by one, 3 to 4 ms each.
    """
    host = gram.cpu()
    if gram.is_cuda:
        solved = list(_eigen_threads().map(torch.linalg.eigh, host.unbind()))
        values, vectors = torch.stack([v for v, _ in solved]), torch.stack([v for _, v in solved])
    else:
        values, vectors = torch.linalg.eigh(host)
    return values.flip(1).clamp_min_(0.0), vectors.flip(2).to(gram.device)


@functools.cache
def _eigen_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(8, "eigen", torch.set_num_threads, (1,))
