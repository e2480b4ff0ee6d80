"""No value is lost or invented in silence, whatever the method."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergetool.checkpoint import dtypes, header
from mergetool.ops.cpu import CpuOps
from mergetool.recipe.plan import Plan
from tests.hostile import values


def test_what_is_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    values.plant(tmp_path).require(200)


def test_a_program_that_does_not_look_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuOps, "is_finite", lambda self, register: True)
    assert any("silence" in violation for violation in values.plant(tmp_path, 3).violations)


def test_integers_and_booleans_are_the_anchors(tmp_path: Path) -> None:
    values.blend(tmp_path).require(300)


def test_a_reader_that_takes_integers_for_floats_of_their_width_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    floats = {8: dtypes.F8_E4M3, 16: dtypes.BF16, 32: dtypes.F32, 64: dtypes.F64}
    taken = {code: floats[dtypes.BY_CODE[code].bits] for code in values.NOT_BLENDED}
    monkeypatch.setattr(header, "BY_CODE", {**dtypes.BY_CODE, **taken})
    found = values.blend(tmp_path, only=["sum"]).violations
    assert found == [f"ids.{code} by sum is not the anchor's" for code in values.NOT_BLENDED]


def test_a_plan_that_does_not_name_what_is_kept_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plan, "reasons", lambda plan: {"merged": [tensor.name for tensor in plan.tensors]})
    found = values.blend(tmp_path, only=["sum"]).violations
    assert found == [f"ids.{code} by sum is not named as kept" for code in values.NOT_BLENDED]
