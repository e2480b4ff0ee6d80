"""Merges with quantised inputs and outputs, on real files, against the arithmetic done again on dequantised values."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import comfy_kitchen
import numpy as np
import pytest
import torch
from comfy_kitchen.tensor import (
    QuantizedTensor,
    TensorCoreFP8Layout,
    TensorCoreMXFP8Layout,
    TensorCoreNVFP4Layout,
    TensorWiseINT8Layout,
)
from safetensors import safe_open
from safetensors.torch import load_file

from mergetool import models
from mergetool.checkpoint import dtypes
from mergetool.checkpoint.reader import Checkpoint
from mergetool.engine import job
from mergetool.errors import DataError, UsageError
from mergetool.options.merging import MergeOptions
from mergetool.quant import register
from tests.families import checkpoint
from tests.ops import oracle
from tests.quant.ggml import Q
from tests.quant.models import CONTAINERS, as_gguf, is_large, quantised

MERGED = "'alk.safetensors' + 3*('a.safetensors' - 'b.safetensors')"
MERGE = "'q.safetensors' + 3*('a.safetensors' - 'b.safetensors')"
WIDE = {"dim": 256, "n_heads": 8, "axes_dims": [8, 12, 12]}


def run(text: str, output: Path, **options: object) -> Path:
    with job.open_merge(text, MergeOptions(**options)) as plan:  # type: ignore[arg-type]
        job.run_merge(plan, output)
    return output


def values(path: Path) -> dict[str, np.ndarray]:
    """Every plain float of a file as float32."""
    return {name: tensor.float().numpy() for name, tensor in load_file(path).items()}


def bf16(array: np.ndarray) -> bytes:
    return oracle.encode(array.astype(np.float32), dtypes.BF16)


@pytest.mark.parametrize("container", [c for c in CONTAINERS if c != "raw fp8"])
def test_a_quantised_first_model_merges_as_its_dequantised_values_do(family: Path, container: str) -> None:
    q = quantised(family / "q.safetensors", family / "alk.safetensors", container)
    a, b = values(family / "a.safetensors"), values(family / "b.safetensors")
    merged = load_file(run(MERGE, family / "out.safetensors"))
    assert merged.keys() == q.keys()
    for name, tensor in merged.items():
        expected = q[name] + np.float32(3) * (a[name] - b[name])
        assert tensor.view(torch.uint8).numpy().tobytes() == bf16(expected), name


@pytest.mark.parametrize("container", ["fp8", "nvfp4", "old fp8"])
def test_a_quantised_model_can_be_subtracted(family: Path, container: str) -> None:
    q = quantised(family / "q.safetensors", family / "b.safetensors", container)
    alk, a = values(family / "alk.safetensors"), values(family / "a.safetensors")
    merged = load_file(run("'alk.safetensors' + 3*('a.safetensors' - 'q.safetensors')", family / "out.safetensors"))
    for name, tensor in merged.items():
        expected = alk[name] + np.float32(3) * (a[name] - q[name])
        assert tensor.view(torch.uint8).numpy().tobytes() == bf16(expected), name


@pytest.mark.parametrize("kind", [Q.Q8_0, Q.Q4_K], ids=lambda kind: kind.name)
def test_a_gguf_merges_as_its_dequantised_values_do(family: Path, kind: Q) -> None:
    for seed, name in enumerate(["q", "a", "b"]):
        checkpoint(family / f"{name}-wide.safetensors", variant=seed, config={**_tiny(), **WIDE})
    q = as_gguf(family / "q.gguf", family / "q-wide.safetensors", kind)
    a, b = values(family / "a-wide.safetensors"), values(family / "b-wide.safetensors")
    merged = load_file(
        run("'q.gguf' + 3*('a-wide.safetensors' - 'b-wide.safetensors')", family / "out.safetensors", dtype=dtypes.BF16)
    )
    assert merged["x_pad_token"].shape == (1, 256)
    for name, tensor in merged.items():
        expected = q[name].reshape(a[name].shape) + np.float32(3) * (a[name] - b[name])
        assert tensor.view(torch.uint8).numpy().tobytes() == bf16(expected), name


def _tiny() -> dict[str, object]:
    from tests.families import TINY

    return dict(TINY)


LAYOUTS = {
    "fp8-scaled": (TensorCoreFP8Layout, {"weight_scale": "scale"}),
    "nvfp4": (TensorCoreNVFP4Layout, {"weight_scale": "block_scale", "weight_scale_2": "scale"}),
    "mxfp8": (TensorCoreMXFP8Layout, {"weight_scale": "scale"}),
    "int8": (TensorWiseINT8Layout, {"weight_scale": "scale"}),
    "int8-convrot": (TensorWiseINT8Layout, {"weight_scale": "scale"}),
}


def loaded(path: Path, layer: str, quant: str, shape: tuple[int, int]) -> np.ndarray:
    """A layer as comfy-kitchen's tensor class, the one ComfyUI makes of a file, dequantises it."""
    tensors = load_file(path)
    layout, sides = LAYOUTS[quant]
    said = json.loads(bytes(tensors[f"{layer}.comfy_quant"].tolist()))
    params = layout.Params(
        **{key: value for key, value in said.items() if key.startswith("convrot")},
        **{field: tensors[f"{layer}.{leaf}"] for leaf, field in sides.items()},
        orig_dtype=torch.float32,
        orig_shape=shape,
    )
    with comfy_kitchen.use_backend("eager"):
        return QuantizedTensor(tensors[f"{layer}.weight"], layout.__name__, params).dequantize().numpy()


