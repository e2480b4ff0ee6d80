"""The names of the rules that choose a rank, and the thresholds of each. `rules` defines them."""

from __future__ import annotations

import math
from typing import Literal, get_args

from mergetool.errors import UsageError

RuleName = Literal["energy", "fro", "sum", "ratio", "abs", "knee"]
RULES: tuple[RuleName, ...] = get_args(RuleName)

_SHARES = {"energy": "energy", "fro": "Frobenius norm", "sum": "sum of singular values"}


def share_of(rule: RuleName, threshold: float) -> float | None:
    """The share of the energy that a rule keeps; None where it is not about energy."""
    return {"energy": threshold, "fro": threshold**2}.get(rule)


def require_threshold(rule: RuleName, threshold: float | None) -> None:
    """Raise UsageError for a ``threshold`` that does not suit the ``rule``.

    It can be missing (None), superfluous, or out of range.
    """
    if rule == "knee" and threshold is not None:
        raise UsageError("`rule=knee` has no threshold; leave out `rank_thresh`.")
    if rule in ("ratio", "abs") and threshold is None:
        what = "share of the largest singular value" if rule == "ratio" else "singular value"
        raise UsageError(f"`rule={rule}` needs `rank_thresh`, the {what} above which all are kept.")
    if threshold is None:
        return
    if rule in _SHARES and not 0 < threshold <= 1:
        raise UsageError(f"`rank_thresh` is {threshold}, but a share of the {_SHARES[rule]} is above 0 and at most 1.")
    if rule == "ratio" and not 0 < threshold < 1:
        raise UsageError(
            f"`rank_thresh` is {threshold}, but `rule=ratio` needs a ratio to the largest value: 0 < t < 1."
        )
    if rule == "abs" and not 0 < threshold < math.inf:
        raise UsageError(
            f"`rank_thresh` is {threshold}, but `rule=abs` needs the smallest singular value to keep, above 0."
        )
