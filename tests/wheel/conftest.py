"""Builds that several tests look at, each made once for all workers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from tests.wheel.builds import Built, build, copied, listed


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The wheel of this checkout."""
    return _once(tmp_path_factory, "wheel", lambda to: build(copied(to / "source", listed()), "wheel", to / "dist"))


@pytest.fixture(scope="session")
def pure(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The wheel where there is no compiler, and the library of an earlier build lies there still."""

    def make(to: Path) -> Built:
        source = copied(to / "source", listed())
        (source / "kernels/mergetool_kernels/for_processor.so").write_bytes(b"made of older sources")
        return build(source, "wheel", to / "dist", CC="/nowhere/cc")

    return _once(tmp_path_factory, "pure", make)


def _once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Built]) -> Built:
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"built-{name}"
    with FileLock(f"{folder}.lock"):
        said = folder / "said"
        if not said.exists():
            said.write_text(make(folder).said)
        (path,) = (folder / "dist").iterdir()
        return Built(path, said.read_text())
