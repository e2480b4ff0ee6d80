"""Elements as they lie in a file, and which of them the compiled kernels take so."""

from __future__ import annotations

from typing import NamedTuple

from mergetool.checkpoint import dtypes
from mergetool.checkpoint.dtypes import DType
from mergetool_kernels import compiled


class Stored(NamedTuple):
    """Little-endian elements at any address, with their dtype and factor.

    In float32 each is multiplied by the factor.
    """

    raw: memoryview
    dtype: DType
    factor: float = 1.0


_KINDS = {
    dtypes.F32: compiled.FLOAT32,
    dtypes.BF16: compiled.BFLOAT16,
    dtypes.F16: compiled.FLOAT16,
    dtypes.F8_E4M3: compiled.FLOAT8_E4M3,
    dtypes.F8_E5M2: compiled.FLOAT8_E5M2,
}


def kind_of(dtype: DType) -> int | None:
    """The compiled kernels' number of a dtype, or None.

    None stands for a dtype that they do not know, and where they are not built.
    """
    return _KINDS.get(dtype) if compiled.is_available() else None
