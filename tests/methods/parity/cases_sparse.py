"""Weighted sums, and methods that thin out differences or let them vote before they are added up."""

from __future__ import annotations

from tests.methods.parity.case import Case, Theirs
from tests.methods.parity.peers import mecha, mergekit

MATRICES = ((96, 40), (257,))
"""Where the tensors of more dimensions are cut into rows differently."""

L1 = "mergekit multiplies the rest by the ratio of the sums of magnitudes before and after; the paper divides by density, which keeps the mean for any draw"
VOTES = (
    "sd-mecha's flag is reversed: with vote_sgn=False it lets the elements vote by their number, with True by their sum"
)
REVERSED = "sd-mecha's flag is reversed: with apply_stock=False it also multiplies by model stock's factor of each row, with True it does not"
EXTRA = "sd-mecha keeps one element more than the share k, and all that equal the last: its threshold is the element that should go"
STOCK = "sd-mecha takes the cosine of neighbours alone (1 with 2, 2 with 3), not of all pairs, and of rows, where the paper takes layers"
UNBIASED = "sd-mecha divides the mean of the rest by 1-p as if only one difference could remain; with several the result is larger than their mean"
NEGATIVE = "two rows point away from each other, and mergekit's factor is below 0 (it grows without bound towards a cosine of -1): the result lies beyond the base, away from both; here it is the base"
SMALL = "mergekit takes a product of two norms for at least 1e-6, so that small parameters (here 20 elements of 2e-4) count as less alike than they are"
ENERGY = "mergekit weights all alike when the mean squares add up to less than 1e-6, which differences of fine-tunes often do (here they are 2e-4 in size)"
EARLY = "sd-mecha stops when its float32 sum of distances no longer changes, which is flat there; in float64 it agrees"

LINEAR = [
    Case("linear", mergekit("linear", weight=[1, 0.5, 2]), {"weights": (1, 0.5, 2)}),
    Case(
        "linear", mergekit("linear", weight=[1, 0.5, 2], normalize=False), {"weights": (1, 0.5, 2), "normalize": False}
    ),
    Case("linear", mecha("n_average")),
    Case("weighted_sum", mecha("weighted_sum", alpha=0.3), {"alpha": 0.3}, count=2),
    Case(
        "add_difference",
        Theirs(
            "sd-mecha",
            "add_difference(a, b - c, alpha=0.7)",
            lambda given: mecha("add_difference", alpha=0.7).call([given[0], given[1] - given[2]]),
        ),
        {"alpha": 0.7},
    ),
    Case("task_arithmetic", mergekit("task_arithmetic", base="zero", weight=[1, 0.5, -2]), {"weights": (1, 0.5, -2)}),
]

TIES = [
    Case("ties", mergekit("ties", base="zero", weight=1, density=0.25), {"density": 0.25}),
    Case(
        "ties",
        mergekit("ties", base="zero", weight=[1, 0.5, 2], density=0.25, normalize=False, lambda_=0.7),
        {"density": 0.25, "weights": (1, 0.5, 2), "normalize": False, "scale": 0.7},
    ),
    Case(
        "ties",
        mergekit("ties", base="zero", weight=[1, -0.5, 2], density=0.25),
        {"density": 0.25, "weights": (1, -0.5, 2)},
        why="mergekit divides by the sum of the weights with their signs, so that where the second alone agrees its minus is lost and the result has the sign that was "
        "not elected; here the weights' sizes are added",
    ),
    Case("ties", mecha("ties_sum", k=1.0, vote_sgn=True), {"density": 1, "elect": "sum"}),
    Case("ties", mecha("ties_sum", k=1.0, vote_sgn=False), {"density": 1, "elect": "count"}),
    Case("ties", mecha("ties_sum", k=1.0, vote_sgn=False), {"density": 1, "elect": "sum"}, why=VOTES),
    Case("ties", mecha("ties_sum_extended", k=1.0, vote_sgn=True, apply_stock=True), {"density": 1}),
    Case(
        "ties",
        mecha("ties_sum_extended", k=1.0, vote_sgn=True, apply_stock=False),
        {"density": 1},
        why=REVERSED,
        shapes=((96, 40),),
    ),
    Case("ties", mecha("ties_sum", k=0.25, vote_sgn=True), {"density": 0.25}, why=EXTRA),
    Case("ties", mecha("ties_sum", k=0.25, vote_sgn=True), {"density": 0.26}, shapes=((10, 10),)),
]

