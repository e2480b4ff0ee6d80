"""Keep a threshold's promise for the stored pair, where rounding took it below.

Rounding both factors takes about 2 (2^-9)^2 / 3 = 3e-6 of the energy in bf16 (at most 5e-6 in the embedded models), 64 times less in
fp16 and nothing to speak of in fp32, hardly depending on the rank. So a threshold that is missed by less is tried again with that added, which needs one direction more where the
spectrum is flat and mostly none; and one that is nearer to 1 than that cannot be met in this dtype, whatever the rank.
"""

from __future__ import annotations

from mergetool.lowrank.decomposition import Decomposition
from mergetool.lowrank.rules import Rule

ATTEMPTS = 4
"""Decompositions of one matrix at most."""

_MARGIN = 1.1


def energy_of(residual: float) -> float:
    """The share of the energy that a stored pair of this residual holds: 1 - residual^2. The residual is relative."""
    return 1.0 - residual**2


def stricter(share: float | None, decomposition: Decomposition, residual: float) -> Rule | None:
    """The rule for another try, so that the stored pair holds ``share`` of the energy.

    None when it does, or never will.

    ``decomposition`` is what was stored, and ``residual`` how it came out. Without a share nothing was promised, nor is it beyond a cap.
    """
    stored = energy_of(residual)
    if share is None or decomposition.capped or stored >= share:
        return None
    wanted = share + _MARGIN * max(decomposition.share - stored, 0.0)
    return Rule("energy", wanted) if wanted < 1.0 else None
