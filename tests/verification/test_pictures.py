"""Verdicts: drawn pictures of the right scenes pass; noise, flat, wrong and changed ones are each caught by name."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from mergetool.lab.world import SCENES, Placing, Scene, render
from mergetool.sampler.session import MadePicture
from mergetool.verification.pictures import Column, Verdict, judge, observe

CHOSEN = SCENES[::35]
PROMPTS = [scene.prompt for scene in CHOSEN]


def drawn(scenes: Sequence[Scene] = CHOSEN, radius: float = 18) -> list[NDArray[np.uint8]]:
    return [render(scene, Placing(32, 32, radius)) for scene in scenes]


def column(model: str, pictures: Sequence[NDArray[np.uint8]], scores: float | None = None) -> Column:
    made = [MadePicture(picture, {}) for picture in pictures]
    scorer = None if scores is None else lambda shown, _: [scores] * len(shown)
    return observe(model, model, made, PROMPTS, scorer=scorer)


def failed(verdicts: Sequence[Verdict]) -> set[str]:
    return {verdict.name for verdict in verdicts if verdict.passed is False}


def random(low: int, high: int) -> list[NDArray[np.uint8]]:
    generator = np.random.default_rng(0)
    return [generator.integers(low, high, (64, 64, 3)).astype(np.uint8) for _ in CHOSEN]


def test_right_pictures_pass_every_verdict() -> None:
    verdicts = judge([column("parent", drawn()), column("out", drawn()), column("out", drawn(radius=18.5))], "out")
    assert [verdict.name for verdict in verdicts] == ["noise", "collapsed", "drift", "unlike", "adherence"]
    assert failed(verdicts) == set()


@pytest.mark.parametrize(
    ("pictures", "names"),
    [
        (random(0, 256), {"noise", "unlike", "adherence"}),
        (random(100, 104), {"collapsed", "unlike", "adherence"}),
        (
            [np.where(picture > 127, 255, 0).astype(np.uint8) for picture in random(0, 256)],
            {"collapsed", "unlike", "adherence"},
        ),
        (drawn(SCENES[1::35]), {"adherence"}),
    ],
    ids=["noise", "flat", "burnt", "other scenes"],
)
def test_wrong_pictures_fail_by_name(pictures: list[NDArray[np.uint8]], names: set[str]) -> None:
    assert failed(judge([column("parent", drawn()), column("out", pictures)], "out")) == names


def test_a_few_bad_pictures_are_allowed_and_more_are_not() -> None:
    allowed = len(CHOSEN) // 4
    for bad, expected in ((allowed, set()), (allowed + 1, {"noise"})):
        mixed = [*random(0, 256)[:bad], *drawn()[bad:]]
        found = failed(judge([column("out", mixed)], "out"))
        assert found - {"adherence"} == expected


def test_a_second_stage_that_makes_other_pictures_is_drift() -> None:
    columns = [column("out", drawn()), column("out", drawn([*CHOSEN[1:], CHOSEN[0]]))]
    assert "drift" in failed(judge(columns, "out"))


def test_drift_that_a_parent_shows_as_well_is_no_fault_of_the_merge() -> None:
    turned = drawn([*CHOSEN[1:], CHOSEN[0]])
    parent = [column("parent", drawn()), column("parent", turned)]
    assert "drift" not in failed(judge([*parent, column("out", drawn()), column("out", turned)], "out"))


def test_only_the_merges_own_pictures_are_judged() -> None:
    assert failed(judge([column("parent", random(0, 256)), column("out", drawn())], "out")) == set()


def test_a_score_far_below_the_best_parents_fails() -> None:
    parents = [column("a", drawn(), scores=0.1), column("b", drawn(), scores=0.3)]
    assert failed(judge([*parents, column("out", drawn(), scores=0.25)], "out")) == set()
    assert failed(judge([*parents, column("out", drawn(), scores=0.2)], "out")) == {"score"}


def test_where_nothing_reads_the_prompts_that_is_not_judged() -> None:
    made = [MadePicture(picture, {}) for picture in drawn()]
    verdicts = judge([observe("out", "out", made, ["a knight"] * len(made))], "out")
    (prompts,) = [verdict for verdict in verdicts if verdict.passed is None]
    assert (prompts.name, prompts.word, prompts.value) == ("prompts", "not judged", None)
    assert "`clip`" in prompts.sentence


def test_pictures_unlike_every_parents_fail_where_neither_noise_nor_collapse_is_seen() -> None:
    board = np.indices((64, 64)).sum(axis=0)[..., None] % 2
    checkered = [np.clip(picture * 0.8 + 40 * board, 0, 255).astype(np.uint8) for picture in drawn()]
    found = failed(judge([column("parent", drawn()), column("out", checkered)], "out"))
    assert "unlike" in found
    assert not found & {"noise", "collapsed"}


def test_prompts_outside_the_world_have_no_adherence() -> None:
    made = [MadePicture(picture, {}) for picture in drawn()]
    assert observe("out", "out", made, ["a knight"] * len(made)).adherent is None
