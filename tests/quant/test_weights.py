"""Which container a header shows: read when everything in it agrees, refused by name or in one sentence when not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergetool.arch import bundled
from mergetool.checkpoint.dtypes import BF16, BY_CODE, F8_E4M3, F8_E5M2, F16, F32, DType
from mergetool.checkpoint.header import Header, TensorInfo
from mergetool.checkpoint.reader import Checkpoint
from mergetool.errors import DataError
from mergetool.quant import weights
from mergetool.quant.encoding import Encoding
from mergetool.quant.weights import is_side_tensor
from tests.quant.files import encodings, marker, values, weight, written

U8, I8, E8M0 = BY_CODE["U8"], BY_CODE["I8"], BY_CODE["F8_E8M0"]
LAYER = "layers.0.attention.qkv"
Entry = tuple[str, DType, tuple[int, ...]]
Config = dict[str, Any] | None


def header(*entries: Entry) -> dict[str, TensorInfo]:
    return dict(Header.plan([("norm.weight", BF16, (8,)), *entries]).tensors)


def found(
    *entries: Entry, metadata: dict[str, str] | None = None, config: Config = None, said: Any = None
) -> dict[str, Encoding]:
    """The encodings of a header whose ``.comfy_quant`` tensors hold ``said``."""
    raw = said if isinstance(said, bytes) else json.dumps(said).encode()
    tensors = header(*entries)
    return weights.encodings(
        tensors,
        metadata or {},
        config,
        read=lambda _: raw,
        packed={},
        source="my.safetensors",
        bundled=bundled(tensors),
    )


def layer_metadata(layer: str = LAYER, form: str = "nvfp4") -> dict[str, str]:
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {layer: {"format": form}}})}


def beside(leaf: str, dtype: DType, *shape: int) -> Entry:
    return (f"{LAYER}.{leaf}", dtype, shape)


WEIGHT8 = beside("weight", F8_E4M3, 96, 64)
PACKED = beside("weight", U8, 96, 32)
MARKER = beside("comfy_quant", U8, 30)
SCALE = beside("weight_scale", F32)
NVFP4 = (PACKED, beside("weight_scale", F8_E4M3, 128, 4), beside("weight_scale_2", F32))
BFL = (PACKED, beside("weight_scale", F8_E4M3, 96, 4), beside("weight_scale_2", F32))

INT4 = (beside("weight", I8, 96, 32),)
W4A4 = {"format": "convrot_w4a4", "convrot_groupsize": 16}
W4A8 = {"format": "asym_w4a8_int8", "convrot_groupsize": 64}
W4A8_SIDES = (
    *(beside("weight_s_rel", F8_E4M3, 96, 4), beside("weight_s_channel", F32, 96)),
    beside("weight_codebook", F32, 16),
)


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F8_E4M3, F8_E5M2])
def test_plain_floats_have_no_encodings(dtype: DType) -> None:
    assert found((f"{LAYER}.weight", dtype, (24, 8)), ("x_pad_token", dtype, (1, 8)), config={"dim": 8}) == {}


@pytest.mark.parametrize(
    ("label", "entries", "said"),
    [
        ("scaled FP8 (e4m3)", [WEIGHT8, ("scaled_fp8", F8_E4M3, (0,)), beside("scale_weight", F32)], None),
        ("scaled FP8 (e4m3)", [WEIGHT8, ("scaled_fp8", F32, (2,)), beside("scale_weight", F32, 1)], None),
        ("scaled FP8 (e4m3)", [WEIGHT8, SCALE, MARKER], {"format": "float8_e4m3fn"}),
        ("scaled FP8 (e5m2)", [beside("weight", F8_E5M2, 96, 64), SCALE, MARKER], {"format": "float8_e5m2"}),
        ("scaled FP8 (e4m3) by rows", [WEIGHT8, beside("weight_scale", F32, 96)], None),
        ("scaled FP8 (e4m3) by rows", [WEIGHT8, beside("weight_scale", BF16, 96, 1)], None),
        ("scaled FP8 (e4m3) by blocks of 32", [WEIGHT8, beside("weight_scale", F32, 96, 2, 1)], None),
        ("scaled FP8 (e4m3) by blocks of 32", [WEIGHT8, beside("weight_scale", F32, 3, 2)], None),
        ("nvfp4", [*NVFP4, MARKER], {"format": "nvfp4"}),
        ("nvfp4 (BFL's order)", [*BFL], None),
        ("mxfp8", [WEIGHT8, beside("weight_scale", E8M0, 128, 4), MARKER], {"format": "mxfp8"}),
        ("mxfp8", [WEIGHT8, beside("weight_scale", U8, 128, 4), MARKER], {"format": "mxfp8"}),
        ("int8", [beside("weight", I8, 96, 64), SCALE, MARKER], {"format": "int8_tensorwise"}),
        (
            "int8 rotated by 64 (ConvRot)",
            [beside("weight", I8, 96, 64), beside("weight_scale", F32, 96, 1), MARKER],
            {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64},
        ),
        ("bitsandbytes int8 by rows", [beside("weight", I8, 96, 64), beside("SCB", F32, 96)], None),
        ("int4 rotated by 16 (ConvRot W4A4)", [*INT4, beside("weight_scale", F32, 96), MARKER], W4A4),
        ("int4 for int8, rotated by 64 (W4A8)", [*INT4, *W4A8_SIDES, MARKER], W4A8),
        (
            "int4 with zeros by groups of 16 (AWQ W4A16)",
            [*INT4, beside("weight_scale", BF16, 4, 96), beside("weight_zeros", BF16, 4, 96), MARKER],
            {"format": "awq_w4a16"},
        ),
        (
            "int4 by groups of 64 and rank 8 (SVDQuant W4A4)",
            [
                *(*INT4, beside("weight_scale", BF16, 1, 96), beside("smooth_factor", BF16, 64)),
                *(beside("proj_down", BF16, 64, 8), beside("weight_proj_up", BF16, 96, 8), MARKER),
            ],
            {"format": "svdquant_w4a4"},
        ),
    ],
)
def test_each_container_is_recognised(label: str, entries: list[Entry], said: Any) -> None:
    encoding = found(*entries, said=said)[f"{LAYER}.weight"]
    assert encoding.label == label
    assert encoding.shape == (96, 64)
    assert set(encoding.tensors) == {name for name, _, _ in entries if name != "scaled_fp8"}


@pytest.mark.parametrize(
    ("container", "entries"),
    [
        ("nunchaku SVDQuant", [beside("qweight", I8, 24, 4), beside("wscales", BF16, 1, 24)]),
        ("packed U8", [PACKED]),
        ("packed I8", [beside("weight", I8, 24, 8)]),
        ("packed F4", [beside("weight", BY_CODE["F4"], 24, 8)]),
        ("packed F8_E8M0", [beside("weight", E8M0, 24, 8)]),
    ],
)
def test_containers_that_are_not_read_are_refused_by_name_with_a_way_out(container: str, entries: list[Entry]) -> None:
    with pytest.raises(DataError, match=rf'^"my\.safetensors" is a .*{container}.*use the unquantised original'):
        found(*entries)


@pytest.mark.parametrize("form", ["w4a8", "awq", "float9", 4, None])
def test_other_formats_of_a_marker_are_refused_by_name(form: Any) -> None:
    with pytest.raises(DataError, match=f'of the format "{form}"'):
        found(beside("weight", I8, 96, 32), SCALE, MARKER, said={"format": form})


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "torchao", "quant_type": "int8wo"}}, "torchao"),
        ({"quantization_config": {"quant_method": "quanto"}}, "quanto"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"quantization_config": "int4"}, "quantised"),
        ({"quantization_config": {"quant_method": "\x1b[2J"}}, "quantised"),
    ],
)
def test_a_quantised_config_is_refused(config: dict[str, Any], method: str) -> None:
    with pytest.raises(DataError, match=f"is a {method} file"):
        found(config=config)


@pytest.mark.parametrize("config", [None, {}, {"quantization_config": None}, {"quantization_config": {}}])
def test_a_config_without_quantisation_is_plain(config: Config) -> None:
    assert found(config=config) == {}


@pytest.mark.parametrize(
    ("says", "entries", "said"),
    [
        ('has no "weight_scale"', [WEIGHT8, MARKER], {"format": "float8_e4m3fn"}),
        ('has no "weight_scale_2"', [PACKED, NVFP4[1], MARKER], {"format": "nvfp4"}),
        ("has a weight of F8_E4M3", [WEIGHT8, SCALE, MARKER], {"format": "float8_e5m2"}),
        ("has a weight of F8_E4M3", [WEIGHT8, SCALE, MARKER], {"format": "nvfp4"}),
        ("has a weight of BF16", [beside("weight", BF16, 96, 64), SCALE, MARKER], {"format": "float8_e4m3fn"}),
        ("has a weight of BF16 beside", [beside("weight", BF16, 96, 64), beside("scale_weight", F32)], None),
        ("has a weight of F8_E4M3", [beside("weight", F8_E4M3, 96), SCALE], None),
        (r"has a scale of shape \[95\]", [WEIGHT8, beside("weight_scale", F32, 95)], None),
        (r"has a scale of shape \[64\]", [WEIGHT8, beside("weight_scale", F32, 64)], None),
        (r"has a scale of shape \[48, 2\]", [WEIGHT8, beside("weight_scale", F32, 48, 2)], None),
        (r"has a scale of shape \[96, 64\]", [WEIGHT8, beside("weight_scale", F32, 96, 64)], None),
        ('has a "weight_scale" of U8', [WEIGHT8, beside("weight_scale", U8, 128, 4)], None),
        (r"has block scales of shape \[96, 4\]", [*BFL, MARKER], {"format": "nvfp4"}),
        (r"has block scales of shape \[128, 4\]", [*NVFP4], None),
        (
            r"has block scales of shape \[96, 2\]",
            [WEIGHT8, beside("weight_scale", E8M0, 96, 2), MARKER],
            {"format": "mxfp8"},
        ),
        ("no marker", [beside("weight", I8, 96, 64), SCALE], None),
        (
            "is rotated by groups of 100",
            [beside("weight", I8, 96, 64), SCALE, MARKER],
            {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 100},
        ),
        (
            "neither true nor false",
            [beside("weight", I8, 96, 64), SCALE, MARKER],
            {"format": "int8_tensorwise", "convrot": "yes"},
        ),
        ('the dtype of "scaled_fp8"', [WEIGHT8, ("scaled_fp8", F8_E5M2, (0,)), beside("scale_weight", F32)], None),
        ('"pre_quant_scale" of shape', [*NVFP4, MARKER, beside("pre_quant_scale", BF16, 63)], {"format": "nvfp4"}),
        ("both scale layer", [WEIGHT8, SCALE, beside("scale_weight", F32)], None),
        ("which is not in the file", [SCALE], None),
        ("no JSON object", [WEIGHT8, SCALE, MARKER], b"\xff"),
        ("no JSON object", [WEIGHT8, SCALE, MARKER], [1]),
        ("no JSON object", [WEIGHT8, SCALE, beside("comfy_quant", F32, 4)], {"format": "float8_e4m3fn"}),
    ],
)
def test_a_layer_that_contradicts_itself_is_refused(says: str, entries: list[Entry], said: Any) -> None:
    with pytest.raises(DataError, match=says) as caught:
        found(*entries, said=said)
    assert str(caught.value).startswith('"my.safetensors": ')
    assert "original" in str(caught.value)


def test_metadata_marks_a_layer_as_a_marker_does() -> None:
    assert found(*NVFP4, metadata=layer_metadata())[f"{LAYER}.weight"].label == "nvfp4"


def test_metadata_may_leave_the_prefix_out() -> None:
    prefixed = [(f"model.diffusion_model.{name}", dtype, shape) for name, dtype, shape in NVFP4]
    assert list(found(*prefixed, metadata=layer_metadata())) == [f"model.diffusion_model.{LAYER}.weight"]


def test_marker_and_metadata_that_disagree_are_refused() -> None:
    with pytest.raises(DataError, match='is "mxfp8" by its marker and "nvfp4" by _quantization_metadata'):
        found(*NVFP4, MARKER, metadata=layer_metadata(), said={"format": "mxfp8"})


def test_stale_quantisation_metadata_of_a_file_converted_back_is_plain() -> None:
    assert found((f"{LAYER}.weight", BF16, (24, 8)), metadata=layer_metadata()) == {}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"layers": 3}', '{"layers": {"a": 3}}', "[" * 100_000])
def test_quantisation_metadata_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="_quantization_metadata, which cannot be read"):
        found(metadata={"_quantization_metadata": text})


def test_a_quantised_text_encoder_beside_a_plain_model_is_nobodys_business() -> None:
    encoder = "text_encoders.qwen3_4b.transformer.model.layers.0.mlp.up_proj"
    entries: list[Entry] = [
        (f"model.diffusion_model.{LAYER}.weight", BF16, (24, 8)),
        (f"{encoder}.weight", F8_E4M3, (8, 8)),
        (f"{encoder}.weight_scale", F32, ()),
        (f"{encoder}.comfy_quant", U8, (30,)),
    ]
    assert found(*entries, metadata=layer_metadata(encoder)) == {}


def test_the_scale_of_a_plain_layers_input_is_no_quantised_weight() -> None:
    assert found((f"{LAYER}.weight", BF16, (24, 8)), beside("input_scale", F32)) == {}


@pytest.mark.parametrize("name", ["a.weight", "a.scale", "norm.weight_scaled", "weight_scale.weight", "logit_scale"])
def test_ordinary_names_are_not_side_tensors(name: str) -> None:
    assert not is_side_tensor(name)


@pytest.mark.parametrize("scale", [(), (1,), (96,), (96, 1), (96, 4), (96, 4, 1), (6, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_of_every_shape_reach_their_elements(tmp_path: Path, scale: tuple[int, ...], dtype: torch.dtype) -> None:
    codes = (weight((96, 64)) * 400).to(torch.float8_e4m3fn)
    scales = (torch.rand(scale, generator=torch.Generator().manual_seed(1)) + 0.5).to(dtype)
    path = written(tmp_path / "f.safetensors", {"a.weight": codes, "a.weight_scale": scales})
    grid = {(): (1, 1), (1,): (1, 1), (96,): (96, 1)}.get(scale, scale[:2])
    whole = scales.float().reshape(grid).repeat_interleave(96 // grid[0], 0).repeat_interleave(64 // grid[1], 1)
    np.testing.assert_array_equal(values(path), (codes.float() * whole).numpy())


def test_bfls_nvfp4_holds_the_even_column_in_the_low_nibble_and_scales_in_plain_order(tmp_path: Path) -> None:
    """By hand: one row of 32 columns, codes 0 to 15 twice."""
    nibbles = torch.arange(32, dtype=torch.uint8) % 16
    packed = (nibbles[0::2] | nibbles[1::2] << 4).reshape(1, 16)
    tensors = {
        "a.weight": packed,
        "a.weight_scale": torch.tensor([[2.0, 0.5]]).to(torch.float8_e4m3fn),
        "a.weight_scale_2": torch.tensor(0.25),
    }
    e2m1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    expected = [[value * 2 * 0.25 for value in e2m1] + [value * 0.5 * 0.25 for value in e2m1]]
    assert values(written(tmp_path / "f.safetensors", tensors)).tolist() == expected


def test_an_old_scaled_file_is_read_with_its_scales(tmp_path: Path) -> None:
    codes = (weight((96, 64)) * 400).to(torch.float8_e4m3fn)
    tensors = {
        "model.diffusion_model.scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn),
        "model.diffusion_model.a.weight": codes,
        "model.diffusion_model.a.scale_weight": torch.tensor(0.0025),
        "model.diffusion_model.a.scale_input": torch.tensor(1.0),
        "model.diffusion_model.a.bias": torch.zeros(96),
    }
    found = values(written(tmp_path / "f.safetensors", tensors), "model.diffusion_model.a.weight")
    np.testing.assert_array_equal(found, (codes.float() * torch.tensor(0.0025)).numpy())


def test_a_marker_is_read_from_a_real_file(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.zeros(8, 8, dtype=torch.float8_e4m3fn), "a.weight_scale": torch.tensor(1.0)}
    path = written(tmp_path / "f.safetensors", {**tensors, "a.comfy_quant": marker({"format": "float8_e4m3fn"})})
    with Checkpoint.open(path) as checkpoint:
        assert encodings(checkpoint)["a.weight"].quant == "fp8-scaled"
