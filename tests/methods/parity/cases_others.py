"""Gates, bounds, filters and linear algebra."""

from __future__ import annotations

from typing import Any

import sd_mecha

from tests.methods.parity.case import Case, Theirs
from tests.methods.parity.peers import mecha, mergekit

_MASK = mecha("train_difference_mask", alpha=0.7)
TRAINED = Theirs(
    "sd-mecha",
    "a + train_difference_mask(a, b, c, alpha=0.7) * (b - c)",
    lambda given: given[0] + _MASK.call([each.clone() for each in given]) * (given[1] - given[2]),
)
_PERPENDICULAR = mecha("perpendicular_component")
SWAPPED = Theirs("sd-mecha", "perpendicular_component(b, a)", lambda given: _PERPENDICULAR.call(given[::-1]))

_FUSED = mergekit("arcee_fusion", base="first")
FUSED_IN_DOUBLE = Theirs(
    "mergekit",
    "arcee_fusion() in float64",
    lambda given: _FUSED.call([each.double() for each in given]).float(),
)


def _truncated(**options: Any) -> Theirs:
    function = sd_mecha.extensions.merge_methods.resolve("truncate_rank").__wrapped__
    text = ", ".join(f"{name}={value}" for name, value in options.items())
    return Theirs("sd-mecha", f"truncate_rank({text})", lambda given: function(*given, **options))


CASES = [
    Case("nearswap", mergekit("nearswap", base="first", t=0.002), {"t": 0.002}, count=2),
    Case("arcee_fusion", FUSED_IN_DOUBLE, count=2),
    Case("arcee_fusion", _FUSED, count=2, shapes=((257,), (8, 6, 3, 3))),
    Case(
        "arcee_fusion",
        _FUSED,
        count=2,
        shapes=((96, 40),),
        why="mergekit: float32 keeps one or two digits of divergences of 1e-6, so that some elements fall on the other side of the threshold; "
        "in float64 it agrees",
    ),
    Case("add_cosine_a", mecha("add_cosine_a", alpha=0.25), {"alpha": 0.25}, count=2),
    Case("add_cosine_b", mecha("add_cosine_b", alpha=0.25), {"alpha": 0.25}, count=2),
    Case("train_difference", TRAINED, {"alpha": 0.7}),
    Case("perpendicular", SWAPPED, count=2),
    Case("clamp", mecha("clamp"), count=4),
    Case("clamp", mecha("clamp", stiffness=0.6), {"stiffness": 0.6}, count=4),
    Case("geometric_sum", mecha("geometric_sum", alpha=0.3), {"alpha": 0.3}, count=2),
    Case("multiply_quotient", mecha("multiply_quotient", alpha=0.8), {"alpha": 0.8}),
    *(
        Case("crossover", mecha("crossover", alpha=0.37, tilt=tilt), {"alpha": 0.37, "tilt": tilt}, count=2)
        for tilt in (0.0, 0.4, 1.0, 1.7)
    ),
    Case(
        "crossover",
        mecha("crossover", alpha=0.37, tilt=2.0),
        {"alpha": 0.37, "tilt": 2.0},
        count=2,
        why="sd-mecha: the filter at exactly 2 cuts at 1-alpha, those on either side of it at alpha",
    ),
    Case("crossover", mecha("crossover", alpha=0.37, tilt=3.2), {"alpha": 0.37, "tilt": 0.8}, count=2),
    # the fifth and sixth singular value are 1 % apart, so that float32 turns the directions by up to 1e-5
    Case("truncate_rank", _truncated(rank=5, use_approximate_basis=False), {"rank": 5}, count=1, rounding=1e-4),
    Case(
        "truncate_rank",
        _truncated(rank=5, approximate_basis_seed=0),
        {"rank": 5},
        count=1,
        shapes=((96, 40), (8, 6, 3, 3)),
        why="sd-mecha: by default a random basis of 5 directions after two power iterations, which a flat spectrum keeps away from the strongest",
    ),
]
