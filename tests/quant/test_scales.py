"""What the values of scales say of a file: noted where odd, refused where they are no numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mergetool.checkpoint.reader import Checkpoint
from mergetool.errors import DataError
from mergetool.quant.weights import quantised
from tests.quant.files import marker, written

INT8 = {"format": "int8_tensorwise"}


def notes(folder: Path, scale: torch.Tensor, *, leaf: str = "weight_scale", codes: torch.dtype | None = None) -> str:
    tensors = {"a.weight": torch.ones(4, 8).to(codes or torch.float8_e4m3fn), f"a.{leaf}": scale}
    if codes is torch.int8:
        tensors["a.comfy_quant"] = marker(INT8)
    with Checkpoint.open(written(folder / "f.safetensors", tensors)) as checkpoint:
        return " · ".join(quantised(checkpoint, "f").notes)


@pytest.mark.parametrize("codes", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_a_scale_of_zero_is_noted(tmp_path: Path, codes: torch.dtype) -> None:
    assert "has 1 weight with a scale of 0" in notes(tmp_path, torch.tensor(0.0), codes=codes)


def test_a_row_s_scale_of_zero_is_noted(tmp_path: Path) -> None:
    assert "a scale of 0" in notes(tmp_path, torch.tensor([1.0, 0.0, 1.0, 1.0]))


def test_a_scale_below_zero_is_noted(tmp_path: Path) -> None:
    assert "turns their signs" in notes(tmp_path, torch.tensor(-0.5))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_scale_that_is_no_number_is_refused(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    with pytest.raises(DataError, match=r'^"f": the scale "a\.weight_scale" is NaN or infinite'):
        notes(tmp_path, torch.tensor(value, dtype=dtype))


def test_codes_with_the_scale_of_an_input_alone_are_plain_and_noted(tmp_path: Path) -> None:
    assert "they are read as plain FP8" in notes(tmp_path, torch.tensor(0.1), leaf="input_scale")


def test_ordinary_scales_are_not_worth_a_note(tmp_path: Path) -> None:
    assert notes(tmp_path, torch.tensor(0.1)) == ""
