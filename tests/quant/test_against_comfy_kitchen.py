"""Every ComfyUI container against comfy-kitchen, ComfyUI's own library: the same values read, the same tensors written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy_kitchen
import numpy as np
import pytest
import torch
from comfy_kitchen.tensor import (
    TensorCoreFP8Layout,
    TensorCoreMXFP8Layout,
    TensorCoreNVFP4Layout,
    TensorWiseINT8Layout,
)

from mergetool.checkpoint.dtypes import DType
from mergetool.quant import register
from mergetool.quant.encoding import Floats, Octets
from mergetool.quant.fp8 import narrow
from mergetool.quant.quantiser import PIECE_ROWS, Quantiser
from tests.quant.files import SHAPES, marker, values, weight, written

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
    for name, raw in quantiser.constants("a", scale).items():
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


@pytest.mark.parametrize("name", register.names())
def test_a_weight_of_zeros_stays_one(name: str) -> None:
    """comfy-kitchen divides zero by zero here and writes NaN."""
    quantiser = register.quantiser(name)
    found = quantised(quantiser, torch.zeros(32, 64))
    encoding = quantiser.encoding("a", (32, 64))
    back = encoding.values(lambda tensor, start, size: found[tensor].tobytes()[start : start + size])
    np.testing.assert_array_equal(back, np.zeros((32, 64), np.float32))
