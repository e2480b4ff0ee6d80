"""One chooser behind ``device``: for merges, which need Triton, and for torch itself, which does not."""

from __future__ import annotations

import importlib.util
from importlib.machinery import ModuleSpec

import pytest
import torch

from mergetool.engine import device
from mergetool.errors import UsageError


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, and neither Triton nor kernels."""
    find = importlib.util.find_spec

    def without_kernels(name: str) -> ModuleSpec | None:
        return None if name in ("triton", "mergetool_kernels") else find(name)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(importlib.util, "find_spec", without_kernels)
    monkeypatch.setattr(device, "_torch_is_for_cpus", lambda: False)


@pytest.mark.parametrize(
    ("name", "found"), [("cpu", "cpu"), ("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1")]
)
def test_torch_computes_on_one_gpu_without_kernels(two_gpus: None, name: str, found: str) -> None:
    assert device.torch_device(name) == found


def test_a_merge_needs_kernels_for_a_gpu(two_gpus: None) -> None:
    assert device.choose("auto", work=10**12) == device.CPU
    with pytest.raises(UsageError, match=r"`device=cuda` needs Triton.*; `device=cpu` gives the same bytes"):
        device.choose("cuda", work=0)


def test_a_gpu_that_is_not_there_is_refused(two_gpus: None) -> None:
    with pytest.raises(
        UsageError, match="`device=cuda:2` needs GPU 2, but there are 2, counted from 0; `device=cpu` does"
    ):
        device.torch_device("cuda:2")


def test_without_a_gpu_torch_computes_on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.torch_device("auto") == "cpu"
    with pytest.raises(UsageError, match="`device=cuda` needs a CUDA GPU"):
        device.torch_device("cuda")
