"""The merge arithmetic on CPU, with torch.

One instance belongs to one thread; torch itself is run with one thread, and its kernels release the GIL. In-place
operations on buffers that stay in the cache run at 16 GB/s a core here, against 1.8 for ``b.float() - c.float()``
with fresh temporaries (AMD EPYC 9005, 1 MB chunks).
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch

from mergetool.checkpoint import dtypes
from mergetool.checkpoint.dtypes import DType

TORCH: Mapping[DType, torch.dtype] = MappingProxyType(
    {
        dtypes.F64: torch.float64,
        dtypes.F32: torch.float32,
        dtypes.F16: torch.float16,
        dtypes.BF16: torch.bfloat16,
        dtypes.F8_E4M3: torch.float8_e4m3fn,
        dtypes.F8_E5M2: torch.float8_e5m2,
    }
)
_SATURATING = (dtypes.F8_E4M3, dtypes.F8_E5M2)


def as_tensor(raw: memoryview, dtype: DType) -> torch.Tensor:
    """The stored bytes as a 1-D tensor of the same dtype, sharing memory where the bytes are aligned.

    The tensor must not be written to, and ``raw`` must outlive it.
    """
    octets = np.frombuffer(raw, dtype=np.uint8)
    address = octets.ctypes.data
    if address % dtype.itemsize:
        # Files whose header is not a multiple of 8 bytes long: torch, like C, needs aligned elements.
        octets = octets.copy()
        return torch.from_numpy(octets).view(TORCH[dtype])
    if octets.size == 0:
        return torch.empty(0, dtype=TORCH[dtype])
    # torch.frombuffer warns about read-only buffers, once a process and from any thread; a ctypes array over the same
    # address does not say that it is read-only.
    window = (ctypes.c_char * octets.size).from_address(address)
    return torch.frombuffer(window, dtype=TORCH[dtype])


class CpuOps:
    """The ``Ops`` contract over torch tensors in main memory.

    Holds ``registers`` float32 vectors of ``capacity`` elements and one output buffer: about
    ``capacity * (4 * registers + 4)`` bytes.
    """

    def __init__(self, *, capacity: int, registers: int) -> None:
        self._buffers = [torch.empty(capacity, dtype=torch.float32) for _ in range(registers)]
        self._views = list(self._buffers)
        self._out = torch.empty(capacity * 4, dtype=torch.uint8)

    def load(self, register: int, raw: memoryview, dtype: DType) -> None:
        source = as_tensor(raw, dtype)
        self._views[register] = self._buffers[register][: source.numel()]
        self._views[register].copy_(source)

    def scale(self, register: int, factor: float) -> None:
        self._views[register].mul_(factor)

    def add(self, register: int, other: int) -> None:
        self._views[register].add_(self._views[other])

    def subtract(self, register: int, other: int) -> None:
        self._views[register].sub_(self._views[other])

    def is_finite(self, register: int) -> bool:
        values = self._views[register]
        # A dot product is 20 times faster than isfinite().all() and is finite unless an element is not, or the squares
        # overflow; only then is every element looked at.
        return bool(torch.isfinite(torch.dot(values, values))) or bool(torch.isfinite(values).all())

    def first_non_finite(self, register: int) -> tuple[int, int]:
        bad = ~torch.isfinite(self._views[register])
        return int(bad.sum()), int(bad.to(torch.uint8).argmax())

    def store(self, register: int, dtype: DType) -> tuple[memoryview, int]:
        values = self._views[register]
        out = self._out[: values.numel() * dtype.itemsize]
        rounded = out.view(TORCH[dtype])
        beyond = 0
        if dtype in _SATURATING:
            limit = dtype.largest
            beyond = int((values.abs() > limit).sum())
            rounded.copy_(values.clamp(-limit, limit))
        else:
            rounded.copy_(values)
            if dtype is dtypes.F16:
                beyond = int(torch.isinf(rounded).sum())
        return out.numpy().data, beyond
