"""The truncated singular value decomposition of one delta matrix, with a certificate of what it holds.

    found = decompose(delta, name="layers.3.feed_forward.w1.weight", rank_thresh=0.995, rank_max=64)
    down, up = balanced_factors(found, torch.bfloat16)
    stored_residual(found, down, up)

A search with BF16 products proposes directions, one float32 projection onto them states their energy; the whole
spectrum is computed only when the threshold needs a large share of it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mergetool.errors import NonFiniteError, UsageError
from mergetool.lowrank.above import above, strongest_above
from mergetool.lowrank.krylov import Products, fast_bfloat16, orthonormal_rows
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
from mergetool.lowrank.rules import Rule
from mergetool.lowrank.tail import rank_for_energy
from mergetool.lowrank.thresholds import RuleName

SMALL = 128
"""Short sides up to this get the whole spectrum: the search's first three blocks would already fill it."""


Method = Literal["zero", "krylov", "subspace", "gram", "stored", "factors"]


@dataclass(frozen=True, slots=True, eq=False)
class Decomposition:
    """The strongest directions of a delta [m, n]: ``left @ diag(singular_values) @ right`` approximates it.

    ``left`` [m, r] and ``right`` [r, n] are float32 with orthonormal columns and rows, ``singular_values`` [r] float64,
    falling. The largest entry of each left vector by magnitude is positive (ties: the first). Energies are squared
    Frobenius norms: ``total_energy`` of the delta, ``captured_energy`` of the approximation, ``lost_energy`` of
    their difference.

    ``capped`` says that ``rank_max`` stopped the threshold; ``rank_wanted`` is then the estimated rank it needs, None where
    nothing tells. ``passes`` counts how often the delta was read. ``spectrum`` [min(m, n)] are all singular values, falling,
    where they had to be computed; else None.
    """

    name: str
    left: Tensor
    singular_values: Tensor
    right: Tensor
    total_energy: float
    captured_energy: float
    lost_energy: float
    capped: bool
    rank_wanted: int | None
    method: Method
    passes: int
    spectrum: Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.singular_values)


def decompose(
    delta: Tensor,
    *,
    name: str,
    rank: int = 0,
    rank_thresh: float = 0.95,
    rank_max: int = 0,
    seed: int = 0,
    sketch: Tensor | None = None,
    energy: float | None = None,
    rule: RuleName = "energy",
    rows: Tensor | None = None,
    complete: bool = False,
) -> Decomposition:
    """Keep the strongest directions of ``delta`` [m, n], float32 on the CPU.

    ``rank`` > 0 keeps that many (fewer if the delta has no more). ``rank`` 0 keeps the fewest that hold the share
    ``rank_thresh`` of the delta's whole energy, at most ``rank_max`` (0: no cap). A rank found by threshold is
    certified to reach it and exceeds the fewest possible by at most 1 %, below 100 not at all. At a fixed rank or at
    the cap the captured energy is within about 0.1 % of the delta's energy of the best. A threshold of 1 keeps all
    that is not rounding noise.

    Another ``rule`` reads ``rank_thresh`` as ``rules`` defines it, and is certified too: ``ratio`` and ``abs`` as ``above`` says,
    ``sum`` and ``knee`` by the whole spectrum.

    ``rows`` [k, min(m, n)], of any dtype, may be the strongest directions of the shorter side from an earlier call, strongest
    first; they replace the search where they suffice, which float32 projections decide. ``complete`` says that the delta has no more.

    ``sketch`` may be the delta in BF16 if the caller has it, for the cheap products (or the delta itself, to keep
    them in float32); by default it is made here where this CPU is fast in BF16. ``energy`` may be its squared
    Frobenius norm, which is otherwise summed here. Random numbers depend on ``seed``
    and ``name`` only; the same call gives the same bytes with the same number of threads.

    Raises NonFiniteError for NaN or infinity in the delta, UsageError for a wrong option.
    """
    chosen = Rule(rule, rank_thresh)
    check_options(rank, chosen.share or 1.0, rank_max)
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
    if rank == 0 and chosen.needs_all:
        return _by_all_values(products, chosen, rank_max, name, exponent)
    if rank == 0 and chosen.is_cut:
        return _above_cut(products, chosen, rank_max, seed, name, exponent, rows)
    goal = goal_for(delta.shape, total, rank, chosen.share or 1.0, rank_max)
    found = None if rows is None else _from_rows(products, goal, rows, complete)
    projection, method = found or _find(products, goal, seed, name)
    return conclude(products, projection, method, goal, name, exponent)


def goal_for(shape: Sequence[int], total: float, rank: int, rank_thresh: float, rank_max: int) -> Goal:
    """What the options of ``decompose`` ask of a delta of ``shape`` with the energy ``total``."""
    short = min(shape)
    return Goal(total, target=None if rank else total * rank_thresh, most=min(rank or rank_max or short, short))


