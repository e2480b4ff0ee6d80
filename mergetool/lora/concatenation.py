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
from mergetool.lora.gathering import Addend, GatheredModule
from mergetool.lowrank.balanced import balanced
from mergetool.lowrank.low_rank import LowRank

_CANCELLED = 1e-6  # below this share of the terms' norms the root of a difference of squares is no longer right to 1e-4
_NOTHING = 2.0**-45  # of the parts' norms: what float64 leaves of a sum in which they cancel


@dataclass(frozen=True, slots=True, eq=False)
class WrittenSum:
    """A sum as written: ``scale`` times the product of its ``factors``.

    ``scale`` stands in the file as alpha = scale * r.

    ``norm`` and ``error`` are Frobenius norms: of the exact sum, and of what is written minus it.
    """

    factors: LowRank
    scale: float
    norm: float
    error: float

    @property
    def residual(self) -> float:
        """The error over the norm."""
        return self.error / self.norm if self.norm else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class _Columns:
    """The factors of one addend, in the output's dtype, and the scale of their product."""

    factors: LowRank
    weight: float
    error: float


def concatenated(module: GatheredModule, dtype: torch.dtype) -> WrittenSum:
    """The sum of a module's addends in ``dtype``.

    Columns that are all zero, such as a fused block-diagonal LoRA has for q, k and v, are dropped with their rows. LoHa, LoKr and whole
    differences become factors first, as many as it takes. Raises UsageError where those would hold more values than the matrix,
    DataError for DoRA and NonFiniteError.
    """
    parts = [_columns(module, addend, dtype) for addend in module.addends]
    parts = [part for part in parts if part.factors.width and part.weight != 0]
    _check(module, dtype, [tensor for part in parts for tensor in (part.factors.down, part.factors.up)])
    weighed = [LowRank.scaled(part.factors.up, part.factors.down, part.weight) for part in parts]
    norms = [math.sqrt(max(one.energy, 0.0)) for one in weighed]
    norm = _norm(weighed, math.fsum(norms)) if weighed else 0.0
    if norm == 0:
        m, n = module.matrix
        return WrittenSum(LowRank(torch.zeros(m, 0, dtype=dtype), torch.zeros(0, n, dtype=dtype)), 1.0, 0.0, 0.0)
    scale = 1.0 if module.keys.no_alpha else _common(parts, norms)
    ups = [_folded(part.factors.up, part.weight / scale) for part in parts]
    _check(module, dtype, ups)
    errors = [part.error for part in parts]
    for part, up in zip(parts, ups, strict=True):
        if not _is_folded(up, part, scale):
            missed = up.double() * scale - part.factors.up.double() * part.weight
            errors.append(LowRank(missed, part.factors.down).norm())
    factors = LowRank(torch.cat(ups, dim=1), torch.cat([part.factors.down for part in parts]))
    return WrittenSum(factors, scale, norm, math.hypot(*errors))


def _check(module: GatheredModule, dtype: torch.dtype, factors: Sequence[Tensor]) -> None:
    if not all(bool(torch.isfinite(factor).all()) for factor in factors):
        raise NonFiniteError(
            f'factors of "{module.part}" are too large for {str(dtype).removeprefix("torch.")}; write bf16 or fp32 with `dtype`, '
            "or give `rank`, which balances them."
        )


def _norm(terms: Sequence[LowRank], size: float) -> float:
    """The norm of a sum whose terms' norms add up to ``size``; 0 where they cancel but for rounding."""
    whole = LowRank.sum([(1, one) for one in terms])
    norm = math.sqrt(max(whole.energy, 0.0))
    if norm < _CANCELLED * size:
        norm = whole.norm()
    return norm if norm > _NOTHING * size else 0.0


def _columns(module: GatheredModule, addend: Addend, dtype: torch.dtype) -> _Columns:
    adapter = addend.change.adapter
    strength = float(addend.strength)
    source = source_of(addend.file, addend.change)  # refuses what is not finite, and DoRA
    if adapter.kind != "lora":
        most = _worthwhile(module.matrix)
        decomposition = source.truncated(most + 1, name=module.part)
        if decomposition.rank > most:
            raise UsageError(
                f'"{addend.file.name}": {quoted(adapter.module)} ({adapter.kind}) has more than rank {most}, where two factors are '
                "larger than the matrix itself; give `rank`, `rank_thresh` or `budget`."
            )
        stored = balanced(decomposition, dtype)
        return _Columns(stored, strength, _distance(stored, LowRank.of(decomposition)) * abs(strength))
    plain = low_rank(addend.file, addend.change, scaled=False)
    assert plain is not None
    exact = LowRank(*(torch.from_numpy(values) for values in plain))
    used = (exact.up != 0).any(0) & (exact.down != 0).any(1)
    exact = LowRank(exact.up[:, used], exact.down[used])
    weight = strength * adapter.scale
    stored = LowRank(exact.up.to(dtype), exact.down.to(dtype))
    return _Columns(stored, weight, abs(weight) * _rounded(exact, stored))


def _worthwhile(shape: tuple[int, int]) -> int:
    """The largest rank whose factors hold no more values than the matrix."""
    m, n = shape
    return m * n // (m + n)


def _rounded(exact: LowRank, stored: LowRank) -> float:
    """The error of storing a pair in another dtype; 0 for its own."""
    if torch.equal(stored.up.float(), exact.up) and torch.equal(stored.down.float(), exact.down):
        return 0.0
    return _distance(stored, exact)


def _distance(stored: LowRank, exact: LowRank) -> float:
    return LowRank.sum([(1, stored), (-1, exact)]).norm()


def _folded(up: Tensor, weight: float) -> Tensor:
    return up if weight == 1 else (up.double() * weight).to(up.dtype)


def _is_folded(up: Tensor, part: _Columns, scale: float) -> bool:
    """Whether ``up`` holds a part's columns at its weight, but for ``scale``, to the last bit."""
    return torch.equal(up.double(), part.factors.up.double() * (part.weight / scale))


def _common(parts: Sequence[_Columns], norms: Sequence[float]) -> float:
    """The scale outside of all columns: 1, or the size of one weight, whichever leaves least to be rounded.

    Above 0 always: diffusers doubles and halves a scale until it has found a root of it, and never ends with a negative one.
    """

    def loss(scale: float) -> float:
        exact = [_is_folded(_folded(part.factors.up, part.weight / scale), part, scale) for part in parts]
        return math.fsum(norm**2 for norm, fits in zip(norms, exact, strict=True) if not fits)

    # min() takes the first of equals; the weights in order, so that the same LoRAs give the same bytes.
    return min([1.0, *(abs(part.weight) for part in parts)], key=loss)
