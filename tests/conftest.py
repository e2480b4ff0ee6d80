"""What tests of several rooms share."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.families import checkpoint

if TYPE_CHECKING:
    from tests.adapters.matrix import Matrix
    from tests.oracles import ComfyUI

# Examples are counted, never timed: a machine under load is not a fault of what is tested.
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")

if not torch.cuda.is_available():  # before any kernel is imported
    os.environ["TRITON_INTERPRET"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # a worker a core: more threads would fight for the cores
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests to the front, where a worker begins; the others are taken from the back of its queue."""
    items.sort(key=lambda item: item.get_closest_marker("first") is None)


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pipeline folders ``base`` and ``turbo``, of random weights."""
    from tests.pipelines import family

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers and transformers warn on saving
        return family(tmp_path_factory.mktemp("pipelines"))


@pytest.fixture(scope="session")
def comfyui() -> Iterator[ComfyUI]:
    """The real ComfyUI 0.30.0, started by the first request of a worker; what it cannot be fetched for is said by every test that asks."""
    from tests.oracles import ComfyUI, OracleMissingError

    try:
        oracle = ComfyUI()
    except OracleMissingError as error:
        pytest.fail(str(error), pytrace=False)
    with oracle:
        yield oracle


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three fine-tunes of one base, ``alk``, ``a`` and ``b``, as files in the working folder."""
    for seed, name in enumerate(["alk", "a", "b"]):
        checkpoint(tmp_path / f"{name}.safetensors", variant=seed)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def matrix(tmp_path_factory: pytest.TempPathFactory, comfyui: ComfyUI) -> Matrix:
    """What every release of diffusers and ComfyUI made of the LoRAs of `tests/adapters/matrix.py`, found once for all workers."""
    from tests.adapters.matrix import Matrix

    base = tmp_path_factory.getbasetemp()
    return Matrix((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "matrix", comfyui)
