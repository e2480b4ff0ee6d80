"""The bytes of merges with multipliers by group, against numpy on the raw bytes of the files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from mergetool.checkpoint.reader import Checkpoint
from mergetool.engine import job
from mergetool.options.merging import MergeOptions
from mergetool.options.multipliers import parse_setting
from mergetool.verification.weights import check_weights
from tests.families import TINY, checkpoint
from tests.ops import oracle

LAYERS = 5
MERGE = "'alk.safetensors' + 20 * ('a.safetensors' - 'b.safetensors')"


@pytest.fixture
def deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of MERGE with five layers, in the ComfyUI layout: q, k and v are one tensor."""
    for seed, name in enumerate(["alk", "a", "b"]):
        checkpoint(tmp_path / f"{name}.safetensors", variant=seed, config=TINY | {"n_layers": LAYERS})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merged(folder: Path, *settings: str) -> Path:
    options = MergeOptions(multipliers=tuple(map(parse_setting, settings)))
    with job.open_merge(MERGE, options) as plan:
        job.run_merge(plan, folder / "out.safetensors")
    return folder / "out.safetensors"


def values(path: Path, name: str) -> np.ndarray:
    with Checkpoint.open(path) as opened:
        return oracle.decode(opened.read(name), opened.tensors[name].dtype).astype(np.float32)


def assert_is(out: Path, name: str, factor: np.ndarray | float) -> None:
    """The stored bytes are alk + factor * (a - b) in float32, rounded once."""
    alk, a, b = (values(out.with_name(f"{model}.safetensors"), name) for model in ("alk", "a", "b"))
    expected = alk + np.float32(factor) * (a - b)
    with Checkpoint.open(out) as opened:
        assert opened.read(name) == oracle.encode(expected, opened.tensors[name].dtype), name


@pytest.mark.parametrize("settings", [("v=0", "layers.*.attention.q=2"), ("v=0", "layers.q=2")])
def test_q_k_and_v_apart_inside_a_fused_tensor(deep: Path, settings: tuple[str, ...]) -> None:
    out = merged(deep, *settings)
    for layer in range(LAYERS):
        name = f"layers.{layer}.attention.qkv.weight"
        assert_is(out, name, np.repeat(np.float32([40, 20, 0]), values(out, name).size // 3))
    name = "noise_refiner.0.attention.qkv.weight"
    assert_is(out, name, np.repeat(np.float32([20, 20, 0]), values(out, name).size // 3))


def test_a_gradient_over_depth_and_what_it_leaves_alone(deep: Path) -> None:
    out = merged(deep, "layers=smooth(0.5,1)", "layers.*.attention.k=bell(0,1)", "refiner=0")
    smooth = [10, 11.5625, 15, 18.4375, 20]  # 20 * (0.5 + 0.5 * (3x² - 2x³)) at x = 0, 1/4 ... 1
    for layer, (factor, k) in enumerate(zip(smooth, [0, 10, 20, 10, 0], strict=True)):
        assert_is(out, f"layers.{layer}.feed_forward.w1.weight", factor)
        name = f"layers.{layer}.attention.qkv.weight"
        assert_is(out, name, np.repeat(np.float32([factor, k, factor]), values(out, name).size // 3))
    assert_is(out, "noise_refiner.0.feed_forward.w1.weight", 0)
    assert_is(out, "x_embedder.weight", 20)


def test_the_record_is_enough_to_do_it_again(deep: Path) -> None:
    out = merged(deep, "preset:late-layers=2", "layers.*.attention=bell(0.1,1/3)")
    with safe_open(out, "np") as opened:
        recorded = json.loads(opened.metadata()["mergetool.recipe"])["set"]
    assert recorded == ["*=0", "layers=linear(0,2)", "layers.*.attention=bell(0.1,1/3)"]
    assert check_weights(str(out)).sound
