"""Which quantised container a header shows, and that each is refused by its name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mergetool.checkpoint.dtypes import BF16, BY_CODE, F8_E4M3, F8_E5M2, F16, F32, DType
from mergetool.checkpoint.header import Header, TensorInfo
from mergetool.errors import DataError
from mergetool.quant import is_side_tensor, quantised_container, refuse_quantised

U8, I8, E8M0 = BY_CODE["U8"], BY_CODE["I8"], BY_CODE["F8_E8M0"]
LAYER = "layers.0.attention.qkv"
Entry = tuple[str, DType, tuple[int, ...]]


def header(*entries: Entry) -> dict[str, TensorInfo]:
    return dict(Header.plan([("norm.weight", BF16, (8,)), *entries]).tensors)


def layer_metadata(layer: str = LAYER) -> dict[str, str]:
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {layer: {"format": "nvfp4"}}})}


WEIGHT8: Entry = (f"{LAYER}.weight", F8_E4M3, (24, 8))
PACKED: Entry = (f"{LAYER}.weight", U8, (24, 4))


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F8_E4M3, F8_E5M2])
def test_plain_floats_are_accepted(dtype: DType) -> None:
    tensors = header((f"{LAYER}.weight", dtype, (24, 8)), ("x_pad_token", dtype, (1, 8)))
    assert quantised_container(tensors, {"format": "pt"}, {"dim": 8}) is None
    refuse_quantised(tensors, {}, None, "f")


@pytest.mark.parametrize(
    ("container", "entries"),
    [
        ("ComfyUI scaled-FP8", [WEIGHT8, ("scaled_fp8", F8_E4M3, (0,))]),
        ("ComfyUI scaled-FP8", [WEIGHT8, ("model.diffusion_model.scaled_fp8", F8_E4M3, (2,))]),
        ("ComfyUI scaled-FP8", [WEIGHT8, (f"{LAYER}.scale_weight", F32, ())]),
        ("ComfyUI mixed-precision", [WEIGHT8, (f"{LAYER}.weight_scale", F32, ()), (f"{LAYER}.comfy_quant", U8, (30,))]),
        ("ComfyUI mixed-precision", [PACKED, (f"{LAYER}.weight_codebook", F32, (16,))]),
        ("BFL-style", [WEIGHT8, (f"{LAYER}.weight_scale", F32, (24,))]),
        ("BFL-style", [PACKED, (f"{LAYER}.weight_scale", F8_E4M3, (24, 1)), (f"{LAYER}.weight_scale_2", F32, ())]),
        ("bitsandbytes", [PACKED, (f"{LAYER}.weight.quant_state.bitsandbytes__nf4", U8, (80,))]),
        ("bitsandbytes", [(f"{LAYER}.weight", I8, (24, 8)), (f"{LAYER}.SCB", F32, (24,))]),
        ("bitsandbytes", [PACKED, (f"{LAYER}.weight.absmax", F32, (3,))]),
        ("nunchaku SVDQuant", [(f"{LAYER}.qweight", I8, (24, 4)), (f"{LAYER}.wscales", BF16, (1, 24))]),
        ("packed U8", [PACKED]),
        ("packed I8", [(f"{LAYER}.weight", I8, (24, 8))]),
        ("packed F4", [(f"{LAYER}.weight", BY_CODE["F4"], (24, 8))]),
        ("packed F8_E8M0", [(f"{LAYER}.weight", E8M0, (24, 8))]),
    ],
)
def test_each_container_is_refused_by_name(container: str, entries: list[Entry]) -> None:
    with pytest.raises(DataError, match=container) as caught:
        refuse_quantised(header(*entries), {}, None, "my.safetensors")
    message = str(caught.value)
    assert message.startswith('"my.safetensors" is a')
    assert any(name in message for name, _, _ in entries)
    for said in ("must not be merged as weights", "BF16, FP16, FP32 and plain FP8", "unquantised original"):
        assert said in message


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
        refuse_quantised(header(), {}, config, "folder")


@pytest.mark.parametrize("config", [None, {}, {"quantization_config": None}, {"quantization_config": {}}])
def test_a_config_without_quantisation_is_plain(config: dict[str, Any] | None) -> None:
    assert quantised_container(header(), {}, config) is None


def test_quantisation_metadata_alone_shows_mixed_precision() -> None:
    with pytest.raises(DataError, match=f'ComfyUI mixed-precision.*layer "{LAYER}"'):
        refuse_quantised(header(PACKED), layer_metadata(), None, "f")


def test_stale_quantisation_metadata_of_a_file_converted_back_is_plain() -> None:
    assert quantised_container(header((f"{LAYER}.weight", BF16, (24, 8))), layer_metadata(), None) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"layers": 3}', "[" * 100_000])
def test_unreadable_quantisation_metadata_counts_as_quantised(text: str) -> None:
    with pytest.raises(DataError, match="_quantization_metadata, which cannot be read"):
        refuse_quantised(header(), {"_quantization_metadata": text}, None, "f")


def test_a_quantised_text_encoder_beside_a_plain_model_is_accepted() -> None:
    encoder = "text_encoders.qwen3_4b.transformer.model.layers.0.mlp.up_proj"
    tensors = header(
        (f"model.diffusion_model.{LAYER}.weight", BF16, (24, 8)),
        (f"{encoder}.weight", F8_E4M3, (8, 8)),
        (f"{encoder}.weight_scale", F32, ()),
        (f"{encoder}.comfy_quant", U8, (30,)),
    )
    assert quantised_container(tensors, layer_metadata(encoder), None) is None


def test_a_quantised_model_beside_a_plain_vae_is_refused() -> None:
    prefixed = f"model.diffusion_model.{LAYER}"
    tensors = header((f"{prefixed}.weight", F8_E4M3, (24, 8)), (f"{prefixed}.scale_weight", F32, ()))
    assert quantised_container(tensors, {}, None) == ("a ComfyUI scaled-FP8 file", f'tensor "{prefixed}.scale_weight"')


@pytest.mark.parametrize("name", ["a.weight", "a.scale", "norm.weight_scaled", "weight_scale.weight", "logit_scale"])
def test_ordinary_names_are_not_side_tensors(name: str) -> None:
    assert not is_side_tensor(name)
