"""A sum of LoRAs without another decomposition: the factors of all side by side.

The rank is the sum of the ranks, and ``down`` keeps its stored bits. Strength and scale of each LoRA go into its columns of ``up``,
which is exact for 1, for -1 and for powers of two; what all columns have in common may stay outside, as the alpha of the
module. Among the ways to share them out the one that rounds least is taken (ties: the first), and what it rounds is told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergetool.adapters.sources import source_of
from mergetool.adapters.values import low_rank
from mergetool.checkpoint.names import quoted
from mergetool.errors import NonFiniteError, UsageError
from mergetool.lora.gathering import Module, Piece
from mergetool.lowrank.factored import Factored
from mergetool.lowrank.svd import balanced_factors

_CANCELLED = 1e-6  # below this share of the terms' norms the root of a difference of squares is no longer right to 1e-4
_NOTHING = 2.0**-45  # of the parts' norms: what float64 leaves of a sum in which they cancel


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A pair as it is written: ``down`` [r, n], ``up`` [m, r], ``scale`` multiplies their product, as alpha = scale * r.

    ``norm`` and ``error`` are Frobenius norms: of the exact sum, and of what is stored minus it.
    """

    down: Tensor
    up: Tensor
    scale: float
    norm: float
    error: float

    @property
    def residual(self) -> float:
        """The error over the norm."""
        return self.error / self.norm if self.norm else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class _Columns:
    """The factors of one piece, in the output's dtype, and what multiplies their product."""

    down: Tensor
    up: Tensor
    weight: float
    error: float


def concatenated(module: Module, dtype: torch.dtype) -> Stored:
    """The sum of a module's pieces in ``dtype``.

    Columns that are all zero, such as a fused block-diagonal LoRA has for q, k and v, are dropped with their rows. LoHa, LoKr and whole
    differences become factors first, as many as it takes. Raises UsageError where those would hold more values than the matrix,
    DataError for DoRA and NonFiniteError.
    """
    parts = [_columns(module, piece, dtype) for piece in module.pieces]
    parts = [part for part in parts if len(part.down) and part.weight != 0]
    _check(module, dtype, [factor for part in parts for factor in (part.down, part.up)])
    factors = [Factored.of(part.up, part.down, part.weight) for part in parts]
    norms = [math.sqrt(max(one.inner(one), 0.0)) for one in factors]
    norm = _norm(factors, math.fsum(norms)) if factors else 0.0
    if norm == 0:
        m, n = module.matrix
        return Stored(torch.zeros(0, n, dtype=dtype), torch.zeros(m, 0, dtype=dtype), 1.0, 0.0, 0.0)
    scale = _common(parts, norms)
    ups = [_folded(part.up, part.weight / scale) for part in parts]
    _check(module, dtype, ups)
    errors = [part.error for part in parts]
    for part, up in zip(parts, ups, strict=True):
        if not torch.equal(up.double(), part.up.double() * (part.weight / scale)):
            missed = up.double() * scale - part.up.double() * part.weight
            errors.append(Factored(missed, part.down.double()).norm())
    return Stored(torch.cat([part.down for part in parts]), torch.cat(ups, dim=1), scale, norm, math.hypot(*errors))


def _check(module: Module, dtype: torch.dtype, factors: Sequence[Tensor]) -> None:
    if not all(bool(torch.isfinite(factor).all()) for factor in factors):
        raise NonFiniteError(
            f'factors of "{module.part}" are too large for {str(dtype).removeprefix("torch.")}; write bf16 or fp32 with `dtype`, '
            "or give `rank`, which balances them."
        )


def _norm(factors: Sequence[Factored], size: float) -> float:
    """The norm of a sum whose terms' norms add up to ``size``; 0 where they cancel but for rounding."""
    whole = Factored.sum([(1, one) for one in factors])
    norm = math.sqrt(max(whole.inner(whole), 0.0))
    if norm < _CANCELLED * size:
        norm = whole.norm()
    return norm if norm > _NOTHING * size else 0.0


def _columns(module: Module, piece: Piece, dtype: torch.dtype) -> _Columns:
    adapter = piece.change.adapter
    strength = float(piece.strength)
    source = source_of(piece.file, piece.change)  # refuses what is not finite, and DoRA
    if adapter.kind != "lora":
        most = _worthwhile(module.matrix)
        found = source.truncated(most + 1, name=module.part)
        if found.rank > most:
            raise UsageError(
                f'"{piece.file.name}": {quoted(adapter.module)} ({adapter.kind}) has more than rank {most}, where two factors are '
                "larger than the matrix itself; give `rank`, `rank_thresh` or `budget`."
            )
        down, up = balanced_factors(found, dtype)
        stored = Factored.of(up, down)
        exact = Factored(found.left.double() * found.singular_values, found.right.double())
        return _Columns(down, up, strength, Factored.sum([(1, stored), (-1, exact)]).norm() * abs(strength))
    plain = low_rank(piece.file, piece.change, scaled=False)
    assert plain is not None
    wide_up, wide_down = (torch.from_numpy(values) for values in plain)
    used = (wide_up != 0).any(0) & (wide_down != 0).any(1)
    wide_up, wide_down = wide_up[:, used], wide_down[used]
    weight = strength * adapter.scale
    down, up = wide_down.to(dtype), wide_up.to(dtype)
    return _Columns(down, up, weight, abs(weight) * _rounded(wide_up, wide_down, up, down))


def _worthwhile(shape: tuple[int, int]) -> int:
    """The largest rank whose factors hold no more values than the matrix."""
    m, n = shape
    return m * n // (m + n)


def _rounded(wide_up: Tensor, wide_down: Tensor, up: Tensor, down: Tensor) -> float:
    """What storing a pair in another dtype costs; 0 for the one it came in."""
    if torch.equal(up.float(), wide_up) and torch.equal(down.float(), wide_down):
        return 0.0
    return Factored.sum([(1, Factored.of(up, down)), (-1, Factored.of(wide_up, wide_down))]).norm()


def _folded(up: Tensor, weight: float) -> Tensor:
    return up if weight == 1 else (up.double() * weight).to(up.dtype)


def _common(parts: Sequence[_Columns], norms: Sequence[float]) -> float:
    """What stays outside of all columns: 1, or the size of one weight, whichever leaves least to be rounded.

    Above 0 always: diffusers doubles and halves a scale until it has found a root of it, and never ends with a negative one.
    """

    def loss(scale: float) -> float:
        exact = [
            torch.equal(_folded(part.up, part.weight / scale).double(), part.up.double() * (part.weight / scale))
            for part in parts
        ]
        return math.fsum(norm**2 for norm, fits in zip(norms, exact, strict=True) if not fits)

    # min() takes the first of equals; the weights in order, so that the same LoRAs give the same bytes.
    return min([1.0, *(abs(part.weight) for part in parts)], key=loss)
