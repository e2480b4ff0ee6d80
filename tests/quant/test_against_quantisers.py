"""Layers as other libraries save them: the values that they decode themselves, bit for bit."""

from __future__ import annotations

import json
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


def at(folder: Path, scratch: Path, case: str, **said: object) -> Path:
    """The file of a case; where a config has to be beside it, in a folder with one."""
    path = folder / f"{NUMBERS[case]}.safetensors"
    if CASES[case]["by"] != "sdnq":
        return path
    (scratch / "model.safetensors").write_bytes(path.read_bytes())
    config = {"quant_method": "sdnq", **CASES[case]["how"], **said}
    (scratch / "config.json").write_text(json.dumps({"quantization_config": config}))
    return scratch


@pytest.mark.parametrize("case", CASES)
def test_a_layer_is_read_as_its_library_reads_it(folder: Path, tmp_path: Path, case: str) -> None:
    found = values(at(folder, tmp_path, case))
    expected = load_file(folder / f"{NUMBERS[case]}-value.safetensors")["value"].numpy()
    if "use_svd" in CASES[case]["how"]:  # a product of float32, where ours is one of float64 that is rounded once
        np.testing.assert_allclose(found, expected, rtol=0, atol=2**-21 * np.abs(expected).max())
    else:
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


INT8_SDNQ, UINT4_SDNQ = "SDNQ int8 of (64, 128)", "SDNQ uint4 of (64, 128)"


@pytest.mark.parametrize(
    ("case", "said", "says"),
    [
        (INT8_SDNQ, {"use_hadamard": True}, 'SDNQ with "use_hadamard"'),
        (INT8_SDNQ, {"use_quantized_matmul": True}, 'SDNQ with "use_quantized_matmul"'),
        (INT8_SDNQ, {"modules_dtype_dict": {"int8": ["a"]}}, 'SDNQ with "modules_dtype_dict"'),
        (INT8_SDNQ, {"weights_dtype": "uint5"}, "SDNQ with weights of uint5"),
        (INT8_SDNQ, {"weights_dtype": "uint8"}, r"has a weight of I8 \[64, 128\], where uint8 codes"),
        (INT8_SDNQ, {"weights_dtype": "int4"}, "where int4 codes of 64 rows is wanted"),
        (UINT4_SDNQ, {"weights_dtype": "int4"}, "has codes of int4, where zero points"),
    ],
)
def test_sdnq_that_its_config_contradicts_is_refused(
    folder: Path, tmp_path: Path, case: str, said: dict[str, object], says: str
) -> None:
    with pytest.raises(DataError, match=says):
        values(at(folder, tmp_path, case, **said))


def test_sdnq_without_its_config_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(DataError, match="is an SDNQ file"):
        values(folder / f"{NUMBERS[UINT4_SDNQ]}.safetensors")
