"""The interface of a quantised container: its marks, and the reading of a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from mergetool.quant.encoding import Encoding, Layer


class Dequantiser(ABC):
    """A quantised container; stateless."""

    scales: frozenset[str] = frozenset()
    """Last components of the names of scales that it alone has beside a weight."""
    beside_codes: Mapping[str, str] = MappingProxyType({})
    """Last components that name one of its side tensors beside a weight of 8 bits, and other things elsewhere -> the side tensor's current name.

    With a ``method`` they do in files of that method only."""
    between: frozenset[str] = frozenset()
    """Components of names that stand between a weight and its side tensors."""
    method: str = ""
    """Its ``quant_method`` in a ``quantization_config``, for a container that tensors alone do not tell."""
    rotates: bool = False
    """Whether its weights may be rotated (``convrot``)."""

    @property
    @abstractmethod
    def title(self) -> str:
        """Its name in sentences."""

    @property
    def formats(self) -> tuple[str, ...]:
        """The container's names in the markers of files."""
        return ()

    def claims(self, layer: Layer) -> bool:
        """Whether a layer that no marker speaks of is in this container, by its tensors."""
        return False

    def unread(self, config: Mapping[str, Any]) -> str | None:
        """Name a key or value in a ``quantization_config`` of its method that is not read; or None."""
        return None

    @abstractmethod
    def read(self, layer: Layer) -> Encoding:
        """Read a layer of a file. Raises DataError where its tensors and its marker contradict each other."""
