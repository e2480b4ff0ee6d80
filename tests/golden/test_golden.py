"""Files of other programs, of old releases and of ours are read for ever, to the byte; how they were made is in `make.py`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from mergetool.adapters.lora_file import open_lora
from mergetool.checkpoint.reader import Checkpoint
from mergetool.recipe import provenance

HERE = Path(__file__).parent
GOLDEN: dict[str, dict[str, Any]] = json.loads((HERE / "golden.json").read_text())


def place(name: str) -> Path:
    path = HERE / "files" / name
    return path / "adapter_model.safetensors" if name.startswith("peft-") else path


def test_there_are_enough() -> None:
    assert len(GOLDEN) >= 30
    assert {path.name for path in (HERE / "files").iterdir()} == set(GOLDEN)


@pytest.mark.parametrize("name", GOLDEN)
def test_every_tensor_is_what_was_written(name: str) -> None:
    with Checkpoint.open(place(name)) as checkpoint:
        found = {
            key: [info.dtype.code, list(info.shape), hashlib.sha256(checkpoint.read(key)).hexdigest()]
            for key, info in checkpoint.tensors.items()
        }
    assert found == GOLDEN[name]["tensors"]


@pytest.mark.parametrize("name", [name for name, said in GOLDEN.items() if "lora" in said])
def test_every_adapter_is_understood_whole(name: str) -> None:
    with open_lora(HERE / "files" / name) as file:
        assert not file.unmatched
        assert len(file.adapters) == GOLDEN[name]["lora"]


@pytest.mark.parametrize("name", [name for name, said in GOLDEN.items() if "recipe" in said])
def test_what_an_old_merge_says_of_itself_is_read(name: str) -> None:
    with Checkpoint.open(place(name)) as checkpoint:
        recorded = provenance.read(checkpoint.metadata, name)
    assert recorded.expression == GOLDEN[name]["recipe"]
    assert list(recorded.fingerprints) == ["a", "b", "c"]
