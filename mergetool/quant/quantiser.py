"""The interface of a quantised container: how to read a weight, and how to write one.

A weight is quantised in pieces of `PIECE_ROWS` rows, after its largest magnitude is known. Rounding to FP8 is done by the caller, whose way of
rounding then holds for every container that stores FP8.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from mergetool.checkpoint.dtypes import BY_CODE, F32, DType
from mergetool.quant.block_scales import TILE_ROWS
from mergetool.quant.dequantiser import Dequantiser
from mergetool.quant.encoding import Encoding, Floats, Octets, rounded_up

PIECE_ROWS = TILE_ROWS

TensorEntry = tuple[str, DType, tuple[int, ...]]


class Round(Protocol):
    """Rounding to FP8."""

    def __call__(self, values: Floats, dtype: DType, factor: np.float32 | None = None) -> Octets:
        """``values * factor``, float32 [rows, columns], as the codes of an FP8 dtype, saturating: as many bytes of the same shape."""


class Quantiser(Dequantiser):
    """A container that is written too. ``quant`` is its name for the option, ``multiple`` what both sides of a weight are padded to."""

    quant: str
    multiple: int = 1
    config: Mapping[str, Any]
    """The entry of ``.comfy_quant`` in every layer that is written."""

    @property
    def title(self) -> str:
        """The word of the option."""
        return self.quant

    @property
    def formats(self) -> tuple[str, ...]:
        """The container's names in the markers of files."""
        return (self.config["format"],)

    def padded(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The shape of the values stored for a weight of ``shape``."""
        return rounded_up(shape[0], self.multiple), rounded_up(shape[1], self.multiple)

    def entries(self, layer: str, shape: tuple[int, int]) -> list[TensorEntry]:
        """Name, dtype and shape of every tensor that ``layer``'s weight becomes."""
        padded = self.padded(shape)
        marker = (f"{layer}.comfy_quant", BY_CODE["U8"], (len(self.marker(shape)),))
        scale = [(f"{layer}.{self._tensor_scale_leaf}", F32, ())] if self._tensor_scale_leaf else []
        return [*((f"{layer}.{leaf}", dtype, size) for leaf, dtype, size in self._stored(padded)), *scale, marker]

    def constants(self, layer: str, shape: tuple[int, int], scale: np.float32) -> dict[str, bytes]:
        """The tensors of a ``layer`` that do not depend on its rows: marker and tensor scale.

        Some containers have no tensor scale.
        """
        constants = {f"{layer}.comfy_quant": self.marker(shape)}
        if self._tensor_scale_leaf:
            constants[f"{layer}.{self._tensor_scale_leaf}"] = np.float32(scale).tobytes()
        return constants

    @abstractmethod
    def encoding(self, layer: str, shape: tuple[int, int]) -> Encoding:
        """The reading of the written weight. Its spans are the results of `encode`, then the tensor's scale."""

    @abstractmethod
    def scale(self, amax: np.float32) -> np.float32:
        """The tensor's scale for a largest magnitude. 1 where the container has none, and for a weight of zeros."""

    @abstractmethod
    def encode(self, values: Floats, scale: np.float32, round_to: Round) -> tuple[Octets, ...]:
        """Encode consecutive rows [rows, padded columns]: the codes, and scales of rows or blocks.

        Some containers have no such scales.
        """

    @abstractmethod
    def _stored(self, padded: tuple[int, int]) -> list[TensorEntry]:
        """Leaf, dtype and shape of the results of `encode`, whole."""

    @property
    def has_tensor_scale(self) -> bool:
        """Whether a tensor has one scale that could be another."""
        return self._tensor_scale_leaf is not None

    @property
    def _tensor_scale_leaf(self) -> str | None:
        return None

    def marker(self, shape: tuple[int, int]) -> bytes:
        """The bytes of the ``.comfy_quant`` of a layer with a weight of ``shape``."""
        return json.dumps({**self.config, **self.of_shape(shape)}).encode()

    def of_shape(self, shape: tuple[int, int]) -> Mapping[str, Any]:
        """The keys that a marker has beside ``config`` for a weight of ``shape``."""
        return {}


def positive(scale: np.float32) -> np.float32:
    """A scale that can be divided by. That of a weight of zeros is 1, and none is below float32's normal numbers."""
    if scale == 0:
        return np.float32(1)
    return np.float32(max(scale, np.finfo(np.float32).tiny))
