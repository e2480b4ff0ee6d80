"""The 22 dtype codes of the safetensors format: name, width and use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, overload

from mergetool.errors import UsageError


@dataclass(frozen=True, slots=True)
class DType:
    """One stored element type.

    ``code`` is the safetensors spelling (``BF16``), ``name`` the one users type (``bf16``), ``bits`` the
    width of one element. ``largest`` is the largest finite value for the floats that may be blended, else 0.
    """

    code: str
    name: str
    bits: int
    kind: Literal["float", "int", "uint", "bool", "complex"]
    largest: float = 0.0

    @property
    def blendable(self) -> bool:
        """True for the floats mergetool does arithmetic on; every other type is copied bit for bit."""
        return self.largest > 0.0

    @property
    def itemsize(self) -> int:
        """Bytes of one element; raises ValueError for the sub-byte types (F4, F6)."""
        if self.bits % 8:
            raise ValueError(f"{self.code} elements are {self.bits} bits wide, not whole bytes")
        return self.bits // 8


F64 = DType("F64", "fp64", 64, "float", 1.7976931348623157e308)
I64 = DType("I64", "int64", 64, "int")
F32 = DType("F32", "fp32", 32, "float", 3.4028234663852886e38)
F16 = DType("F16", "fp16", 16, "float", 65504.0)
BF16 = DType("BF16", "bf16", 16, "float", 3.3895313892515355e38)
F8_E4M3 = DType("F8_E4M3", "fp8_e4m3", 8, "float", 448.0)
F8_E5M2 = DType("F8_E5M2", "fp8_e5m2", 8, "float", 57344.0)

ALL: tuple[DType, ...] = (
    DType("BOOL", "bool", 8, "bool"),
    DType("F4", "fp4", 4, "float"),
    DType("F6_E2M3", "fp6_e2m3", 6, "float"),
    DType("F6_E3M2", "fp6_e3m2", 6, "float"),
    DType("U8", "uint8", 8, "uint"),
    DType("I8", "int8", 8, "int"),
    F8_E5M2,
    F8_E4M3,
    DType("F8_E8M0", "fp8_e8m0", 8, "float"),
    DType("F8_E4M3FNUZ", "fp8_e4m3fnuz", 8, "float"),
    DType("F8_E5M2FNUZ", "fp8_e5m2fnuz", 8, "float"),
    DType("I16", "int16", 16, "int"),
    DType("U16", "uint16", 16, "uint"),
    F16,
    BF16,
    DType("I32", "int32", 32, "int"),
    DType("U32", "uint32", 32, "uint"),
    F32,
    DType("C64", "complex64", 64, "complex"),
    F64,
    I64,
    DType("U64", "uint64", 64, "uint"),
)

BY_CODE: Mapping[str, DType] = MappingProxyType({dtype.code: dtype for dtype in ALL})

# What a user may ask an output to be. fp64 is readable but nobody ships it.
OUTPUT: Mapping[str, DType] = MappingProxyType({d.name: d for d in (BF16, F16, F32, F8_E4M3, F8_E5M2)})


@overload
def output_dtype(name: str) -> DType: ...
@overload
def output_dtype(name: None) -> None: ...
@overload
def output_dtype(name: str | None) -> DType | None: ...
def output_dtype(name: str | None) -> DType | None:
    """The output dtype of a name: bf16, fp16, fp32, fp8_e4m3 or fp8_e5m2. Without a name it is None, the anchor's.

    Raises UsageError for any other word.
    """
    if name is None:
        return None
    try:
        return OUTPUT[name]
    except KeyError:
        known = ", ".join(OUTPUT)
        raise UsageError(f'"{name}" is not an output dtype; choose one of {known}.') from None
