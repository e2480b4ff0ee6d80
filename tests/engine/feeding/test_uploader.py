"""Bytes of files on a device: all of them, where they belong, and nothing of the files left in the page cache."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mergetool.checkpoint.inputs import InputFile
from mergetool.engine.feeding import uploader
from mergetool.engine.feeding.uploader import Uploader
from mergetool.errors import DataError
from tests.pages import cached, uncache

SIZE = 1_000_003


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of many pieces."""
    monkeypatch.setattr(uploader, "PIECE", 1 << 14)
    path = tmp_path / "model"
    path.write_bytes(os.urandom(SIZE))
    return path


def uploaded(file: InputFile, threads: int, device: str) -> bytes:
    """The file from its seventh byte on, through a tensor that is larger."""
    target = torch.zeros(SIZE + 10, dtype=torch.uint8, device=device)
    with Uploader(target.device, threads) as up:
        stream = torch.cuda.current_stream() if device == "cuda" else None
        up.finish(up.upload(file, 7, target[3 : 3 + SIZE - 7]), stream)
        assert target[:3].sum() + target[SIZE - 4 :].sum() == 0, "nothing beside the target is touched"
        return target[3 : SIZE - 4].cpu().numpy().tobytes()


@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_byte_arrives_where_it_belongs(path: Path, threads: int, device: str) -> None:
    with InputFile.open(path) as file:
        assert uploaded(file, threads, device) == path.read_bytes()[7:]


def test_what_was_uploaded_is_let_go_of(path: Path) -> None:
    uncache(path)
    with InputFile.open(path) as file:
        uploaded(file, 2, "cpu")
    assert cached(path) == 0


def test_finishing_raises_what_reading_raises(path: Path) -> None:
    with InputFile.open(path) as file, Uploader(torch.device("cpu"), 2) as up:
        os.truncate(path, SIZE // 2)
        arrivals = up.upload(file, 0, torch.empty(SIZE, dtype=torch.uint8))
        with pytest.raises(DataError, match="shrank while it was read"):
            up.finish(arrivals, None)
