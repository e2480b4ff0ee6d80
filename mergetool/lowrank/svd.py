"""The truncated singular value decomposition of one delta, with a certificate of its energy.

    strongest = decompose(delta, name="layers.3.feed_forward.w1.weight", rule=Rule(threshold=0.995), rank_max=64)
    stored = balanced(strongest, torch.bfloat16)
    stored_residual(strongest, stored)

A search with BF16 products proposes directions, one float32 projection onto them states their energy; the whole
spectrum is computed only when the threshold needs a large share of it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from mergetool.errors import NonFiniteError, UsageError
from mergetool.lowrank.above import above, strongest_above
from mergetool.lowrank.decomposition import Algorithm, Decomposition, signed, zero_decomposition
from mergetool.lowrank.krylov import Products, fast_bfloat16, orthonormal_rows
from mergetool.lowrank.norms import squared_norm
from mergetool.lowrank.range_finder import (
    Goal,
    Projection,
    Search,
    certify,
    spectrum,
    strongest_of,
    truncate,
    whole_spectrum,
)
from mergetool.lowrank.rules import ENERGY, Rule
from mergetool.lowrank.tail import rank_for_energy

SMALL = 128
"""Short sides up to this get the whole spectrum: the search's first three blocks would already fill it."""


def decompose(
    delta: Tensor,
    *,
    name: str,
    rank: int = 0,
    rule: Rule = ENERGY,
    rank_max: int = 0,
    seed: int = 0,
    sketch: Tensor | None = None,
    energy: float | None = None,
    rows: Tensor | None = None,
    complete: bool = False,
) -> Decomposition:
    """Keep the strongest directions of ``delta`` [m, n], float32 on the CPU.

    ``rank`` > 0 keeps that many (fewer if the delta has no more). ``rank`` 0 keeps what ``rule`` says, at most ``rank_max`` (0: no cap). A
    rank inside by a share of the energy is certified to reach it and exceeds the fewest possible by at most 1 %, below 100 not at all. At a
    fixed rank or at the cap the captured energy is within about 0.1 % of the delta's energy of the best. A share of 1 keeps all
    that is not rounding noise. The other rules are certified too: ``ratio`` and ``abs`` as ``above`` says, ``sum`` and ``knee`` by the whole
    spectrum.

    ``rows`` [k, min(m, n)], of any dtype, may be the strongest directions of the shorter side from an earlier call, strongest
    first; they replace the search where they suffice, which float32 projections decide. ``complete`` says that the delta has no more.

    ``sketch`` may be the delta in BF16 if the caller has it, for the cheap products (or the delta itself, to keep
    them in float32); by default it is made here where this CPU is fast in BF16. ``energy`` may be its squared
    Frobenius norm, which is otherwise summed here. Random numbers depend on ``seed``
    and ``name`` only; the same call gives the same bytes with the same number of threads.

    Raises NonFiniteError for NaN or infinity in the delta, UsageError for a wrong option.
    """
    check_ranks(rank, rank_max)
    if delta.ndim != 2 or delta.dtype != torch.float32 or delta.device.type != "cpu":
        raise TypeError(f"a delta is a float32 matrix on the CPU, not {tuple(delta.shape)} {delta.dtype}")
    delta = delta.contiguous()
    total = squared_norm(delta) if energy is None else energy
    exponent = safe_exponent(delta, total, name)
    if exponent is None:
        return zero_decomposition(delta, name)
    if exponent:
        delta, sketch = scaled_by(delta, exponent), None
        total = squared_norm(delta)
    if sketch is None:
        sketch = delta.bfloat16() if fast_bfloat16() else delta
    if sketch.shape != delta.shape:
        raise TypeError(f"the sketch is {tuple(sketch.shape)}, the delta {tuple(delta.shape)}")
    products = Products(delta, sketch, total)
    if rank == 0 and rule.needs_all:
        return _by_all_values(products, rule, rank_max, name, exponent)
    if rank == 0 and rule.is_cut:
        return _above_cut(products, rule, rank_max, seed, name, exponent, rows)
    goal = goal_for(delta.shape, total, rank, rule, rank_max)
    inside = None if rows is None else _from_rows(products, goal, rows, complete)
    projection, method = inside or _find(products, goal, seed, name)
    return conclude(products, projection, method, goal, name, exponent)


