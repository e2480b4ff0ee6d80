"""Interpolation on spheres."""

from __future__ import annotations

from tests.methods.parity.case import Case
from tests.methods.parity.peers import mecha, mergekit

MATRIX = ((96, 40), (257,))

CASES = [
    Case("slerp", mergekit("slerp", base="first", t=0.3), {"t": 0.3}, count=2, inputs="deltas"),
    Case("slerp", mecha("slerp", alpha=0.3), {"t": 0.3, "sizes": "line"}, count=2),
    Case("slerp", mecha("slerp", alpha=1.4), {"t": 1.4, "sizes": "line"}, count=2, inputs="deltas"),
    Case("nuslerp", mergekit("nuslerp", weight=[1, 3]), {"t": 0.75}, count=2),
    Case(
        "nuslerp",
        mergekit("nuslerp", weight=[1, 3], nuslerp_flatten=False, nuslerp_row_wise=True),
        {"t": 0.75, "per": "column"},
        count=2,
        shapes=MATRIX,
    ),
    Case(
        "nuslerp",
        mergekit("nuslerp", weight=[1, 3], nuslerp_flatten=False),
        {"t": 0.75, "per": "row"},
        count=2,
        shapes=MATRIX,
    ),
    Case("multislerp", mergekit("multislerp", weight=[1, 0.5, 2]), {"weights": (1, 0.5, 2)}),
    Case(
        "multislerp", mergekit("multislerp", base="zero", weight=[1, 0.5, 2]), {"weights": (1, 0.5, 2)}, inputs="deltas"
    ),
    Case("karcher", mergekit("karcher", max_iter=10, tol=1e-5), {"iterations": 10, "tolerance": 1e-5}, rounding=2e-6),
    Case("karcher", mergekit("karcher", max_iter=50, tol=1e-7), inputs="deltas", rounding=2e-6),
]
