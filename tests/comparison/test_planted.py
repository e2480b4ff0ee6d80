"""Planted lineages: no stranger is missed, no relative called a stranger, and the nearest ancestor is named."""

from __future__ import annotations

import pytest

from tests.comparison import planted


@pytest.mark.parametrize("name", ["SD3", "Flux.1", "Z-Image"])
def test_every_ordered_pair_of_a_planted_family_is_judged_right(name: str) -> None:
    counts = planted.judged(planted.family(name, seed=7))
    assert counts["pairs"] == 90
    assert counts["strangers"] == 18
    assert counts["nearer ones due"] > 30
    assert {key: count for key, count in counts.items() if count and key.endswith(("missed", "strangers", "need"))} == {
        "strangers": 18
    }
