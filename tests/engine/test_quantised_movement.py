"""What a merge into a quantised container did to the first model, against the same sums over the stored file in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from safetensors.torch import load_file

from mergetool.checkpoint import dtypes
from mergetool.checkpoint.reader import Checkpoint
from mergetool.engine import job, jobs
from mergetool.ops.movement import Movement
from mergetool.options.merging import MergeOptions
from tests.families import TINY, checkpoint
from tests.ops import oracle

NAME = "layers.0.feed_forward.w2.weight"
WIDE = {"dim": 256, "n_heads": 8, "axes_dims": [8, 12, 12]}


@pytest.fixture
def random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.random.Generator:
    monkeypatch.chdir(tmp_path)
    checkpoint(Path("model.safetensors"), config=TINY | WIDE)
    return np.random.default_rng(3)


def merged(random: np.random.Generator, half_steps: float, rounding: str) -> tuple[Movement, np.ndarray, np.ndarray]:
    """A base, and a delta whose RMS is so many half steps of scaled FP8 around each weight, merged into scaled FP8.

    Returns the summary's figures, the wanted delta, and by how much the file moved from the base's own quantised values.
    """
    model = {name: tensor.float().numpy() for name, tensor in load_file("model.safetensors").items()}
    base = (random.standard_normal(model[NAME].shape) * 0.02).astype(np.float32)
    base[0, 0] = 0.12  # the largest, whatever the delta: one scale for all
    scale = np.float32(base[0, 0] / np.float32(448))
    codes = oracle.decode(oracle.encode(base / scale, dtypes.F8_E4M3), dtypes.F8_E4M3).astype(np.float32)
    base = (codes * scale).reshape(base.shape)  # between its steps a base would be its own dither
    half = np.exp2(np.maximum(np.floor(np.log2(np.maximum(np.abs(codes), 2**-9))), -6) - 4).reshape(base.shape) * scale
    delta = (random.standard_normal(base.shape) * half * half_steps).astype(np.float32)
    delta[0, 0] = 0
    np.clip(delta, -0.1 - base, 0.1 - base, out=delta, where=np.arange(base.size).reshape(base.shape) > 0)
    save_file(model | {NAME: base}, "base.safetensors")
    save_file(model | {NAME: base + delta}, "tuned.safetensors")
    options = MergeOptions(quant="fp8-scaled", rounding=rounding, seed=5 if rounding == "stochastic" else 0)  # type: ignore[arg-type]
    with job.open_merge("'base.safetensors' + 1*('tuned.safetensors' - 'base.safetensors')", options) as plan:
        found = job.run_merge(plan, Path("out.safetensors"), overwrite=True).movements.tensors()[NAME]
    with job.open_merge("'base.safetensors'", MergeOptions(quant="fp8-scaled")) as plan:
        job.run_merge(plan, Path("alone.safetensors"), overwrite=True)
    result = base + ((base + delta) - base)
    return found, result - base, dequantised("out.safetensors") - dequantised("alone.safetensors")


def dequantised(path: str) -> np.ndarray:
    """Scaled FP8 read by its definition: the code's value, of OFP8, times the scale."""
    with Checkpoint.open(Path(path)) as opened:
        info = opened.tensors[NAME]
        codes = oracle.decode(opened.read(NAME, 0, info.nbytes), dtypes.F8_E4M3)
        scale = np.frombuffer(opened.read(f"{NAME.removesuffix('.weight')}.weight_scale", 0, 4), np.float32)[0]
    return (codes.astype(np.float32) * scale).reshape(info.shape)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "error-feedback"])
@pytest.mark.parametrize("half_steps", [0.1, 1, 10])
def test_the_summarys_figures_are_those_of_the_file(
    random: np.random.Generator, half_steps: float, rounding: str
) -> None:
    found, delta, kept = merged(random, half_steps, rounding)
    d, g = delta.astype(np.float64), kept.astype(np.float64)
    moved = d != 0
    assert found.moved == moved.sum()
    assert found.eaten == (g[moved] == 0).sum()
    assert found.delta_energy == pytest.approx((d * d).sum(), rel=1e-9)
    assert found.projection == pytest.approx((d * g).sum() / (d * d).sum(), rel=1e-6)


def test_what_nearest_loses_stochastic_keeps(random: np.random.Generator) -> None:
    nearest, *_ = merged(random, 0.1, "nearest")
    stochastic, *_ = merged(random, 0.1, "stochastic")
    assert nearest.projection < 0.05
    assert stochastic.projection == pytest.approx(1, abs=0.1)
    assert nearest.below_half_ulp > 0.9 * nearest.moved


def test_large_weights_are_measured_on_an_eighth_of_their_pieces(
    random: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "CHUNK", 128 * 10)
    found, delta, _ = merged(random, 1, "nearest")
    assert len(delta) == 256
    assert found.moved == np.count_nonzero(delta[:128])
