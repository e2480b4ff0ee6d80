"""The promise of a threshold is about the pair that is stored: what to do where rounding took it below.

Rounding both factors takes about 2 (2^-9)^2 / 3 = 3e-6 of the energy in bf16 (at most 5e-6 in the embedded models), 64 times less in
fp16 and nothing to speak of in fp32, hardly depending on the rank. So a threshold that is missed by less is tried again with that added, which needs one direction more where the
spectrum is flat and mostly none; and one that is nearer to 1 than that cannot be met in this dtype, whatever the rank.
"""

from __future__ import annotations

ATTEMPTS = 4
"""Decompositions of one matrix at most."""

_MARGIN = 1.1


def energy_of(residual: float) -> float:
    """The share of the energy that a stored pair of this relative residual holds: 1 - residual^2."""
    return 1.0 - residual**2


def next_share(share: float, captured: float, residual: float) -> float | None:
    """The share of the energy to ask for so that the stored pair holds ``share``; None when it does, or never will.

    ``captured`` is the share that the singular values hold before they are rounded.
    """
    stored = energy_of(residual)
    if stored >= share:
        return None
    wanted = share + _MARGIN * max(captured - stored, 0.0)
    return wanted if wanted < 1.0 else None
