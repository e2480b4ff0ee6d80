"""Method calls in a merge: on whole parameters, whatever the layout, the threads or what else the expression adds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mergetool.checkpoint import dtypes
from mergetool.checkpoint.reader import Checkpoint
from mergetool.engine import job, memory
from mergetool.engine.device import Device
from mergetool.engine.method_calls import Caller
from mergetool.ops.program import Apply
from mergetool.options.merging import MergeOptions
from mergetool.verification.weights import check_weights
from tests.families import checkpoint
from tests.ops import oracle

F32 = MergeOptions(dtype=dtypes.F32)
QKV = "layers.0.attention.qkv.weight"


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three fine-tunes of one base in the working folder, far enough apart for arcs to be arcs."""
    for seed, name in enumerate(["a", "b", "base"]):
        checkpoint(tmp_path / f"{name}.safetensors", variant=seed, relative=0.8)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(text: str, output: Path, options: MergeOptions | None = None, **how: object) -> Path:
    for name in ("a", "b", "base"):
        text = text.replace(f"<{name}>", f"'{name}.safetensors'")
    with job.open_merge(text, options) as plan:
        job.run_merge(plan, output, **how)  # type: ignore[arg-type]
    return output


def values(path: Path, name: str) -> np.ndarray:
    with Checkpoint.open(path) as opened:
        info = opened.tensors[name]
        return oracle.decode(opened.read(name), info.dtype).reshape(info.shape)


def slerp(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    angle = np.arccos((a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b)))
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def test_q_k_and_v_of_a_fused_tensor_are_parameters_of_their_own(family: Path) -> None:
    found = values(run("slerp(<a>, <b>, t=0.3)", family / "out.safetensors", F32), QKV)
    a, b = values(family / "a.safetensors", QKV), values(family / "b.safetensors", QKV)
    expected = np.concatenate([slerp(x, y, 0.3) for x, y in zip(np.split(a, 3), np.split(b, 3), strict=True)])
    np.testing.assert_allclose(found, expected, rtol=0, atol=4e-7 * np.abs(expected).max())
    assert np.abs(slerp(a, b, 0.3) - expected).max() > 1e-5  # what one arc for all three would give


def test_a_call_is_one_term_of_the_arithmetic_around_it(family: Path) -> None:
    whole = run("<base> + 0.5*slerp(<a> - <base>, <b> - <base>, t=0.3)", family / "out.safetensors", F32)
    name = "layers.1.feed_forward.w2.weight"
    a, b, base = (values(family / f"{model}.safetensors", name) for model in ("a", "b", "base"))
    expected = base + 0.5 * slerp(a - base, b - base, 0.3)
    np.testing.assert_allclose(values(whole, name), expected, rtol=0, atol=4e-7 * np.abs(expected).max())


def test_base_is_short_for_the_differences_with_it(family: Path) -> None:
    short = run("task_arithmetic(<a>, <b>, base=<base>, weights=[2, 0.5])", family / "short.safetensors")
    long = run("<base> + 2*(<a> - <base>) + 0.5*(<b> - <base>)", family / "long.safetensors")
    with Checkpoint.open(short) as one, Checkpoint.open(long) as other:
        assert all(one.read(name) == other.read(name) for name in one.tensors)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("layout", ["comfyui", "diffusers"])
def test_bytes_depend_on_neither_threads_nor_layout(family: Path, threads: int, layout: str) -> None:
    text = "slerp(<a>, <b>, t=0.3)"
    wanted = values(run(text, family / "one.safetensors", threads=1), QKV)
    out = run(text, family / "out.safetensors", MergeOptions(layout=layout), threads=threads)
    if layout == "comfyui":
        assert values(out, QKV).tobytes() == wanted.tobytes()
    else:
        parts = [values(out, f"layers.0.attention.to_{x}.weight") for x in "qkv"]
        assert np.concatenate(parts).tobytes() == wanted.tobytes()


def test_set_scales_what_a_method_changes(family: Path) -> None:
    half = run(
        "slerp(<a>, <b>, t=0.3)", family / "h.safetensors", MergeOptions(dtype=dtypes.F32, multipliers=(("k", 0),))
    )  # type: ignore[arg-type]
    rows = slice(*(np.array([1, 2]) * len(values(half, QKV)) // 3))
    a = values(family / "a.safetensors", QKV)
    assert (values(half, QKV)[rows] == a[rows]).all()
    assert (values(half, QKV)[: rows.start] != a[: rows.start]).any()


def test_quantised_outputs_are_the_quantised_result(family: Path) -> None:
    quantised = run("slerp(<a>, <b>)", family / "q.safetensors", MergeOptions(quant="fp8-scaled"))
    exact = values(run("slerp(<a>, <b>)", family / "out.safetensors", F32), QKV)
    with Checkpoint.open(quantised) as opened:
        scale = np.frombuffer(opened.read("layers.0.attention.qkv.weight_scale"), np.float32)
    found = values(quantised, QKV) * scale
    assert np.abs(found - exact).max() <= np.abs(exact).max() / 16


def test_verify_derives_a_call_again(family: Path) -> None:
    out = run("<base> + slerp(<a> - <base>, <b> - <base>)", family / "out.safetensors")
    assert check_weights(str(out)).sound
    with out.open("r+b") as file:
        file.seek(-5, 2)
        byte = file.read(1)[0]
        file.seek(-5, 2)
        file.write(bytes([byte ^ 1]))
    assert len(check_weights(str(out)).differing) == 1


def test_memory_counts_whole_parameters_and_bounds_the_threads(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with job.open_merge("slerp('a.safetensors', 'b.safetensors')") as plan:
        largest = max(step.elements for tensor in plan.tensors for step in tensor.steps)
        assert memory.memory_needed(plan, 1) > 4 * largest * (2 + 2)
        one = memory.memory_needed(plan, 1)
        monkeypatch.setattr(memory.system, "main_memory", lambda: int(2.5 * one / memory.SHARE_FOR_METHODS))
        monkeypatch.setattr(memory, "default_threads", lambda: 64)
        assert memory.workers([plan]) == 2
        assert memory.workers([plan], 5) == 5


def test_a_gpu_without_memory_leaves_the_call_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    caller = Caller(Device(("meta",)))  # a device that takes tensors and gives none back
    a, b = torch.randn(4, 4), torch.randn(4, 4)
    moved = torch.Tensor.to

    def full(tensor: torch.Tensor, *where: object, **how: object) -> torch.Tensor:
        if where == ("meta",):
            raise torch.OutOfMemoryError
        return moved(tensor, *where, **how)

    monkeypatch.setattr(torch.Tensor, "to", full)
    result, was_off = caller.apply(Apply(0, "slerp", (0, 1)), [a, b], "x")
    assert was_off
    assert torch.equal(result, Caller(Device(())).apply(Apply(0, "slerp", (0, 1)), [a, b], "x")[0])