def conclude(
    products: Products, projection: Projection, method: Method, goal: Goal, name: str, exponent: int
) -> Decomposition:
    """The decomposition that ``projection`` is for ``goal``, of a delta that was scaled by 2^-``exponent``.

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
    left, right = projection.left, projection.right.T
    left, right = _signed(*((left, right) if products.tall else (right, left)))
    factor = 2.0**exponent
    return Decomposition(
        name,
        left,
        projection.energies.sqrt() * factor,
        right.T.contiguous(),
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
            found = certify(products, search.krylov.strongest(count), goal, search.doubt)
            complete = len(found.energies) < count
            if goal.fewest(found.energies) is not None or count >= goal.most or complete:
                return found, "krylov"
            search.extra *= 2
    return whole_spectrum(products, goal), "gram"


def _from_rows(
    products: Products, goal: Goal, rows: Tensor, complete: bool
) -> tuple[Projection, Literal["stored"]] | None:
    """The directions for ``goal`` inside ``rows``, None where they do not suffice."""
    basis = orthonormal_rows(rows.double())
    found = certify(products, basis, goal, math.inf)
    decided = goal.fewest(found.energies) is not None or len(found.energies) >= goal.most
    return (found, "stored") if decided or complete else None


def _by_all_values(products: Products, rule: Rule, rank_max: int, name: str, exponent: int) -> Decomposition:
    """What a rule that needs every singular value keeps."""
    energies, rows = spectrum(products)
    wanted = rule.rank(energies.numpy()) or 0
    rank = min(wanted, rank_max or wanted)
    found = _fixed(products, strongest_of(products, energies, rows, rank), "gram", rank, name, exponent)
    capped = rank < wanted
    values = energies.sqrt() * 2.0**exponent
    return replace(found, capped=capped, rank_wanted=wanted if capped else None, spectrum=values)


def _above_cut(
    products: Products, rule: Rule, rank_max: int, seed: int, name: str, exponent: int, rows: Tensor | None
) -> Decomposition:
    """What a rule keeps that takes all singular values above one."""
    most, generator = rank_max or products.short, torch.Generator().manual_seed(named_seed(seed, name))

    def cut(energy: float) -> float:
        return (rule.cut(math.sqrt(energy) * 2.0**exponent) * 2.0**-exponent) ** 2

    found = None if rows is None else above(products, orthonormal_rows(rows.double()), cut, generator)
    method: Method = "stored" if found else "krylov"
    if found is None and products.short > SMALL:
        found = strongest_above(products, cut, most, generator)
    if found is None:
        energies, directions = spectrum(products)
        wanted = int((energies > cut(float(energies[0]))).sum())
        rank = min(wanted, most)
        whole = _fixed(products, strongest_of(products, energies, directions, rank), "gram", rank, name, exponent)
        values = energies.sqrt() * 2.0**exponent
        return replace(whole, capped=wanted > most, rank_wanted=wanted if wanted > most else None, spectrum=values)
    projection, count = found
    if count > most:
        goal = Goal(products.total, None, most)
        projection, method = _find(products, goal, seed, name)
        return replace(conclude(products, projection, method, goal, name, exponent), capped=True)
    return _fixed(products, projection, method, count, name, exponent)


def _fixed(
    products: Products, projection: Projection, method: Method, rank: int, name: str, exponent: int
) -> Decomposition:
    return conclude(products, projection, method, Goal(products.total, None, rank), name, exponent)


def check_options(rank: int, rank_thresh: float, rank_max: int) -> None:
    """Raises UsageError for options of ``decompose`` that cannot be meant."""
    if rank < 0 or rank_max < 0:
        raise UsageError(f"a rank is 0 (automatic, no cap) or more, not {min(rank, rank_max)}")
    if not 0.0 < rank_thresh <= 1.0:
        raise UsageError(f"`rank_thresh` is the share of energy to keep, above 0 and up to 1, not {rank_thresh}")


def named_seed(seed: int, name: str) -> int:
    """The seed of the random numbers for the tensor ``name``, 64 bits."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def safe_exponent(delta: Tensor, energy: float, name: str) -> int | None:
    """The power of two at the delta's largest magnitude, 0 if products are safe as they are; None for all zero.

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
    """The delta with its largest magnitude near 1, exactly: two steps, since 2^-exponent may not be a float32."""
    half = -exponent // 2
    return delta * 2.0**half * 2.0 ** (-exponent - half)


def squared_norm(matrix: Tensor) -> float:
    """Squared Frobenius norm, right to 1e-9: float32 sums over runs of 256 values, float64 over the runs.

    One float32 sum over 4e7 values, as torch.linalg.vector_norm does it, is 0.5 % too low.
    """
    flat = matrix.reshape(-1)
    whole = flat.numel() // 256 * 256
    runs = torch.linalg.vector_norm(flat[:whole].view(-1, 256), dim=1).double().square().sum()
    return float(runs + flat[whole:].double().square().sum())


def _lost(products: Products, projection: Projection, total: float, captured: float) -> float:
    """Energy outside the kept directions: the difference, or where that would cancel, summed up directly."""
    if total - captured > 1e-6 * total:
        return total - captured
    scaled = projection.left * projection.energies.sqrt().float().to(projection.left.device)
    matrix = products.delta if products.tall else products.delta.T
    parts = zip(torch.split(matrix, 1024), torch.split(scaled, 1024), strict=True)
    return sum(squared_norm(part - columns @ projection.right) for part, columns in parts)


def _signed(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Flip pairs of columns so that the largest entry of each left one by magnitude (ties: first) is positive."""
    largest = left.abs().argmax(dim=0, keepdim=True) if left.numel() else left.new_zeros(1, 0, dtype=torch.long)
    signs = left.gather(0, largest).sign()
    return (left * signs).contiguous(), right * signs


