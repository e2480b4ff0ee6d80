"""Every ComfyUI container against comfy-kitchen, ComfyUI's own library: the same values read, the same tensors written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy_kitchen
import numpy as np
import pytest
import torch
from comfy_kitchen.backends.eager import svdquant, w4a8_int8
from comfy_kitchen.tensor import (
    AsymW4A8Int8Layout,
    TensorCoreAWQW4A16Layout,
    TensorCoreConvRotW4A4Layout,
    TensorCoreFP8Layout,
    TensorCoreMXFP8Layout,
    TensorCoreNVFP4Layout,
    TensorCoreSVDQuantW4A4Layout,
    TensorWiseINT8Layout,
)

from mergetool.checkpoint.dtypes import DType
from mergetool.checkpoint.reader import Checkpoint
from mergetool.errors import DataError
from mergetool.quant import register
from mergetool.quant.encoding import Floats, Octets
from mergetool.quant.fp8 import narrow
from mergetool.quant.quantiser import PIECE_ROWS, Quantiser
from tests.quant.files import SHAPES, encodings, marker, values, weight, written

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def stored(layout: Any, matrix: torch.Tensor, **how: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What comfy-kitchen would save for layer ``a``, and the values that it reads back itself, in float32."""
    with comfy_kitchen.use_backend("eager"):
        codes, params = layout.quantize(matrix, **how)
        back = layout.dequantize(codes, params)[: matrix.shape[0], : matrix.shape[1]]
    return {f"a.weight{leaf}": tensor for leaf, tensor in layout.state_dict_tensors(codes, params).items()}, back


def read(path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], shape: tuple[int, int]) -> np.ndarray:
    return values(written(path / "f.safetensors", {**tensors, "a.comfy_quant": marker(config)}), shape=shape)


@shapes
@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_fp8_reads_as_comfy_kitchen_reads_it(tmp_path: Path, shape: tuple[int, int], name: str) -> None:
    tensors, back = stored(TensorCoreFP8Layout, weight(shape), dtype=getattr(torch, name))
    np.testing.assert_array_equal(read(tmp_path, tensors, {"format": name}, shape), back.numpy())


@shapes
def test_nvfp4_reads_as_comfy_kitchen_reads_it(tmp_path: Path, shape: tuple[int, int]) -> None:
    tensors, back = stored(TensorCoreNVFP4Layout, weight(shape))
    np.testing.assert_array_equal(read(tmp_path, tensors, {"format": "nvfp4"}, shape), back.numpy())


@shapes
def test_mxfp8_reads_as_comfy_kitchen_reads_it(tmp_path: Path, shape: tuple[int, int]) -> None:
    tensors, back = stored(TensorCoreMXFP8Layout, weight(shape))
    np.testing.assert_array_equal(read(tmp_path, tensors, {"format": "mxfp8"}, shape), back.numpy())


@shapes
@pytest.mark.parametrize("by_row", [False, True])
def test_int8_reads_as_comfy_kitchen_reads_it(tmp_path: Path, shape: tuple[int, int], by_row: bool) -> None:
    tensors, back = stored(TensorWiseINT8Layout, weight(shape), per_channel=by_row)
    np.testing.assert_array_equal(read(tmp_path, tensors, {"format": "int8_tensorwise"}, shape), back.numpy())


@pytest.mark.parametrize("group", [4, 16, 64, 256])
@pytest.mark.parametrize("nested", [False, True])
def test_rotated_int8_is_the_float64_rotation_rounded_once(tmp_path: Path, group: int, nested: bool) -> None:
    """comfy-kitchen scales first and adds rounded numbers, so it is further from the truth than one rounding."""
    shape = (100, 768)
    tensors, back = stored(TensorWiseINT8Layout, weight(shape), per_channel=True, convrot=True, convrot_groupsize=group)
    keys = {"convrot": True, "convrot_groupsize": group}
    config = {"format": "int8_tensorwise", **({"params": keys} if nested else keys)}
    found = read(tmp_path, tensors, config, shape)
    matrix = comfy_kitchen.tensor.int8_utils._build_hadamard(group).double()
    groups = tensors["a.weight"].double().reshape(100, -1, group)
    truth = (groups @ matrix).reshape(shape) * tensors["a.weight_scale"].double()
    np.testing.assert_array_equal(found, truth.float().numpy())
    np.testing.assert_allclose(found, back.numpy(), rtol=0, atol=group * 2**-24 * float(truth.abs().max()))


