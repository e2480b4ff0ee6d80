"""The register of quantised containers: the files of `containers` and `read_only`. There is no other list of them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

from mergetool.errors import UsageError
from mergetool.quant import containers, read_only

if TYPE_CHECKING:
    from mergetool.quant.dequantiser import Dequantiser
    from mergetool.quant.quantiser import Quantiser


@cache
def names() -> tuple[str, ...]:
    """The values of the option ``quant``, in order. No container is imported for it."""
    return tuple(sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(containers.__path__)))


@cache
def quantisers() -> tuple[Quantiser, ...]:
    """Every container that is written."""
    return tuple(quantiser(name) for name in names())


def quantiser(name: str) -> Quantiser:
    """The container that ``quant`` calls ``name``; raises UsageError for any other word."""
    if name not in names():
        raise UsageError(f'"{name}" is not a quantised container to write; choose one of {", ".join(names())}.')
    module = importlib.import_module(f"{containers.__name__}.{name.replace('-', '_')}")
    found: Quantiser = module.CONTAINER
    return found


@cache
def every() -> tuple[Dequantiser, ...]:
    """Every container that is read: those that are written first."""
    others = sorted(module.name for module in pkgutil.iter_modules(read_only.__path__))
    found = (importlib.import_module(f"{read_only.__name__}.{name}").CONTAINER for name in others)
    return (*quantisers(), *found)


@cache
def scales() -> frozenset[str]:
    """Last components of the names of scales that only one container has."""
    return frozenset().union(*(one.scales for one in every()))


@cache
def beside_codes(method: str) -> Mapping[str, str]:
    """Last components that name a side tensor beside codes only -> its current name.

    ``method`` is the file's ``quant_method``, "" without.
    """
    return {leaf: side for one in every() if one.method in ("", method) for leaf, side in one.beside_codes.items()}


@cache
def between() -> frozenset[str]:
    """Components of names that stand between a weight and its side tensors."""
    return frozenset().union(*(one.between for one in every()))
