"""spandrel as a library of the tests: fetched once, and imported beside a CPU torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tests.oracles import fetching, library

PACKAGES = ["spandrel==0.4.2", "einops==0.8.2"]


@contextmanager
def installed() -> Iterator[None]:
    """Makes ``import spandrel`` work in a block.

    Two of its architectures, which no test loads, import torchvision, whose wheel on PyPI needs torch for CUDA: it is a stand-in while they are imported.
    """
    stubs = library.Stubs()
    stubs.NAMES = ("torchvision",)
    sys.path.insert(0, str(fetching.pip_target("spandrel", PACKAGES)))
    sys.meta_path.insert(0, stubs)
    try:
        import spandrel  # noqa: F401

        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.meta_path.remove(stubs)
        yield
    finally:
        sys.path.pop(0)