def goal_for(shape: Sequence[int], total: float, rank: int, rule: Rule, rank_max: int) -> Goal:
    """The goal that a rank or a share of the energy sets for a delta of ``shape``.

    The delta's energy is ``total``. Raises ValueError for other rules.
    """
    short = min(shape)
    if not rank and rule.share is None:
        raise ValueError(f"the rule {rule.name} is not about energy")
    target = None if rank or rule.share is None else total * rule.share
    return Goal(total, target, most=min(rank or rank_max or short, short))


def conclude(
    products: Products, projection: Projection, method: Algorithm, goal: Goal, name: str, exponent: int
) -> Decomposition:
    """Make ``projection`` a decomposition for ``goal``. The delta was scaled by 2^-``exponent``.

    The energies of the projection are on the CPU, its vectors on any device.
    """
    total, shape = products.total, (products.long, products.short)
    kept = goal.fewest(projection.energies)
    capped = goal.target is not None and kept is None and len(projection.energies) >= goal.most < products.short
    wanted = None
    if capped and goal.target is not None:
        wanted = rank_for_energy(projection.energies[: goal.most].numpy(), total, goal.target, shape)[1]
    projection = truncate(projection, kept or goal.most)
    captured = float(projection.energies.sum())
    left, right = projection.left, projection.right
    left, right = signed(left, right) if products.tall else signed(right.T, left.T)
    factor = 2.0**exponent
    return Decomposition(
        name,
        left.contiguous(),
        projection.energies.sqrt() * factor,
        right.contiguous(),
        total_energy=total * factor**2,
        captured_energy=captured * factor**2,
        lost_energy=_lost(products, projection, total, captured) * factor**2,
        capped=capped,
        rank_wanted=wanted,
        method=method,
        passes=products.passes,
    )


def _find(products: Products, goal: Goal, seed: int, name: str) -> tuple[Projection, Literal["krylov", "gram"]]:
    if products.short > SMALL:
        search = Search(products, goal, torch.Generator().manual_seed(named_seed(seed, name)))
        while (count := search.advance()) is not None:
            projection = certify(products, search.krylov.strongest(count), goal, search.doubt)
            complete = len(projection.energies) < count
            if goal.fewest(projection.energies) is not None or count >= goal.most or complete:
                return projection, "krylov"
            search.extra *= 2
    return whole_spectrum(products, goal), "gram"


def _from_rows(
    products: Products, goal: Goal, rows: Tensor, complete: bool
) -> tuple[Projection, Literal["stored"]] | None:
    """The directions for ``goal`` inside ``rows``, None where they do not suffice."""
    basis = orthonormal_rows(rows.double())
    projection = certify(products, basis, goal, math.inf)
    decided = goal.fewest(projection.energies) is not None or len(projection.energies) >= goal.most
    return (projection, "stored") if decided or complete else None


def _by_all_values(products: Products, rule: Rule, rank_max: int, name: str, exponent: int) -> Decomposition:
    """The directions that a rule on every singular value keeps."""
    energies, rows = spectrum(products)
    wanted = rule.rank(energies.numpy()) or 0
    rank = min(wanted, rank_max or wanted)
    decomposition = _fixed(products, strongest_of(products, energies, rows, rank), "gram", rank, name, exponent)
    capped = rank < wanted
    values = energies.sqrt() * 2.0**exponent
    return replace(decomposition, capped=capped, rank_wanted=wanted if capped else None, spectrum=values)