@pytest.mark.parametrize("quant", register.names())
def test_a_quantised_output_loads_in_comfy_kitchen_and_is_its_own_quantisation_of_the_merge(
    family: Path, quant: str
) -> None:
    alk, a, b = (values(family / f"{name}.safetensors") for name in ("alk", "a", "b"))
    out = run(MERGED, family / "out.safetensors", quant=quant)
    layers = [name.removesuffix(".comfy_quant") for name in load_file(out) if name.endswith(".comfy_quant")]
    assert len(layers) == 2 * 5  # qkv, out, w1, w2, w3 of the main layers; not the refiners
    for layer in layers:
        name = f"{layer}.weight"
        expected = torch.from_numpy(alk[name] + np.float32(3) * (a[name] - b[name]))
        layout, _ = LAYOUTS[quant]
        with comfy_kitchen.use_backend("eager"):
            codes, params = layout.quantize(expected, **how_of(quant, expected.shape[1]))
            theirs = QuantizedTensor(codes, layout.__name__, params).dequantize().numpy()
        # A rotation adds numbers in another order than comfy-kitchen's product, up to 64 of them.
        apart = {"rtol": 0, "atol": 64 * 2**-24 * np.abs(theirs).max() * (quant == "int8-convrot")}
        np.testing.assert_allclose(loaded(out, layer, quant, tuple(expected.shape)), theirs, **apart)
        with models.open_model(str(out)) as opened:
            stored = [part for part in opened.anatomy.parts.values() if part.stored.tensor == name]
            encoding = stored[0].encoding
            assert encoding is not None
            assert encoding.shape == tuple(expected.shape)
            np.testing.assert_allclose(encoding.values(opened.checkpoint.read), theirs, **apart)
    with safe_open(out, "pt") as opened_file:
        assert json.loads(opened_file.metadata()["mergetool.recipe"])["quant"] == quant
        assert "_quantization_metadata" not in opened_file.metadata()


def how_of(quant: str, columns: int) -> dict[str, object]:
    """What comfy-kitchen is asked for."""
    group = next((size for size in (256, 64, 16, 4) if columns % size == 0), 0)
    rotation = {"convrot": True, "convrot_groupsize": group} if quant == "int8-convrot" and group else {}
    return {"per_channel": True, **rotation} if quant.startswith("int8") else {}


def octets(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("container", "quant"), [("fp8", "fp8-scaled"), ("nvfp4", "nvfp4"), ("mxfp8", "mxfp8"), ("int8", "int8")]
)
def test_untouched_weights_are_copied_with_their_scales(family: Path, container: str, quant: str) -> None:
    quantised(family / "q.safetensors", family / "alk.safetensors", container)
    before = load_file(family / "q.safetensors")
    after = load_file(run(MERGE, family / "out.safetensors", quant=quant, protect=("refiner", "v")))
    assert before.keys() == after.keys()
    same = [name for name in before if octets(before[name]) == octets(after[name])]
    refiners = [name for name in before if "refiner" in name]
    assert set(refiners) <= set(same)
    assert "layers.0.attention.qkv.weight" not in same  # q and k were merged, so v is quantised anew with them
    assert after["layers.0.attention.qkv.weight"].dtype == before["layers.0.attention.qkv.weight"].dtype


