"""The result of one matrix of a difference."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mergetool.adapters.formats import factors_of
from mergetool.arch import Family
from mergetool.difference.pairs import Pair
from mergetool.lowrank.decomposition import Decomposition
from mergetool.lowrank.low_rank import LowRank
from mergetool.lowrank.promise import energy_of


@dataclass(frozen=True, slots=True)
class ExtractedLayer:
    """One matrix as it was extracted.

    ``energy`` is the share of its squared Frobenius norm ``total`` that the kept singular values hold, before they are
    rounded; ``residual`` is the Frobenius norm of delta minus the *stored* pair's product, over the delta's.
    ``wanted`` is the rank that the threshold would need where the cap stopped it first. ``missed`` says that the stored pair
    holds less than the threshold because its dtype rounds away more than the threshold leaves. ``shape`` is [out, in], of a
    convolution [out, in * kh * kw]. ``shared`` is, with a second variant, the energy of the common part over that of each delta.
    """

    name: str
    groups: frozenset[str]
    shape: tuple[int, int]
    rank: int
    total: float
    energy: float
    residual: float
    capped: bool
    wanted: int | None
    method: str
    missed: bool = False
    shared: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """A layer and its two tensors by the names they are stored under."""

    layer: ExtractedLayer
    factors: dict[str, torch.Tensor]

    @classmethod
    def of(
        cls,
        pair: Pair,
        found: Decomposition,
        stored: LowRank,
        residual: float,
        family: Family,
        share: float | None = None,
    ) -> Result:
        """The result of ``pair`` whose ``stored`` factors were to hold ``share`` of its energy.

        A convolution's are stored as [r, in, kh, kw] and [m, r, 1, 1], as Kohya's scripts fold it.
        """
        down_key, up_key = factors_of(family, pair.name)
        layer = ExtractedLayer(
            name=pair.name,
            groups=pair.groups,
            shape=pair.shape,
            rank=found.rank,
            total=found.total_energy,
            energy=found.share,
            residual=residual,
            capped=found.capped,
            wanted=found.rank_wanted,
            method=found.method,
            missed=share is not None and not found.capped and energy_of(residual) < share,
        )
        down, up = stored.down, stored.up
        if len(pair.base.shape) == 4:
            down, up = down.reshape(len(down), *pair.base.shape[1:]), up.reshape(*up.shape, 1, 1)
        return cls(layer, {down_key: down, up_key: up} if found.rank else {})

    @classmethod
    def nothing(cls, pair: Pair, total: float) -> Result:
        """The result of ``pair`` where no direction is kept. Its difference has the energy ``total``."""
        return cls(ExtractedLayer(pair.name, pair.groups, pair.shape, 0, total, 0.0, 1.0, False, None, "none"), {})
