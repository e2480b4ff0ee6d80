"""The register of quantised containers: the files of `mergetool.quant.containers`. There is no other list of them."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING

from mergetool.errors import UsageError
from mergetool.quant import containers

if TYPE_CHECKING:
    from mergetool.quant.quantiser import Quantiser


@cache
def names() -> tuple[str, ...]:
    """The values of the option ``quant``, in order. No container is imported for it."""
    return tuple(sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(containers.__path__)))


@cache
def quantisers() -> tuple[Quantiser, ...]:
    """Every container."""
    return tuple(quantiser(name) for name in names())


def quantiser(name: str) -> Quantiser:
    """The container that ``quant`` calls ``name``; raises UsageError for any other word."""
    if name not in names():
        raise UsageError(f'"{name}" is not a quantised container to write; choose one of {", ".join(names())}.')
    module = importlib.import_module(f"{containers.__name__}.{name.replace('-', '_')}")
    found: Quantiser = module.CONTAINER
    return found


@cache
def scales() -> frozenset[str]:
    """Last components of the names of scales that only one container has."""
    return frozenset().union(*(one.scales for one in quantisers()))