def test_the_plan_does_not_call_a_copied_weight_rounded(family: Path) -> None:
    quantised(family / "q.safetensors", family / "alk.safetensors", "fp8")
    options = MergeOptions(quant="fp8-scaled", protect=("layers",))
    with job.open_merge(MERGE, options) as plan:
        reasons = {tensor.name: {step.reason for step in tensor.steps} for tensor in plan.tensors}
    assert reasons["layers.0.attention.qkv.weight"] == {"protected: layers"}
    assert reasons["layers.0.attention.qkv.weight_scale"] == {"protected: layers"}


def test_an_old_scaled_file_is_copied_under_the_new_names(family: Path) -> None:
    quantised(family / "q.safetensors", family / "alk.safetensors", "old fp8")
    before = load_file(family / "q.safetensors")
    after = load_file(run("'q.safetensors'", family / "out.safetensors", quant="fp8-scaled"))
    assert not [name for name in after if "scaled_fp8" in name or "scale_weight" in name]
    layer = "layers.0.feed_forward.w1"
    assert torch.equal(after[f"{layer}.weight"].view(torch.uint8), before[f"{layer}.weight"].view(torch.uint8))
    assert torch.equal(after[f"{layer}.weight_scale"], before[f"{layer}.scale_weight"])
    assert json.loads(bytes(after[f"{layer}.comfy_quant"].tolist()))["format"] == "float8_e4m3fn"


def test_scaled_parts_of_a_split_layout_are_quantised_together(family: Path) -> None:
    """q, k and v of a diffusers layout have a scale each; the fused weight gets one of its own."""
    split = checkpoint(family / "split.safetensors", variant=0, layout="diffusers")
    values_of = quantised(family / "q.safetensors", split, "fp8")
    out = run("'q.safetensors'", family / "out.safetensors", quant="fp8-scaled")
    parts = [values_of[f"layers.0.attention.to_{part}.weight"] for part in "qkv"]
    fused = torch.from_numpy(np.concatenate(parts))
    with comfy_kitchen.use_backend("eager"):
        codes, params = TensorCoreFP8Layout.quantize(fused)
        theirs = TensorCoreFP8Layout.dequantize(codes, params).numpy()
    np.testing.assert_array_equal(loaded(out, "layers.0.attention.qkv", "fp8-scaled", (192, 64)), theirs)


@pytest.mark.parametrize("quant", register.names())
def test_bytes_do_not_depend_on_threads_or_reading(family: Path, quant: str) -> None:
    quantised(family / "q.safetensors", family / "alk.safetensors", "fp8")
    digests = set()
    for threads, method in ((1, "pread"), (2, "mmap"), (4, "mmap")):
        search = register.quantiser(quant).has_tensor_scale
        with job.open_merge(MERGE, MergeOptions(quant=quant, scale_search=search)) as plan:
            job.run_merge(plan, family / "out.safetensors", threads=threads, reader=method, overwrite=True)  # type: ignore[arg-type]
        digests.add(hashlib.sha256((family / "out.safetensors").read_bytes()).hexdigest())
    assert len(digests) == 1


