"""Sampling trusts no folder: what diffusers and transformers get is checked before them."""

from __future__ import annotations

from pathlib import Path

from tests.hostile import pipelines
from tests.hostile.warm import Warm


def test_no_pipeline_folder_runs_code(warm: Warm, tmp_path: Path) -> None:
    pipelines.run(warm, tmp_path).require(20)


def test_a_loader_that_trusts_folders_is_caught(warm: Warm, tmp_path: Path) -> None:
    assert pipelines.run(warm, tmp_path, patched="trust folders").violations
