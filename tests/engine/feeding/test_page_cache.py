"""What the commands leave in the page cache: what was there before them, and nothing else. The kernel counts the pages."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import mergetool
from tests.pages import cached, uncache

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="no call of this system lets pages go")

FAMILY = ("alk.safetensors", "a.safetensors", "b.safetensors")
LEFT = 0.1
"""The share of a small file that looking at it once more may bring: its header, and what the kernel reads on behind that."""


def merge() -> None:
    mergetool.merge("'alk.safetensors' + 2 * ('a.safetensors' - 'b.safetensors')", "out.safetensors", force=True)


def merge_by_reading() -> None:
    mergetool.merge(
        "'alk.safetensors' + 2 * ('a.safetensors' - 'b.safetensors')", "out.safetensors", force=True, reader="pread"
    )


def compare() -> None:
    mergetool.compare("a.safetensors", "b.safetensors", onto="alk.safetensors")


def diff() -> None:
    mergetool.diff("a.safetensors", "b.safetensors", "lora.safetensors", rank=2)
    mergetool.diff("a.safetensors", "alk.safetensors", "other.safetensors", rank=2)


COMMANDS = pytest.mark.parametrize("command", [merge, merge_by_reading, compare, diff])


@COMMANDS
def test_models_that_were_not_cached_are_not_cached_afterwards(command: Callable[[], None], family: Path) -> None:
    uncache(*(family / name for name in FAMILY))
    command()
    assert {name: cached(family / name) for name in FAMILY if cached(family / name) > LEFT} == {}


@COMMANDS
def test_models_that_were_cached_still_are(command: Callable[[], None], family: Path) -> None:
    for name in FAMILY:
        (family / name).read_bytes()
    command()
    assert {name: cached(family / name) for name in FAMILY} == dict.fromkeys(FAMILY, 1.0)
