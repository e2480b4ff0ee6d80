"""Layers as other libraries save them: the values that they decode themselves, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mergetool.errors import DataError
from tests.oracles.quantisers import CASES, made
from tests.quant.files import values, written

NUMBERS = {name: number for number, name in enumerate(CASES)}
Change = Callable[[torch.Tensor], torch.Tensor] | None


@pytest.fixture(scope="module")
def folder() -> Path:
    return made()


@pytest.mark.parametrize("case", CASES)
def test_a_layer_is_read_as_its_library_reads_it(folder: Path, case: str) -> None:
    found = values(folder / f"{NUMBERS[case]}.safetensors")
    expected = load_file(folder / f"{NUMBERS[case]}-value.safetensors")["value"].numpy()
    np.testing.assert_array_equal(found, expected)


NESTED = "bitsandbytes nf4 nested by 64 of (64, 128)"
PLAIN = "bitsandbytes nf4 by 64 of (64, 128)"
INT8 = "bitsandbytes int8 of (64, 128)"
STATE = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("case", "leaf", "change", "says"),
    [
        (PLAIN, "weight", lambda codes: codes[:-1], "bytes of codes"),
        (PLAIN, "weight.absmax", lambda absmax: absmax[:-1], 'has a "absmax" of shape'),
        (PLAIN, "weight.quant_map", lambda table: table[:8], 'has a "quant_map" of shape'),
        (PLAIN, "weight.quant_map", None, 'has no "quant_map"'),
        (PLAIN, STATE, None, "no quant_state"),
        (PLAIN, STATE, lambda text: text[:-1], "no JSON object"),
        (NESTED, "weight.nested_absmax", lambda absmax: absmax.repeat(2), 'has a "nested_absmax" of shape'),
        (NESTED, "weight.nested_quant_map", None, 'has no "nested_quant_map"'),
        (NESTED, "weight.nested_absmax", None, 'has a "absmax" of U8'),
        (INT8, "weight_format", lambda order: order + 2, "another order than rows"),
        (INT8, "SCB", lambda scale: scale[:-1], 'has an "SCB" of shape'),
    ],
)
def test_what_contradicts_itself_is_refused(
    folder: Path, tmp_path: Path, case: str, leaf: str, change: Change, says: str
) -> None:
    stored = load_file(folder / f"{NUMBERS[case]}.safetensors")
    tensor = stored.pop(f"a.{leaf}")
    if change is not None:
        stored[f"a.{leaf}"] = change(tensor).clone()
    with pytest.raises(DataError, match=says):
        values(written(tmp_path / "f.safetensors", stored))
