"""A container is one file: with it in its folder, the options, the schema, help, sentences, writing and reading all know it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergetool.errors import UsageError
from mergetool.quant import register
from tests.families import checkpoint

Run = Callable[..., str]

SIXTEENTHS = '''
"""Sixteenths: integers from -128 to 127 that are divided by 16 and by one float a tensor, "weight_unit"."""

from dataclasses import dataclass

import numpy as np

from mergetool.checkpoint.dtypes import BY_CODE, F32
from mergetool.quant.encoding import Encoding, Span, beside
from mergetool.quant.quantiser import Quantiser, positive


@dataclass(frozen=True)
class Sixteenths(Encoding):
    unit: str

    label = "sixteenths"
    quant = "sixteenths"

    def _spans(self, row, rows):
        return Span(self.tensor, row * self.width, rows * self.width), Span(self.unit, 0, 4)

    def _decode(self, raw, row, rows, out):
        np.multiply(np.frombuffer(raw[0], np.int8).reshape(rows, -1), self._step(raw), out=out)

    def steps(self, raw, row, rows):
        return np.full((1, 1), self._step(raw), np.float32)

    def _step(self, raw):
        return np.frombuffer(raw[1], "<f4")[0] / np.float32(16)


class SixteenthsQuantiser(Quantiser):
    quant = "sixteenths"
    config = {"format": "sixteenths"}
    scales = frozenset({"weight_unit"})
    _tensor_scale_leaf = "weight_unit"

    def read(self, layer):
        unit, _ = layer.side("weight_unit", F32)
        shape = layer.matrix(BY_CODE["I8"])
        return Sixteenths(layer.tensor, beside(layer), shape, shape, None, unit)

    def encoding(self, layer, shape):
        unit = f"{layer}.weight_unit"
        return Sixteenths(f"{layer}.weight", (unit, f"{layer}.comfy_quant"), shape, shape, None, unit)

    def scale(self, amax):
        return positive(np.float32(amax * 16 / 127))

    def encode(self, values, scale, round_to):
        return (np.rint(values * (16 / scale)).astype(np.int8).view(np.uint8),)

    def _stored(self, padded):
        return [("weight", BY_CODE["I8"], padded)]


CONTAINER = SixteenthsQuantiser()
'''
RUN = """
import sys
import mergetool.quant.containers
mergetool.quant.containers.__path__.append(sys.argv.pop(1))
from mergetool.__main__ import main
main()
"""


@pytest.fixture
def mergetool_with_toy(tmp_path: Path) -> Run:
    """The command line, in a process that has one more file among its containers."""
    place = tmp_path / "containers"
    place.mkdir()
    (place / "sixteenths.py").write_text(SIXTEENTHS)

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", RUN, place, *words], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        return done.stdout + done.stderr

    return run


def test_help_schema_and_sentences_name_a_new_container(mergetool_with_toy: Run) -> None:
    assert "sixteenths" in mergetool_with_toy("merge", "--help")
    schema = json.loads(mergetool_with_toy("merge", "--schema"))
    assert "sixteenths" in json.dumps(schema)
    refused = mergetool_with_toy("convert", "a.safetensors", "-o", "b.safetensors", "--quant", "seventeenths")
    assert "sixteenths" in refused


def test_a_new_container_is_written_and_read(mergetool_with_toy: Run, tmp_path: Path) -> None:
    checkpoint(tmp_path / "a.safetensors")
    mergetool_with_toy("convert", "a.safetensors", "-o", "q.safetensors", "--quant", "sixteenths", "--scale-search")
    stored = load_file(tmp_path / "q.safetensors")
    name = next(name.removesuffix(".weight_unit") for name in stored if name.endswith(".weight_unit"))
    assert json.loads(bytes(stored[f"{name}.comfy_quant"].tolist())) == {"format": "sixteenths"}
    assert "sixteenths" in mergetool_with_toy("inspect", "q.safetensors")
    mergetool_with_toy("convert", "q.safetensors", "-o", "back.safetensors", "--dtype", "fp32")
    back = load_file(tmp_path / "back.safetensors")[f"{name}.weight"]
    unit = stored[f"{name}.weight_unit"]
    assert torch.equal(back, stored[f"{name}.weight"].float() * (unit / 16))


def test_a_scale_of_another_container_is_no_container(mergetool_with_toy: Run, tmp_path: Path) -> None:
    checkpoint(tmp_path / "a.safetensors")
    mergetool_with_toy("convert", "a.safetensors", "-o", "q.safetensors", "--quant", "sixteenths")
    without = subprocess.run(
        [sys.executable, "-m", "mergetool", "convert", "q.safetensors", "-o", "b.safetensors"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert without.returncode == 65
    assert "a ComfyUI file of the format" in without.stderr


def test_the_names_are_those_of_the_files_and_of_what_is_in_them() -> None:
    assert register.names() == tuple(one.quant for one in register.quantisers())
    assert register.names() == ("fp8-scaled", "int8", "int8-convrot", "mxfp8", "nvfp4")


def test_another_word_is_refused_with_the_names() -> None:
    with pytest.raises(UsageError, match="choose one of fp8-scaled, int8, int8-convrot, mxfp8, nvfp4"):
        register.quantiser("fp3")


def test_help_waits_for_no_numpy() -> None:
    code = "import sys; import mergetool.options.merging; assert 'numpy' not in sys.modules, 'numpy'"
    subprocess.run([sys.executable, "-c", code], check=True)
