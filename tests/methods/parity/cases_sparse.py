"""Weighted sums, and what is done to differences before they are added up."""

from __future__ import annotations

from tests.methods.parity.case import Case
from tests.methods.parity.peers import mecha, mergekit

CASES = [
    Case("linear", mergekit("linear", weight=[1, 0.5, 2]), {"weights": (1, 0.5, 2)}),
    Case(
        "linear", mergekit("linear", weight=[1, 0.5, 2], normalize=False), {"weights": (1, 0.5, 2), "normalize": False}
    ),
    Case("linear", mecha("n_average")),
    Case("weighted_sum", mecha("weighted_sum", alpha=0.3), {"alpha": 0.3}, count=2),
    Case("task_arithmetic", mergekit("task_arithmetic", base="zero", weight=[1, 0.5, -2]), {"weights": (1, 0.5, -2)}),
]
