"""Coverage-guided fuzzing of everything that reads bytes of a stranger; every known hole, put in on purpose, is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hostile.fuzzing import BROKEN_RUNS, CI_RUNS, fuzz
from tests.hostile.targets import TARGETS

pytestmark = pytest.mark.loaded


def test_every_target_has_a_number_of_runs() -> None:
    assert CI_RUNS.keys() == TARGETS.keys()


@pytest.mark.parametrize("target", CI_RUNS)
def test_no_input_breaks_a_reader_s_promise(tmp_path: Path, target: str) -> None:
    tally = fuzz(target, CI_RUNS[target], tmp_path)
    tally.require(CI_RUNS[target])


@pytest.mark.parametrize("hole", BROKEN_RUNS)
def test_a_reader_with_a_hole_is_caught(tmp_path: Path, hole: str) -> None:
    target, runs, _ = BROKEN_RUNS[hole]
    tally = fuzz(target, runs, tmp_path, broken=hole)
    assert len(tally.violations) == 1
    assert BROKEN_RUNS[hole][2] in tally.violations[0]
