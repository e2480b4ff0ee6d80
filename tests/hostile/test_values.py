"""No value is lost or invented in silence, whatever the method."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergetool.ops.cpu import CpuOps
from tests.hostile import values


def test_what_is_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    values.plant(tmp_path).require(200)


def test_a_program_that_does_not_look_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuOps, "is_finite", lambda self, register: True)
    assert any("silence" in violation for violation in values.plant(tmp_path, 3).violations)


def test_integers_and_booleans_are_the_first_model_s(tmp_path: Path) -> None:
    values.blend(tmp_path).require(300)
