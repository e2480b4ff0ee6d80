"""The place of one quantised weight in a file, and the decoding of its rows to float32.

Every container is a file of `containers`, with one class over this interface. Nothing here reads a file: an `Encoding` says which
bytes it needs (`spans`) and turns them into values (`decode`), so that the same code serves windows and positioned reads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, NoReturn, Self

import numpy as np
import numpy.typing as npt

from mergetool.checkpoint.dtypes import BF16, F16, F32, DType
from mergetool.checkpoint.header import TensorInfo
from mergetool.checkpoint.names import quoted
from mergetool.errors import DataError

Floats = npt.NDArray[np.float32]
Octets = npt.NDArray[np.uint8]

SCALE_DTYPES: tuple[DType, ...] = (F32, BF16, F16)
"""The dtypes of a scale that is a plain float; each widens to float32 exactly."""


USUAL_ROTATION = 256
"""Columns that are rotated together where a marker does not say how many."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes ``[start, start + size)`` of the stored tensor ``tensor``."""

    tensor: str
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Layer:
    """One module of a file by its header: the weight and the tensors beside it.

    ``name`` is the module's, without ``.weight``. ``sides`` maps the last component of a side tensor, under its current name
    (``weight_scale`` for the old ``scale_weight``), to the stored name and its TensorInfo. ``config`` is what the file says about
    the layer: the JSON in ``.comfy_quant`` or the entry of ``_quantization_metadata``; None where it says nothing. ``blocks`` are the rows and
    columns that share a scale by the file's config.json; None where it does not say. ``read`` gives the bytes of a small stored tensor.
    ``file`` is the ``quantization_config`` of the file's config.json, empty without.
    """

    source: str
    name: str
    weight: TensorInfo
    sides: Mapping[str, tuple[str, TensorInfo]]
    config: Mapping[str, Any] | None
    blocks: tuple[int, int] | None = None
    read: Callable[[str], bytes] = field(default=lambda _: b"", compare=False)
    file: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tensor(self) -> str:
        """The stored weight's name."""
        return f"{self.name}.weight"

    def side(self, leaf: str, *dtypes: DType) -> tuple[str, TensorInfo]:
        """The stored name and TensorInfo of a side tensor. Raises DataError where it is missing or of another dtype."""
        if leaf not in self.sides:
            self.refuse(f'has no "{leaf}"', "one beside the weight")
        name, info = self.sides[leaf]
        if info.dtype not in dtypes:
            self.refuse(f'has a "{leaf}" of {info.dtype.code}', " or ".join(dtype.code for dtype in dtypes))
        return name, info

    def matrix(self, *dtypes: DType, convolutions: bool = False) -> tuple[int, int]:
        """The stored weight's rows and columns, with ``convolutions`` flattened.

        Raises DataError for another rank, another dtype, or no elements.
        """
        shape = self.weight.shape
        if convolutions and len(shape) > 2:
            shape = (shape[0], prod(shape[1:]))
        if self.weight.dtype not in dtypes or len(shape) != 2 or 0 in shape:
            wanted = " or ".join(dtype.code for dtype in dtypes)
            self.refuse(f"has a weight of {self.weight.dtype.code} {list(self.weight.shape)}", f"a matrix of {wanted}")
        return shape[0], shape[1]

    def setting(self, key: str, default: object) -> object:
        """The value of ``key`` in the layer's marker, unchecked. ComfyUI reads it there or from "params" in it."""
        config = self.config or {}
        inner = config.get("params")
        return config.get(key, inner.get(key, default) if isinstance(inner, dict) else default)

    def rotation(self) -> object:
        """The group size by which the layer is rotated (ConvRot), unchecked; None without.

        The layer's marker states it. Raises DataError for a "convrot" that says neither.
        """
        rotated = self.setting("convrot", False)
        if type(rotated) is not bool:
            self.refuse('has a "convrot" that is neither true nor false', "one of them")
        return self.setting("convrot_groupsize", USUAL_ROTATION) if rotated else None

    def refuse(self, found: str, wanted: str) -> NoReturn:
        """Raise the one sentence for a layer that contradicts itself."""
        said = self.config.get("format") if self.config else None
        marked = f" is marked {quoted(str(said)[:40])} and" if said is not None else ""
        raise DataError(
            f'"{self.source}": layer {quoted(self.name)}{marked} {found}, where {wanted} is wanted; '
            "the file is damaged or half converted: use the unquantised original."
        )


