"""The rules that choose a rank, each against its definition written out in numpy, and the certificate of a cut."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from mergetool.errors import UsageError
from mergetool.lowrank import above, svd
from mergetool.lowrank.balanced import balanced
from mergetool.lowrank.decomposition import Decomposition
from mergetool.lowrank.krylov import Products, orthonormal_rows
from mergetool.lowrank.norms import squared_norm
from mergetool.lowrank.rules import Rule
from mergetool.lowrank.svd import decompose
from mergetool.lowrank.thresholds import RULES, RuleName
from mergetool.options.differences import DiffOptions
from tests.lowrank.contract import SPECTRA, Float64, Planted, noisy_layer, planted, true_energy, with_spectrum


def _fewest(shares: Float64, t: float) -> int:
    return next(i + 1 for i, share in enumerate(shares) if share >= t * (1 - 1e-12))


DEFINITIONS: dict[str, Callable[[Float64, float], int]] = {
    "energy": lambda s, t: _fewest(np.cumsum(s**2) / np.sum(s**2), t),
    "fro": lambda s, t: _fewest(np.sqrt(np.cumsum(s**2) / np.sum(s**2)), t),
    "sum": lambda s, t: _fewest(np.cumsum(s) / np.sum(s), t),
    "ratio": lambda s, t: sum(1 for value in s if value > t * s[0]),
    "abs": lambda s, t: sum(1 for value in s if value > t),
    "knee": lambda s, t: max(_before_the_knee(s), 1),
}


def _before_the_knee(s: Float64) -> int:
    """Distances of the points (i, s_i) from the straight line through the first and the last, by the cross product."""
    points = np.stack([np.linspace(0, 1, len(s)), (s - s[-1]) / (s[0] - s[-1])], axis=1)
    along = (points[-1] - points[0]) / np.linalg.norm(points[-1] - points[0])
    away = points - points[0]
    return int(np.argmax(away[:, 1] * along[0] * -1 + away[:, 0] * along[1]))


CASES: list[tuple[RuleName, float]] = [
    ("energy", 0.9),
    ("energy", 0.997),
    ("fro", 0.9),
    ("fro", 0.99),
    ("sum", 0.3),
    ("sum", 0.93),
    ("ratio", 0.47),
    ("ratio", 0.093),
    ("ratio", 0.013),
    ("abs", 0.1307),
    ("abs", 0.0213),
    ("knee", 0.95),
]


@functools.cache
def values(spectrum: str) -> Float64:
    return np.sqrt(planted(spectrum).energies)


@pytest.mark.parametrize("spectrum", sorted(set(SPECTRA) - {"flat"}))  # whose values are equal: their knee is anywhere
@pytest.mark.parametrize(("rule", "t"), CASES)
def test_a_rule_keeps_what_its_definition_says(rule: RuleName, t: float, spectrum: str) -> None:
    expected = DEFINITIONS[rule](values(spectrum), t)
    assert Rule(rule, t).rank(values(spectrum) ** 2) == expected
    for delta in (planted(spectrum).delta, planted(spectrum).delta.T.contiguous()):
        found = decompose(delta, name="w", rule=Rule(rule, t))
        assert expected <= found.rank <= expected * 1.01
        assert not found.capped


def test_every_rule_is_defined_in_the_tests_and_in_the_help() -> None:
    from mergetool.cli.diff import EXAMPLES

    assert set(DEFINITIONS) == set(RULES)
    assert all(f"\n  {rule} " in EXAMPLES for rule in RULES)


@pytest.mark.parametrize("rule", ["sum", "ratio", "abs", "knee"])
def test_kept_directions_are_those_of_the_whole_spectrum(rule: RuleName) -> None:
    known = planted("noise floor 3 %")
    found = decompose(known.delta, name="w", rule=Rule(rule, 0.11))
    assert found.rank > 1
    np.testing.assert_allclose(found.singular_values, np.sqrt(known.energies[: found.rank]), rtol=1e-4)
    assert true_energy(known.delta, found) == pytest.approx(known.best(found.rank), rel=1e-5)
    assert found.captured_energy == pytest.approx(known.best(found.rank), rel=1e-5)


@pytest.mark.parametrize(("rule", "t"), [("ratio", 0.2), ("abs", 0.1), ("energy", 0.6), ("fro", 0.8)])
def test_a_rule_about_strong_directions_decomposes_nothing_whole(
    rule: RuleName, t: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("spectrum", "whole_spectrum"):
        monkeypatch.setattr(svd, name, lambda *_: pytest.fail("the whole spectrum was computed"))
    found = decompose(noisy_layer().delta, name="w", rule=Rule(rule, t))
    assert found.rank == DEFINITIONS[rule](np.sqrt(noisy_layer().energies), t)
    assert found.method == "krylov"


def test_a_cut_inside_a_flat_tail_is_left_to_the_whole_spectrum() -> None:
    found = decompose(noisy_layer().delta, name="w", rule=Rule("ratio", 0.05))
    assert (found.rank, found.method) == (DEFINITIONS["ratio"](np.sqrt(noisy_layer().energies), 0.05), "gram")
    assert found.spectrum is not None
    np.testing.assert_allclose(found.spectrum, np.sqrt(noisy_layer().energies), rtol=1e-4)


@pytest.mark.parametrize("missing", [0, 5, 15])
def test_directions_that_lack_one_above_the_cut_get_no_certificate(missing: int) -> None:
    known = noisy_layer()
    right = torch.linalg.svd(known.delta.double(), full_matrices=False)[2][:60]
    wanted = 0.2**2 * float(known.energies[0])
    products = Products(known.delta, known.delta, known.total)
    generator = torch.Generator().manual_seed(1)
    whole = above.above(products, right, lambda _: wanted, generator)
    assert whole is not None
    assert whole[1] == int((known.energies > wanted).sum())
    lacking = torch.cat([right[:missing], right[missing + 1 :]])
    assert above.above(products, lacking, lambda _: wanted, generator) is None


def test_directions_tilted_out_of_the_delta_get_no_certificate() -> None:
    # One direction of the projection lies just below the cut, because half of it looks elsewhere.
    delta = with_spectrum(500, 300, np.array([1.0, 0.5, 0.1]), noise=1e-4)
    right = torch.linalg.svd(delta.double(), full_matrices=False)[2]
    tilted = right[:3].clone()
    tilted[1] = (right[1] + right[200]) / 2**0.5
    products = Products(delta, delta, squared_norm(delta))
    first = float(np.linalg.svd(delta.double().numpy(), compute_uv=False)[0])
    found = above.above(
        products, orthonormal_rows(tilted), lambda _: (0.45 * first) ** 2, torch.Generator().manual_seed(1)
    )
    assert found is None or found[1] == 2


def test_an_absolute_cut_follows_the_scale_of_the_weights() -> None:
    known = planted("noise floor 0.1 %")
    for scale in (1e-25, 1e25):  # beyond what products in float32 bear unscaled
        found = decompose(known.delta * scale, name="w", rule=Rule("abs", 0.1 * scale))
        assert found.rank == DEFINITIONS["abs"](values("noise floor 0.1 %"), 0.1)


def test_a_cut_above_every_value_keeps_nothing() -> None:
    found = decompose(planted("fast").delta, name="w", rule=Rule("abs", 5.0))
    stored = balanced(found, torch.bfloat16)
    assert (found.rank, found.captured_energy, stored.down.shape[0], stored.up.shape[1]) == (0, 0.0, 0, 0)
    assert found.lost_energy == pytest.approx(found.total_energy)


@pytest.mark.parametrize(("rule", "t"), [("sum", 0.9), ("ratio", 0.05), ("abs", 0.02), ("knee", 0.95)])
def test_a_cap_stops_every_rule_and_is_said(rule: RuleName, t: float) -> None:
    known = planted("power law")
    found = decompose(known.delta, name="w", rule=Rule(rule, t), rank_max=7)
    assert (found.rank, found.capped) == (7, True)
    assert found.rank_wanted in (None, DEFINITIONS[rule](values("power law"), t))
    assert known.best(7) - found.captured_energy < 1e-3 * known.total


@pytest.mark.parametrize("rule", ["energy", "fro", "ratio", "abs"])
def test_directions_that_were_kept_in_bf16_give_the_rank_without_a_search(
    rule: RuleName, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = planted("noise floor 0.1 %")
    rows = decompose(known.delta, name="w", rank=40).right.bfloat16()
    monkeypatch.setattr(svd, "Search", lambda *_: pytest.fail("a search was made"))
    monkeypatch.setattr(svd, "strongest_above", lambda *_: pytest.fail("a search was made"))
    t = 0.1 if rule in ("ratio", "abs") else 0.99
    found = decompose(known.delta, name="w", rule=Rule(rule, t), rows=rows)
    assert (found.rank, found.method) == (DEFINITIONS[rule](values("noise floor 0.1 %"), t), "stored")


@pytest.mark.parametrize("options", [{"rank": 12}, {"rule": Rule(threshold=0.999)}, {"rule": Rule("ratio", 0.1)}])
def test_too_few_directions_lead_to_a_search(options: dict[str, float]) -> None:
    known = planted("noise floor 0.1 %")
    plain = decompose(known.delta, name="w", **options)  # type: ignore[arg-type]
    some = decompose(known.delta, name="w", rank=5).right
    found = decompose(known.delta, name="w", rows=some, **options)  # type: ignore[arg-type]
    assert (found.rank, found.captured_energy) == (plain.rank, pytest.approx(plain.captured_energy, rel=1e-5))


@pytest.mark.parametrize("options", [{"rule": Rule(threshold=0.99)}, {"rule": Rule("ratio", 0.1)}])
def test_useless_directions_lead_to_no_untruth(options: dict[str, float]) -> None:
    known = planted("noise floor 0.1 %")
    useless = torch.randn(40, 199, generator=torch.Generator().manual_seed(5))
    found = decompose(known.delta, name="w", rows=useless, **options)  # type: ignore[arg-type]
    assert found.rank == decompose(known.delta, name="w", **options).rank  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rule", "t"),
    [
        *(("energy", t) for t in (0.0, 1.1, math.nan)),
        *(("ratio", t) for t in (0.0, 1.0, math.nan)),
        *(("abs", t) for t in (0.0, math.inf, math.nan)),
        ("fro", -0.1),
        ("sum", 2.0),
        ("median", 0.5),
    ],
)
def test_a_threshold_that_a_rule_cannot_mean_is_refused(rule: RuleName, t: float) -> None:
    with pytest.raises(UsageError, match=r"`rank_thresh` is|`rule` is .*one of"):
        DiffOptions(rule=rule, rank_thresh=t)


@pytest.mark.parametrize(
    "options", [{"rank": 4, "rule": "sum"}, {"budget": 1, "rank": 4}, {"budget": 1, "rule": "sum"}]
)
def test_two_ways_of_choosing_ranks_at_once_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="leave out"):
        DiffOptions(**options)  # type: ignore[arg-type]


def test_part_of_a_spectrum_decides_only_where_it_can() -> None:
    energies = np.array([4.0, 1.0, 0.25])
    assert Rule("energy", 0.9).rank(energies, 5.5) == 2
    assert Rule("energy", 0.99).rank(energies, 5.5) is None
    assert Rule("ratio", 0.4).rank(energies, 5.5) == 2
    assert Rule("ratio", 0.2).rank(energies, 5.5) is None
    with pytest.raises(ValueError, match="whole spectrum"):
        Rule("sum", 0.5).rank(energies, 5.5)


def test_equal_values_have_no_knee_and_are_all_kept() -> None:
    assert Rule("knee").rank(np.ones(9)) == 9


def test_stated_spectrum_is_that_of_numpy_at_any_scale() -> None:
    known: Planted = planted("power law")
    found: Decomposition = decompose(known.delta * 1e-30, name="w", rule=Rule("sum", 0.5))
    assert found.spectrum is not None
    np.testing.assert_allclose(found.spectrum / 1e-30, np.sqrt(known.energies), rtol=1e-4)