RANDOM = [
    Case(
        "dare_linear",
        mergekit("dare_linear", base="zero", weight=[1, 0.5, 2], density=0.3, rescale=False, random=True),
        {"density": 0.3, "weights": (1, 0.5, 2), "rescale": False},
    ),
    Case(
        "dare_linear",
        mergekit("dare_linear", base="zero", weight=1, density=0.3, random=True),
        {"density": 0.3},
        why=L1,
    ),
    Case("dare_linear", mecha("dropout", probability=0.7, random=True), {"density": 0.3}, count=1),
    Case(
        "dare_ties",
        mergekit("dare_ties", base="zero", weight=[1, 0.5, 2], density=0.3, rescale=False, random=True),
        {"density": 0.3, "weights": (1, 0.5, 2), "rescale": False},
    ),
    Case("dare_ties", mergekit("dare_ties", base="zero", weight=1, density=0.3, random=True), {"density": 0.3}, why=L1),
    Case(
        "dare_ties",
        mecha("ties_sum_with_dropout", probability=0.7, k=1.0, vote_sgn=True, apply_stock=True, random=True),
        {"density": 0.3, "normalize": True},
    ),
    Case(
        "dare_ties",
        mecha("ties_sum_with_dropout", probability=0.7, k=1.0, vote_sgn=True, apply_stock=False, random=True),
        {"density": 0.3, "normalize": True},
        why=REVERSED,
        shapes=((96, 40),),
    ),
    Case(
        "della_linear",
        mergekit("della_linear", base="zero", weight=[1, 0.5, 2], density=0.4, epsilon=0.2, rescale=False, random=True),
        {"density": 0.4, "epsilon": 0.2, "weights": (1, 0.5, 2), "rescale": False},
        shapes=MATRICES,
    ),
    Case(
        "della_linear",
        mergekit("della_linear", base="zero", weight=1, density=0.4, epsilon=0.2, random=True),
        {"density": 0.4, "epsilon": 0.2},
        why="mergekit multiplies all that is left by one number; the paper divides each element by its own probability, "
        "without which large elements are made larger than they were and small ones smaller",
        shapes=MATRICES,
    ),
    Case(
        "della_linear",
        mergekit("della_linear", base="zero", weight=1, density=0.4, epsilon=0.2, rescale=False, random=True),
        {"density": 0.4, "epsilon": 0.2, "rescale": False},
        why="mergekit ranks a convolution's elements along its input channels, at each place of the kernel by itself; "
        "here a row is all that belongs to one output",
        shapes=((8, 6, 3, 3),),
    ),
    Case(
        "della",
        mergekit("della", base="zero", weight=[1, 0.5, 2], density=0.4, epsilon=0.2, rescale=False, random=True),
        {"density": 0.4, "epsilon": 0.2, "weights": (1, 0.5, 2), "rescale": False},
        shapes=MATRICES,
    ),
    Case(
        "della",
        mecha(
            "ties_sum_with_dropout",
            probability=0.6,
            della_eps=0.4,
            k=1.0,
            vote_sgn=True,
            apply_stock=True,
            rescale=False,
            random=True,
        ),
        {"density": 0.4, "epsilon": 0.2, "rescale": False},
        why="sd-mecha ranks a matrix as one row, where the paper ranks each row; its epsilon is the whole width, as in the paper, "
        "ours and mergekit's half of it",
        shapes=((96, 40),),
    ),
    Case("dropout", mecha("dropout", probability=0.7, random=True), {"density": 0.3}, count=1),
    Case("dropout", mecha("dropout", probability=0.7, random=True), {"density": 0.3}, why=UNBIASED),
]

OUTLIERS = [
    Case(
        "breadcrumbs",
        mergekit("breadcrumbs", base="zero", weight=[1, 0.5, 2], density=0.25, gamma=0.0125),
        {"density": 0.25, "gamma": 0.0125, "weights": (1, 0.5, 2)},
    ),
    Case(
        "breadcrumbs",
        mergekit("breadcrumbs", base="zero", weight=1, density=0.995, gamma=0.0125),
        {"density": 0.995, "gamma": 0.0125},
        shapes=((40, 25),),
    ),
    Case(
        "breadcrumbs_ties",
        mergekit("breadcrumbs_ties", base="zero", weight=[1, 0.5, 2], density=0.25, gamma=0.0125),
        {"density": 0.25, "gamma": 0.0125, "weights": (1, 0.5, 2)},
    ),
    Case(
        "breadcrumbs",
        mergekit("breadcrumbs", base="zero", weight=1, density=0.29, gamma=0),
        {"density": 0.29, "gamma": 0},
        shapes=((10, 10),),
        why="mergekit keeps int(0.29 * 100) = 28 of 100 elements, the product being 28.999...; here it is 29",
    ),
]

AGREEMENT = [
    Case("sce", mergekit("sce", base="zero", select_topk=1.0)),
    Case("sce", mergekit("sce", base="zero", select_topk=0.25), {"density": 0.25}),
    Case("sce", mergekit("sce", base="zero", select_topk=1.0), size=0.05, why=ENERGY),
    Case("ram", mergekit("ram", base="zero", epsilon=0.002), {"epsilon": 0.002}),
    Case(
        "ramplus_tl",
        mergekit("ramplus_tl", base="zero", epsilon=0.002, r=0.5, alpha=4.0),
        {"epsilon": 0.002, "r": 0.5, "alpha": 4},
    ),
]

WIDE = ((24, 400),)
CENTER = [
    Case("model_stock", mergekit("model_stock", base="zero")),
    Case("model_stock", mergekit("model_stock", base="zero", filter_wise=True), {"filter_wise": True}, shapes=MATRICES),
    Case(
        "model_stock",
        mergekit("model_stock", base="zero", filter_wise=True),
        {"filter_wise": True},
        count=2,
        shapes=((96, 40),),
        why=NEGATIVE,
    ),
    Case("model_stock", mergekit("model_stock", base="zero"), size=0.05, shapes=((20,),), why=SMALL),
    Case("model_stock", mecha("model_stock"), {"filter_wise": True}, count=2, shapes=WIDE),
    Case("model_stock", mecha("model_stock"), {"filter_wise": True}, shapes=WIDE, why=STOCK),
    Case("geometric_median", mecha("geometric_median", double=True)),
    Case("geometric_median", mecha("geometric_median", double=True), inputs="deltas"),
    Case("geometric_median", mecha("geometric_median", double=True), count=7),
    Case("geometric_median", mecha("geometric_median"), inputs="deltas", why=EARLY),
]

CASES = [*LINEAR, *TIES, *RANDOM, *OUTLIERS, *AGREEMENT, *CENTER]