@dataclass(frozen=True)
class Encoding(ABC):
    """One quantised weight: the stored tensors it is made of, and its values.

    ``tensor`` is the stored weight and ``beside`` every other stored tensor that belongs to it: scales, marker. ``shape`` is the true
    shape; ``padded`` is that of the values stored, which some containers round up to whole blocks. ``columns`` is the per-column
    factor ``pre_quant_scale`` that ComfyUI applies to the layer's input, which comes to the same as multiplying the weight by it.
    """

    tensor: str
    beside: tuple[str, ...]
    shape: tuple[int, ...]
    padded: tuple[int, int]
    columns: tuple[str, DType] | None

    @property
    @abstractmethod
    def label(self) -> str:
        """The container, for people: ``scaled FP8 (e4m3)``."""

    @property
    def quant(self) -> str | None:
        """The output container of the same kind, as ``quant`` names it. None where that cannot be written."""
        return None

    @property
    def float_scales(self) -> tuple[tuple[str, DType, int], ...]:
        """Stored name, dtype and number of the scales that are plain floats."""
        return ()

    @property
    def tile_rows(self) -> int:
        """Rows that are best decoded together. Values may depend on where a tile of so many begins."""
        return 1

    @property
    def rows(self) -> int:
        """True rows; 1 for a vector."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def width(self) -> int:
        """True elements of a row."""
        return self.shape[-1]

    @property
    def tensors(self) -> tuple[str, ...]:
        """Every stored tensor of the weight, the weight itself first."""
        return (self.tensor, *self.beside)

    def cropped(self, shape: tuple[int, ...]) -> Self:
        """The same weight with its true shape, which padding hid.

        Raises ValueError for one that is larger than the padded.
        """
        if len(shape) != 2 or any(true > held for true, held in zip(shape, self.padded, strict=True)):
            raise ValueError(f"{list(shape)} does not lie in {list(self.padded)}")
        return replace(self, shape=shape)

    @property
    def pads(self) -> bool:
        """Whether the container pads a weight to whole blocks. The file alone does not tell its shape then."""
        return False

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of ``shape``, padded, has the stored shape."""
        return shape == self.padded

    def spans(self, row: int, rows: int) -> tuple[Span, ...]:
        """The stored bytes that the true rows ``[row, row + rows)`` are decoded from."""
        spans = self._spans(row, rows)
        if self.columns is not None:
            tensor, dtype = self.columns
            spans = (*spans, Span(tensor, 0, self.padded[1] * dtype.itemsize))
        return spans

    def decode(self, raw: Sequence[memoryview], row: int, rows: int, out: Floats) -> None:
        """Write the values of rows ``[row, row + rows)`` into ``out`` [rows, width].

        They are exactly ``code * scale`` in float32.

        ``raw`` are the bytes of `spans`, in that order.
        """
        if not rows:
            return
        if self.width == self.padded[1]:
            values = out
            self._decode(raw, row, rows, out)
        else:
            values = np.empty((rows, self.padded[1]), np.float32)
            self._decode(raw, row, rows, values)
        if self.columns is not None:
            values *= floats(raw[-1], self.columns[1])
        if values is not out:
            out[:] = values[:, : self.width]

    def scaled(self, raw: Sequence[memoryview]) -> tuple[memoryview, DType, float] | None:
        """The codes of rows as plain floats of a dtype, and one float32 to multiply them by.

        None where the container is another kind. Codes go row by row.

        ``raw`` is as for `decode`.
        """
        return None

    def values(self, read: Callable[[str, int, int], bytes], row: int = 0, rows: int | None = None) -> Floats:
        """The values of rows ``[row, row + rows)``, float32 [rows, width].

        Without ``rows`` they are all from ``row`` on.

        ``read(tensor, start, size)`` gives stored bytes, as `Checkpoint.read` does.
        """
        count = self.rows - row if rows is None else rows
        out = np.empty((count, self.width), np.float32)
        raw = [memoryview(read(span.tensor, span.start, span.size)) for span in self.spans(row, count)]
        self.decode(raw, row, count, out)
        return out

    @abstractmethod
    def steps(self, raw: Sequence[memoryview], row: int, rows: int) -> Floats:
        """The distance between neighbouring codes at each stored value of the rows.

        Its shape is [rows, padded width], or broadcasts to it.

        ``raw`` is as for `decode`. What was rounded to such codes carries noise of about a twelfth of its square an element.
        """

    @abstractmethod
    def _spans(self, row: int, rows: int) -> tuple[Span, ...]: ...

    @abstractmethod
    def _decode(self, raw: Sequence[memoryview], row: int, rows: int, out: Floats) -> None: ...


class ComputedRows(Encoding):
    """Rows that read their own sources: nothing is stored for them.

    So they have no ``spans`` to read and no codes.
    """

    def steps(self, raw: Sequence[memoryview], row: int, rows: int) -> Floats:
        """None: nothing is rounded to codes."""
        return np.zeros((rows, 1), np.float32)

    def _spans(self, row: int, rows: int) -> tuple[Span, ...]:
        return ()


def column_factor(layer: Layer, width: int) -> tuple[str, DType] | None:
    """The layer's ``pre_quant_scale`` for a weight of ``width`` columns. Raises DataError for one of another shape."""
    if "pre_quant_scale" not in layer.sides:
        return None
    name, info = layer.side("pre_quant_scale", *SCALE_DTYPES)
    if info.shape != (width,):
        layer.refuse(f'has a "pre_quant_scale" of shape {list(info.shape)}', f"[{width}]")
    return name, info.dtype


def beside(layer: Layer) -> tuple[str, ...]:
    """The stored names of everything beside a layer's weight."""
    return tuple(name for name, _ in layer.sides.values())


def floats(raw: memoryview, dtype: DType) -> Floats:
    """Stored plain floats (F32, F16, BF16) as float32, exactly."""
    if dtype is BF16:
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.frombuffer(raw, "<f4" if dtype is F32 else "<f2").astype(np.float32)


def rounded_up(size: int, multiple: int) -> int:
    """The next multiple of ``multiple`` from ``size`` on."""
    return -(-size // multiple) * multiple
