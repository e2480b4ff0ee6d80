"""Stored elements as torch tensors."""

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
"""The formats of merges, differences and LoRAs."""
_WHOLE = {
    dtypes.BY_CODE[code]: dtype
    for code, dtype in (
        *(("I64", torch.int64), ("I32", torch.int32), ("I16", torch.int16), ("I8", torch.int8)),
        *(("U8", torch.uint8), ("BOOL", torch.bool)),
    )
}


def as_tensor(raw: memoryview, dtype: DType) -> torch.Tensor:
    """View the stored bytes as a 1-D tensor of the same dtype.

    It shares memory where the bytes are aligned.

    The tensor must not be written to, and ``raw`` must outlive it.
    """
    of_torch = TORCH.get(dtype) or _WHOLE[dtype]
    octets = np.frombuffer(raw, dtype=np.uint8)
    address = octets.ctypes.data
    if address % dtype.itemsize:
        # Files whose header is not a multiple of 8 bytes long: torch, like C, needs aligned elements.
        octets = octets.copy()
        return torch.from_numpy(octets).view(of_torch)
    if octets.size == 0:
        return torch.empty(0, dtype=of_torch)
    # torch.frombuffer warns about read-only buffers, once a process and from any thread; a ctypes array over the same
    # address does not say that it is read-only.
    window = (ctypes.c_char * octets.size).from_address(address)
    return torch.frombuffer(window, dtype=of_torch)