def turned(codes: torch.Tensor, scale: torch.Tensor, group: int, added: torch.Tensor | float = 0) -> np.ndarray:
    """Codes times their rows' scales, rotated in float64 and rounded once."""
    matrix = comfy_kitchen.tensor.int8_utils._build_hadamard(group).double()
    values = codes.double() * scale.double().reshape(-1, 1) + added
    return (values.reshape(len(codes), -1, group) @ matrix).reshape(codes.shape).float().numpy()


@pytest.mark.parametrize("group", [4, 64, 256])
def test_rotated_int4_is_the_float64_rotation_rounded_once(tmp_path: Path, group: int) -> None:
    shape = (101, 768)
    tensors, back = stored(TensorCoreConvRotW4A4Layout, weight(shape), convrot_groupsize=group)
    found = read(tmp_path, tensors, {"format": "convrot_w4a4", "convrot_groupsize": group}, shape)
    codes = svdquant._unpack_int4_row_major(tensors["a.weight"])
    np.testing.assert_array_equal(found, turned(codes, tensors["a.weight_scale"], group))
    np.testing.assert_allclose(found, back.numpy(), rtol=0, atol=group * 2**-24 * float(back.abs().max()))


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"bits": 6},
        {"codebook": False},
        {"symmetric": False},
        {"scale_dtype": torch.float32},
        {"group_size": 64},
        {"group_size": 4, "convrot_groupsize": 16},
    ],
    ids=str,
)
@pytest.mark.parametrize("as_bytes", [False, True])
def test_w4a8_is_comfy_kitchens_int8_rotated_in_float64(tmp_path: Path, how: dict[str, Any], as_bytes: bool) -> None:
    shape = (101, 768)
    tensors, back = stored(AsymW4A8Int8Layout, weight(shape), **how)
    relative, codebook = tensors["a.weight_s_rel"], tensors.get("a.weight_codebook")
    if as_bytes and relative.dtype == torch.float8_e4m3fn:
        tensors["a.weight_s_rel"] = relative.view(torch.uint8)
    said = {"format": "asym_w4a8_int8", **{key: value for key, value in how.items() if "group" in key}}
    found = read(tmp_path, tensors, said, shape)
    group, rotated = how.get("group_size", 16), how.get("convrot_groupsize", 256)
    codes = w4a8_int8._dequant_int4_grouped_to_int8(tensors["a.weight"], relative, codebook, group)
    added = tensors["a.weight_correction"].t().double().repeat_interleave(group, 1) if "symmetric" in how else 0
    np.testing.assert_array_equal(found, turned(codes, tensors["a.weight_s_channel"], rotated, added))
    np.testing.assert_allclose(found, back.numpy(), rtol=0, atol=rotated * 2**-24 * float(back.abs().max()))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.int8:
        return torch.randint(-128, 128, shape, generator=generator, dtype=dtype)
    return (torch.rand(shape, generator=generator) * 0.1 + 0.01).to(dtype)