def zero_decomposition(delta: Tensor, name: str) -> Decomposition:
    """What a delta of zeros, or without elements, decomposes into."""
    m, n = delta.shape
    empty = torch.empty(0, dtype=torch.float64)
    return Decomposition(
        name, delta.new_empty(m, 0), empty, delta.new_empty(0, n), 0.0, 0.0, 0.0, False, None, method="zero", passes=1
    )


def balanced_factors(found: Decomposition, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The pair to store: ``down`` [r, n] and ``up`` [m, r] in ``dtype``, with up @ down close to the delta.

    Each takes the square root of the singular values. ``down`` is rounded first; ``up`` is then fitted to the
    rounded ``down`` by least squares, min ||U S V^T - up @ down||_F, and rounded. Raises NonFiniteError when a
    value does not fit ``dtype``.
    """
    work = working_precision(found, dtype)
    root = found.singular_values.sqrt()
    right = found.right.to(work)
    down = (root.to(work)[:, None] * right).to(dtype)
    # Rows scaled to length 1, and a pseudo-inverse: a row that underflowed to zeros gets no weight.
    scaled = down.to(work) / root.to(work)[:, None]
    gram, projected = (scaled @ scaled.T).double(), (scaled @ right.T).double()
    weights = torch.linalg.pinv(gram, hermitian=True) @ projected / root[:, None]
    up = (found.left.to(work) @ (weights * found.singular_values).to(work).T).to(dtype)
    for factor in (down, up):
        if not bool(torch.isfinite(factor).all()):
            raise NonFiniteError(
                f'the difference of tensor "{found.name}" is too large for {str(dtype).removeprefix("torch.")}: '
                f"its largest singular value is {float(found.singular_values[0]):.3g}; store the LoRA in bf16 or fp32"
            )
    return down, up


def stored_residual(found: Decomposition, down: Tensor, up: Tensor) -> float:
    """||delta - up @ down||_F / ||delta||_F of the stored pair, without reading the delta again.

    delta = U S V^T + T with T V = 0, and down = M V^T + E with M = down V, so that

        ||delta - up @ down||^2 = ||U S - up M||^2 + ||up E||^2 + ||T||^2 - 2 <T, up E>.

    The last term is left out: E is only the rounding error of ``down`` and independent of T. Against dense float64 the
    result was right to 1e-6 for bf16 factors of deltas from 60 x 40 up. Every difference is taken before it is squared.
    """
    if found.rank == 0:
        return 0.0 if found.total_energy == 0.0 else 1.0
    work = working_precision(found, down.dtype)
    right, rows, columns = found.right.to(work), down.to(work), up.to(work)
    inside = rows @ right.T
    outside = rows - inside @ right
    missed = (found.left.to(work) * found.singular_values.to(work) - columns @ inside).square().sum()
    added = ((columns.T @ columns) * (outside @ outside.T)).sum()
    return math.sqrt(max(float(missed) + float(added) + found.lost_energy, 0.0) / found.total_energy)


def working_precision(found: Decomposition, dtype: torch.dtype) -> torch.dtype:
    """The dtype to work in for factors of ``dtype``: float32 where its error, 2^-24, is far below their rounding.

    Float64 took 25 ms more for each 10240 x 3840 matrix. It is kept for float32 factors, and for singular values whose
    fourth powers would leave float32's range.
    """
    values = found.singular_values
    inside = found.rank > 0 and float(values[0]) < 1e9 and float(values[-1]) > 1e-9
    return torch.float32 if dtype != torch.float32 and inside else torch.float64
