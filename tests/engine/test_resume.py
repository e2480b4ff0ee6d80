"""A merge that was stopped goes on from what it had finished, and makes the bytes of one that was not."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mergetool.checkpoint import journal
from mergetool.checkpoint.files import StagedFile
from mergetool.engine import job
from mergetool.engine.runs import Outcome
from mergetool.errors import StorageError, UsageError
from mergetool.options.merging import MergeOptions
from tests.checkpoint.faults import beside, content_of

EXPRESSION = "'alk.safetensors' + 20*('a.safetensors' - 'b.safetensors')"


class Stopped(Exception):
    pass


@pytest.fixture(autouse=True)
def short_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "INTERVAL", 50_000)


def merge(
    output: Path, options: MergeOptions, progress: Callable[[int], None] = lambda _: None, **how: bool
) -> Outcome:
    with job.open_merge(EXPRESSION, options) as plan:
        return job.run_merge(plan, output, threads=2, progress=progress, **how)


def stop_before_the_end(monkeypatch: pytest.MonkeyPatch, output: Path, options: MergeOptions) -> str:
    """A run that fails when it is about to publish: what it says of what is kept."""

    def refuse(staged: StagedFile) -> None:
        raise StorageError("the disk failed.")

    with monkeypatch.context() as patch:
        patch.setattr(StagedFile, "prepare", refuse)
        with pytest.raises(StorageError) as caught:
            merge(output, options, resume=True)
    return "".join(getattr(caught.value, "__notes__", []))


@pytest.mark.parametrize(
    "options",
    [
        MergeOptions(),
        MergeOptions(rounding="stochastic", seed=3),
        MergeOptions(quant="fp8-scaled"),
        MergeOptions(quant="nvfp4", scale_search=True),
        MergeOptions(quant="int8"),
    ],
    ids=["plain", "stochastic", "fp8-scaled", "nvfp4", "int8"],
)
def test_resumed_bytes_are_those_of_one_run(
    family: Path, monkeypatch: pytest.MonkeyPatch, options: MergeOptions
) -> None:
    whole, output = family / "whole.safetensors", family / "out.safetensors"
    merge(whole, options)
    assert "bytes of finished tensors are kept" in stop_before_the_end(monkeypatch, output, options)
    ((stage,), locks) = beside(output)
    assert locks == []
    finished = journal.entries(stage)
    assert len(finished) > 10
    # Only half of it: a run that ends earlier.
    lines = journal.place(stage).read_bytes().splitlines(keepends=True)
    journal.place(stage).write_bytes(b"".join(lines[: len(lines) // 2]))
    moved: list[int] = []
    outcome = merge(output, options, progress=moved.append, resume=True)
    assert outcome.resumed > 50_000
    assert outcome.begun_anew is None
    assert content_of(output) == content_of(whole)
    assert beside(output) == ([], [])
    assert moved[0] > 50_000  # what was kept is told at once


def test_without_resume_the_stage_is_removed(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = family / "out.safetensors"
    stop_before_the_end(monkeypatch, output, MergeOptions())
    assert beside(output)[0] != []
    merge(output, MergeOptions())
    assert beside(output) == ([], [])


def test_other_options_begin_anew(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, output = family / "whole.safetensors", family / "out.safetensors"
    merge(whole, MergeOptions(rounding="stochastic", seed=4))
    stop_before_the_end(monkeypatch, output, MergeOptions(rounding="stochastic", seed=3))
    outcome = merge(output, MergeOptions(rounding="stochastic", seed=4), resume=True)
    assert (outcome.resumed, outcome.begun_anew) == (0, "it was of another recipe")
    assert content_of(output) == content_of(whole)
    assert beside(output) == ([], [])


def test_input_that_was_written_meanwhile_begins_anew(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = family / "out.safetensors"
    stop_before_the_end(monkeypatch, output, MergeOptions())
    ((stage,), _) = beside(output)
    later = time.time() + 5
    os.utime(family / "a.safetensors", (later, later))
    with job.open_merge(EXPRESSION, MergeOptions()) as plan:
        assert journal.differs(stage, job._work(plan, "refuse")) == "it was of other inputs"


def test_stopped_before_anything_is_finished_leaves_nothing(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "INTERVAL", 1 << 40)

    def stop(moved: int) -> None:
        raise Stopped

    with pytest.raises(Stopped) as caught:
        merge(family / "out.safetensors", MergeOptions(), progress=stop, resume=True)
    assert not hasattr(caught.value, "__notes__")
    assert beside(family / "out.safetensors") == ([], [])


def test_several_outputs_are_not_resumed(family: Path) -> None:
    with (
        job.open_merges([(EXPRESSION, MergeOptions()), ("'a.safetensors'", MergeOptions())]) as plans,
        pytest.raises(UsageError, match="one output can be resumed"),
    ):
        job.run_merges(plans, [family / "one.safetensors", family / "two.safetensors"], resume=True)