@pytest.mark.parametrize("container", ["nvfp4", "mxfp8", "convrot", "fp8 rows"])
def test_bytes_do_not_depend_on_the_chunk_size(family: Path, container: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergetool.engine import jobs

    quantised(family / "q.safetensors", family / "alk.safetensors", container)
    whole = run(MERGE, family / "whole.safetensors", quant="nvfp4").read_bytes()
    monkeypatch.setattr(jobs, "CHUNK", 1000)
    assert run(MERGE, family / "out.safetensors", quant="nvfp4").read_bytes() == whole


def test_a_searched_scale_is_never_worse_than_amax(family: Path) -> None:
    alk, a, b = (values(family / f"{name}.safetensors") for name in ("alk", "a", "b"))
    gains = {}
    for search in (False, True):
        with job.open_merge(MERGED, MergeOptions(quant="fp8-scaled", scale_search=search)) as plan:
            outcome = job.run_merge(plan, family / "out.safetensors", overwrite=True)
        total = 0.0
        for name in alk:
            if f"{name.removesuffix('.weight')}.comfy_quant" in load_file(family / "out.safetensors"):
                expected = (alk[name] + np.float32(3) * (a[name] - b[name])).astype(np.float64)
                found = loaded(family / "out.safetensors", name.removesuffix(".weight"), "fp8-scaled", expected.shape)
                total += float(np.square(found - expected).sum())
        gains[search] = total
        measured = outcome.search_gain
    assert gains[True] < gains[False]
    assert measured == pytest.approx(gains[True] / gains[False], rel=1e-3)


def test_a_nan_scale_is_refused_by_the_weights_name(family: Path) -> None:
    quantised(family / "q.safetensors", family / "alk.safetensors", "fp8")
    tensors = load_file(family / "q.safetensors")
    tensors["layers.1.feed_forward.w2.weight_scale"] = torch.tensor(float("nan"))
    from safetensors.torch import save_file

    save_file(tensors, family / "q.safetensors")
    with pytest.raises(DataError, match=r'scale "layers\.1\.feed_forward\.w2\.weight_scale" is NaN'):
        run(MERGE, family / "out.safetensors", quant="fp8-scaled")
    assert not (family / "out.safetensors").exists()


def test_quantised_output_has_no_diffusers_layout(family: Path) -> None:
    with pytest.raises(UsageError, match="comfyui layout only"):
        run("'alk.safetensors'", family / "out.safetensors", quant="nvfp4", layout="diffusers")


@pytest.mark.parametrize("quant", [None, "int8", "mxfp8"])
def test_a_search_needs_a_scale_to_look_for(family: Path, quant: str | None) -> None:
    with pytest.raises(UsageError, match="needs `quant=fp8-scaled` or `quant=nvfp4`"):
        run(MERGED, family / "out.safetensors", quant=quant, scale_search=True)


def test_an_unknown_container_lists_those_there_are(family: Path) -> None:
    with pytest.raises(UsageError, match="fp8-scaled, int8, int8-convrot, mxfp8, nvfp4"):
        run("'alk.safetensors'", family / "out.safetensors", quant="nf4")


def test_verify_derives_a_quantised_merge_again(family: Path) -> None:
    from mergetool.verification.weights import check_weights

    quantised(family / "q.safetensors", family / "alk.safetensors", "nvfp4")
    out = run(MERGE, family / "out.safetensors", quant="fp8-scaled", scale_search=True)
    assert check_weights(str(out)).sound
    with Checkpoint.open(out) as opened:
        _, place = opened.locate("layers.0.attention.qkv.weight")
    content = bytearray(out.read_bytes())
    content[place + 100] ^= 1
    out.write_bytes(content)
    assert check_weights(str(out)).differing == {"layers.0.attention.qkv.weight": 100}


def test_a_large_share_of_the_model_is_quantised(family: Path) -> None:
    tensors = load_file(family / "alk.safetensors")
    assert sum(is_large(name, tensor) for name, tensor in tensors.items()) == 20


@pytest.mark.parametrize("rounding", ["stochastic", "error-feedback"])
def test_scaled_fp8_takes_every_rounding_on_the_value_over_the_scale(family: Path, rounding: str) -> None:
    out = {}
    for mode in ("nearest", rounding):
        out[mode] = run(MERGED, family / f"{mode}.safetensors", quant="fp8-scaled", rounding=mode)
    alk, a, b = (values(family / f"{name}.safetensors") for name in ("alk", "a", "b"))
    name = "layers.1.feed_forward.w1.weight"
    exact = alk[name] + np.float32(3) * (a[name] - b[name])
    found = {mode: loaded(path, name.removesuffix(".weight"), "fp8-scaled", exact.shape) for mode, path in out.items()}
    scale = float(load_file(out[rounding])["layers.1.feed_forward.w1.weight_scale"])
    assert not np.array_equal(found[rounding], found["nearest"])
    step = np.maximum(np.abs(exact), 2**-6 * scale) / 8
    error = found[rounding].astype(np.float64) - exact
    if rounding == "stochastic":
        assert (np.abs(error) <= step * 1.001).all()
        assert abs(error.mean()) < 4 * step.mean() / np.sqrt(exact.size)
    else:  # what a row's elements lose goes to their neighbours: only the last one's remains
        assert (np.abs(error.sum(axis=1)) <= step.max(axis=1)).all()


def test_a_config_loses_what_it_says_of_codes_that_are_gone(family: Path) -> None:
    run("'a.safetensors'", family / "plain", layout="diffusers")
    config = json.loads((family / "plain/config.json").read_text())
    said = {**config, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (family / "plain/config.json").write_text(json.dumps(said))
    run("plain", family / "out", layout="diffusers")
    assert json.loads((family / "out/config.json").read_text()) == config