def _above_cut(
    products: Products, rule: Rule, rank_max: int, seed: int, name: str, exponent: int, rows: Tensor | None
) -> Decomposition:
    """The directions that a rule keeps which takes all singular values above one."""
    most, generator = rank_max or products.short, torch.Generator().manual_seed(named_seed(seed, name))

    def cut(energy: float) -> float:
        return (rule.cut(math.sqrt(energy) * 2.0**exponent) * 2.0**-exponent) ** 2

    above_cut = None if rows is None else above(products, orthonormal_rows(rows.double()), cut, generator)
    method: Algorithm = "stored" if above_cut else "krylov"
    if above_cut is None and products.short > SMALL:
        above_cut = strongest_above(products, cut, most, generator)
    if above_cut is None:
        energies, directions = spectrum(products)
        wanted = int((energies > cut(float(energies[0]))).sum())
        rank = min(wanted, most)
        whole = _fixed(products, strongest_of(products, energies, directions, rank), "gram", rank, name, exponent)
        values = energies.sqrt() * 2.0**exponent
        return replace(whole, capped=wanted > most, rank_wanted=wanted if wanted > most else None, spectrum=values)
    projection, count = above_cut
    if count > most:
        goal = Goal(products.total, None, most)
        projection, method = _find(products, goal, seed, name)
        return replace(conclude(products, projection, method, goal, name, exponent), capped=True)
    return _fixed(products, projection, method, count, name, exponent)


def _fixed(
    products: Products, projection: Projection, method: Algorithm, rank: int, name: str, exponent: int
) -> Decomposition:
    return conclude(products, projection, method, Goal(products.total, None, rank), name, exponent)


def check_ranks(rank: int, rank_max: int) -> None:
    """Raises UsageError for ranks below 0."""
    if rank < 0 or rank_max < 0:
        raise UsageError(f"a rank is 0 (automatic, no cap) or more, not {min(rank, rank_max)}")


def named_seed(seed: int, name: str) -> int:
    """The seed of the random numbers for the tensor ``name``, 64 bits."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def safe_exponent(delta: Tensor, energy: float, name: str) -> int | None:
    """The power of two at the delta's largest magnitude, to scale by.

    0 if products are safe as they are; None for all zero.

    Raises NonFiniteError for NaN or infinity.
    """
    if delta.numel() == 0:
        return None
    # The largest square lies between the mean square and the sum; so a look at every value is seldom needed.
    if 2.0**-60 * delta.numel() < energy < 2.0**60:
        return 0
    low, high = torch.aminmax(delta)
    largest = max(abs(float(low)), abs(float(high)))
    if not math.isfinite(largest):
        bad = ~torch.isfinite(delta)
        row, column = (int(i) for i in bad.nonzero()[0])
        raise NonFiniteError(
            f'the difference of tensor "{name}" holds {int(bad.sum())} values that are NaN or infinite, the first '
            f"({float(delta[row, column])}) in row {row}, column {column}; finite numbers are needed: check both "
            "models, or leave the tensor out with `exclude`"
        )
    if largest == 0.0:
        return None
    exponent = math.frexp(largest)[1]
    return 0 if abs(exponent) <= 30 else exponent


def scaled_by(delta: Tensor, exponent: int) -> Tensor:
    """Scale the delta exactly, so that its largest magnitude is near 1.

    It takes two steps, since 2^-exponent may not be a float32.
    """
    half = -exponent // 2
    return delta * 2.0**half * 2.0 ** (-exponent - half)


def _lost(products: Products, projection: Projection, total: float, captured: float) -> float:
    """Energy outside the kept directions: the difference, or where that would cancel, summed up directly."""
    if total - captured > 1e-6 * total:
        return total - captured
    scaled = projection.left * projection.energies.sqrt().float().to(projection.left.device)
    matrix = products.delta if products.tall else products.delta.T
    parts = zip(torch.split(matrix, 1024), torch.split(scaled, 1024), strict=True)
    return sum(squared_norm(part - columns @ projection.right) for part, columns in parts)
