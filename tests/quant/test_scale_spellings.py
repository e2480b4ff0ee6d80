"""FP8 and its scales in every spelling, dtype and shape that published files have, against torch's own arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergetool.checkpoint.reader import Checkpoint
from mergetool.errors import DataError
from tests.quant.files import encodings, values, weight, written

FACTORS = ["weight_scale", "scale_weight", "weight_scale_inv", "scale", "scale_reciprocal", "weight.scale"]
CODES = [torch.float8_e4m3fn, torch.float8_e5m2]
SCALES = [torch.float32, torch.bfloat16, torch.float16]


def each_block(scales: torch.Tensor, shape: tuple[int, int], block: tuple[int, int]) -> torch.Tensor:
    """The factor of every element, by a loop over the blocks."""
    whole = torch.empty(shape)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            whole[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]] = scales[i, j].float()
    return whole


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(2, 300),
    columns=st.integers(2, 300),
    spelling=st.sampled_from(FACTORS),
    codes=st.sampled_from(CODES),
    dtype=st.sampled_from(SCALES),
    per=st.sampled_from(["tensor", "[1]", "[1, 1]", "row", "row column", "block"]),
    seed=st.integers(0, 9),
)
def test_codes_are_multiplied_by_their_scales(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    columns: int,
    spelling: str,
    codes: torch.dtype,
    dtype: torch.dtype,
    per: str,
    seed: int,
) -> None:
    grid = (-(-rows // 128), -(-columns // 128)) if per == "block" else (rows, 1) if per.startswith("row") else (1, 1)
    block = (128, 128) if per == "block" else (1, columns) if per.startswith("row") else (rows, columns)
    scales = (torch.rand(grid, generator=torch.Generator().manual_seed(seed)) + 0.5).mul(0.003).to(dtype)
    stored = (weight((rows, columns), seed) * 400).to(codes)
    shape = {"tensor": (), "[1]": (1,), "row": (rows,)}.get(per, grid)
    path = written(
        tmp_path_factory.mktemp("f") / "f.safetensors",
        {"a.weight": stored, f"a.{spelling}": scales.reshape(shape)},
    )
    np.testing.assert_array_equal(values(path), (stored.float() * each_block(scales, (rows, columns), block)).numpy())


def test_a_scale_beside_its_reciprocal_divides(tmp_path: Path) -> None:
    codes = (weight((96, 64)) * 400).to(torch.float8_e4m3fn)
    tensors = {"a.weight": codes, "a.scale": torch.tensor(448.0), "a.scale_reciprocal": torch.tensor(1 / 448)}
    tensors |= {"a.input_scale": torch.tensor(20.0), "a.input_scale_reciprocal": torch.tensor(0.05)}
    np.testing.assert_array_equal(
        values(written(tmp_path / "f.safetensors", tensors)), (codes.float() * torch.tensor(1 / 448)).numpy()
    )


def test_a_lone_scale_that_can_only_divide_is_refused(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(8, 8).to(torch.float8_e4m3fn), "a.scale": torch.tensor(448.0)}
    with pytest.raises(DataError, match="looks like the inverse of a factor"):
        values(written(tmp_path / "f.safetensors", tensors))


def test_the_scales_of_a_config_s_block_size_reach_their_blocks(tmp_path: Path) -> None:
    """192 rows in 2 blocks are blocks of 128 and 64 by 128, of 96 by the config."""
    codes = (weight((192, 192)) * 400).to(torch.float8_e4m3fn)
    scales = torch.tensor([[0.25, 0.5], [1.0, 2.0]])
    written(tmp_path / "model.safetensors", {"a.weight": codes, "a.weight_scale_inv": scales})
    config = '{"quantization_config": {"quant_method": "fp8", "weight_block_size": [96, 96]}}'
    (tmp_path / "config.json").write_text(config)
    with Checkpoint.open(tmp_path) as checkpoint:
        found = encodings(checkpoint)["a.weight"].values(checkpoint.read)
    np.testing.assert_array_equal(found, (codes.float() * each_block(scales, (192, 192), (96, 96))).numpy())


@pytest.mark.parametrize("shape", [(), (32,), (32, 1)], ids=str)
def test_a_scaled_convolution_is_read(tmp_path: Path, shape: tuple[int, ...]) -> None:
    codes = (torch.randn(32, 4, 3, 3) * 100).to(torch.float8_e4m3fn)
    scales = torch.rand(shape) + 0.5
    path = written(tmp_path / "f.safetensors", {"a.weight": codes, "a.weight_scale": scales})
    expected = codes.float() * scales.reshape(-1, 1, 1, 1)
    np.testing.assert_array_equal(values(path).reshape(32, 4, 3, 3), expected.numpy())


def test_a_norm_s_scale_is_no_scale_of_codes(tmp_path: Path) -> None:
    tensors = {"norm.scale": torch.ones(8), "a.weight": torch.ones(8, 8).to(torch.float8_e4m3fn)}
    with Checkpoint.open(written(tmp_path / "f.safetensors", tensors)) as checkpoint:
        assert encodings(checkpoint) == {}