@pytest.mark.parametrize(("group", "dtype"), [(64, torch.bfloat16), (32, torch.float16), (192, torch.float32)])
def test_awq_reads_as_comfy_kitchen_reads_it(tmp_path: Path, group: int, dtype: torch.dtype) -> None:
    rows, columns = 101, 192
    codes, scale = random(rows, columns // 2, dtype=torch.int8), random(columns // group, rows, dtype=dtype)
    params = TensorCoreAWQW4A16Layout.Params(
        scale, torch.float32, (rows, columns), random(columns // group, rows, seed=1, dtype=dtype), group
    )
    made = {
        f"a.weight{leaf}": part for leaf, part in TensorCoreAWQW4A16Layout.state_dict_tensors(codes, params).items()
    }
    found = read(tmp_path, made, {"format": "awq_w4a16"}, (rows, columns))
    np.testing.assert_array_equal(found, TensorCoreAWQW4A16Layout.dequantize(codes, params).numpy())


@pytest.mark.parametrize("tiled", [False, True])
def test_svdquant_is_the_float64_sum_rounded_once(tmp_path: Path, tiled: bool) -> None:
    """comfy-kitchen gets the weight by running its product over the unit matrix, which it quantises: it is further from the truth."""
    rows, columns, rank = 256, 192, 16
    codes, scale = random(rows, columns // 2, dtype=torch.int8), random(columns // 64, rows)
    down, up, smooth = random(columns, rank, seed=1), random(rows, rank, seed=2), random(columns, seed=3)
    grid = svdquant._unpack_int4_row_major(codes).double() * scale.double().t().repeat_interleave(64, 1)
    truth = (grid / smooth.double() + up.double() @ down.double().t()).float().numpy()
    layout = TensorCoreSVDQuantW4A4Layout
    params = layout.Params(scale.float(), torch.float32, (rows, columns), down.float(), up.float(), smooth.float())
    np.testing.assert_allclose(
        layout.dequantize(codes, params).numpy(), truth, rtol=0, atol=2**-21 * np.abs(truth).max()
    )
    made = {"a.weight": codes, "a.weight_scale": scale, "a.weight_proj_up": up}
    if tiled:
        tiles = (
            codes.view(rows // 128, 32, 4, columns // 64, 32).permute(0, 3, 1, 2, 4).reshape(-1, columns // 64, 32, 128)
        )
        scales = scale.view(-1, rows // 128, 128).permute(1, 0, 2)
        made = {"a.weight": tiles, "a.weight_scale": scales, "a.proj_up": up.view(-1, 128, rank).permute(0, 2, 1)}
        assert torch.equal(svdquant._tile_packed_weight_to_row_major(tiles), codes)
        assert torch.equal(svdquant._tile_packed_scales_to_natural(scales), scale)
        assert torch.equal(svdquant._tile_packed_lora_up_to_natural(made["a.proj_up"]), up)
    made |= {"a.smooth_factor" if tiled else "a.weight_smooth_factor": smooth, "a.proj_down": down}
    np.testing.assert_array_equal(read(tmp_path, made, {"format": "svdquant_w4a4"}, (rows, columns)), truth)


def test_svdquant_of_a_shifted_input_is_refused(tmp_path: Path) -> None:
    made = {"a.weight": random(64, 32, dtype=torch.int8), "a.weight_scale": random(1, 64)}
    made |= {"a.proj_down": random(64, 8), "a.proj_up": random(64, 8), "a.smooth_factor": random(64)}
    with pytest.raises(DataError, match='"act_unsigned", so that its bias is that of a shifted input'):
        read(tmp_path, made, {"format": "svdquant_w4a4", "act_unsigned": True}, (64, 64))


def test_layers_of_one_file_may_lie_in_several_containers(tmp_path: Path) -> None:
    shape = (64, 256)
    layers: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
        "fp8": (TensorCoreFP8Layout, {}, {"format": "float8_e4m3fn"}),
        "nvfp4": (TensorCoreNVFP4Layout, {}, {"format": "nvfp4"}),
        "mxfp8": (TensorCoreMXFP8Layout, {}, {"format": "mxfp8"}),
        "int8": (TensorWiseINT8Layout, {"per_channel": True}, {"format": "int8_tensorwise"}),
        "int4": (TensorCoreConvRotW4A4Layout, {}, {"format": "convrot_w4a4"}),
        "w4a8": (AsymW4A8Int8Layout, {}, {"format": "asym_w4a8_int8"}),
    }
    tensors: dict[str, torch.Tensor] = {"plain.weight": weight(shape)}
    expected = {}
    for name, (layout, how, config) in layers.items():
        made, expected[name] = stored(layout, weight(shape, seed=len(expected)), **how)
        tensors |= {f"{name}{tensor.removeprefix('a')}": part for tensor, part in made.items()}
        tensors[f"{name}.comfy_quant"] = marker(config)
    path = written(tmp_path / "f.safetensors", tensors)
    with Checkpoint.open(path) as checkpoint:
        assert encodings(checkpoint).keys() == {f"{name}.weight" for name in layers}
    for name, back in expected.items():
        apart = 256 * 2**-24 * float(back.abs().max()) if name in ("int4", "w4a8") else 0
        np.testing.assert_allclose(values(path, f"{name}.weight"), back.numpy(), rtol=0, atol=apart)


def test_a_factor_on_the_inputs_columns_multiplies_the_weight(tmp_path: Path) -> None:
    shape = (48, 64)
    tensors, back = stored(TensorCoreNVFP4Layout, weight(shape))
    factor = torch.rand(64, generator=torch.Generator().manual_seed(2)).bfloat16() + 0.5
    found = read(tmp_path, {**tensors, "a.pre_quant_scale": factor}, {"format": "nvfp4"}, shape)
    np.testing.assert_array_equal(found, (back * factor.float()).numpy())


def test_every_code_of_both_fp8_types_is_read_exactly() -> None:
    from mergetool.checkpoint.dtypes import F8_E4M3, F8_E5M2
    from mergetool.quant.fp8 import widen

    codes = np.arange(256, dtype=np.uint8)
    for dtype, theirs in ((F8_E4M3, torch.float8_e4m3fn), (F8_E5M2, torch.float8_e5m2)):
        out = np.empty(256, np.float32)
        widen(codes, dtype, out)
        np.testing.assert_array_equal(out, torch.from_numpy(codes).view(theirs).float().numpy())
        widen(codes, dtype, out, np.float32(3e5))
        np.testing.assert_array_equal(out, (torch.from_numpy(codes).view(theirs).float() * 3e5).numpy())


def nearest(values: Floats, dtype: DType, factor: np.float32 | None = None) -> Octets:
    return narrow(values if factor is None else values * factor, dtype)


def quantised(quantiser: Quantiser, matrix: torch.Tensor) -> dict[str, np.ndarray]:
    """The bytes of every tensor that ``quantiser`` makes of a matrix, by leaf, quantised piece by piece."""
    shape = (matrix.shape[0], matrix.shape[1])
    rows, columns = quantiser.padded(shape)
    padded = np.zeros((rows, columns), np.float32)
    padded[: shape[0], : shape[1]] = matrix.numpy()
    scale = quantiser.scale(np.abs(padded).max())
    pieces = [quantiser.encode(padded[row : row + PIECE_ROWS], scale, nearest) for row in range(0, rows, PIECE_ROWS)]
    found = {}
    entries = quantiser.entries("a", shape)
    for (name, _, _), parts in zip(entries, zip(*pieces, strict=True), strict=False):
        found[name] = np.concatenate([part.reshape(-1) for part in parts])
    for name, raw in quantiser.constants("a", shape, scale).items():
        found[name] = np.frombuffer(raw, np.uint8)
    assert set(found) == {name for name, _, _ in entries}
    return found


@shapes
@pytest.mark.parametrize(
    ("name", "layout", "how"),
    [
        ("fp8-scaled", TensorCoreFP8Layout, {}),
        ("nvfp4", TensorCoreNVFP4Layout, {}),
        ("mxfp8", TensorCoreMXFP8Layout, {}),
        ("int8", TensorWiseINT8Layout, {"per_channel": True}),
    ],
)
def test_what_is_written_is_comfy_kitchens_bytes(
    shape: tuple[int, int], name: str, layout: Any, how: dict[str, Any]
) -> None:
    matrix = weight(shape, seed=5)
    found = quantised(register.quantiser(name), matrix)
    theirs, _ = stored(layout, matrix, **how)
    for tensor, wanted in theirs.items():
        np.testing.assert_array_equal(found[tensor], wanted.reshape(-1).view(torch.uint8).numpy(), tensor)


@pytest.mark.parametrize("shape", [*SHAPES, (300, 768)], ids=str)
def test_rotated_int8_is_written_as_comfy_kitchen_writes_it_but_for_ties(shape: tuple[int, int]) -> None:
    """Its product adds in another order, so a scale may be some ulps off, and a code that lies halfway between two the other one."""
    matrix, quantiser = weight(shape, seed=5), register.quantiser("int8-convrot")
    found = quantised(quantiser, matrix)
    said = json.loads(found["a.comfy_quant"].tobytes())
    group = next((size for size in (256, 64, 16, 4) if shape[1] % size == 0), 0)
    rotation = {"convrot": True, "convrot_groupsize": group} if group else {}
    assert said == {"format": "int8_tensorwise", **rotation}
    theirs, _ = stored(TensorWiseINT8Layout, matrix, per_channel=True, **rotation)
    scales = found["a.weight_scale"].view("<f4")
    np.testing.assert_allclose(scales, theirs["a.weight_scale"].reshape(-1).numpy(), rtol=2**-20 if group else 0)
    codes = found["a.weight"].view(np.int8).reshape(shape)
    off = codes.astype(int) - theirs["a.weight"].numpy()
    assert np.abs(off).max() <= 1
    assert np.count_nonzero(off) <= 1e-4 * off.size
    if group:
        groups = (
            matrix.double().reshape(shape[0], -1, group)
            @ comfy_kitchen.tensor.int8_utils._build_hadamard(group).double()
        )
        exact = groups.reshape(shape).numpy() / scales.astype(np.float64)[:, None]
        assert np.abs(codes - exact).max() < 0.5 + 1e-4


@pytest.mark.parametrize("name", register.names())
def test_a_weight_of_zeros_stays_one(name: str) -> None:
    """comfy-kitchen divides zero by zero here and writes NaN."""
    quantiser = register.quantiser(name)
    found = quantised(quantiser, torch.zeros(32, 64))
    encoding = quantiser.encoding("a", (32, 64))
    back = encoding.values(lambda tensor, start, size: found[tensor].tobytes()[start : start + size])
    np.testing.assert_array_equal(back, np.zeros((32, 64), np.float32))
