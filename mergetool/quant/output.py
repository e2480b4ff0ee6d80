"""The quantised containers that can be written, by the names that ``quant`` takes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from mergetool.errors import UsageError
from mergetool.quant.int8 import Int8Quantiser
from mergetool.quant.mxfp8 import Mxfp8Quantiser
from mergetool.quant.nvfp4 import Nvfp4Quantiser
from mergetool.quant.quantiser import Quantiser
from mergetool.quant.scaled_fp8 import ScaledFp8Quantiser

QUANTISERS: Mapping[str, Quantiser] = MappingProxyType(
    {q.quant: q for q in (ScaledFp8Quantiser(), Int8Quantiser(), Nvfp4Quantiser(), Mxfp8Quantiser())}
)


def quantiser(name: str) -> Quantiser:
    """The output container ``name``; raises UsageError for any other word."""
    try:
        return QUANTISERS[name]
    except KeyError:
        raise UsageError(
            f'"{name}" is not a quantised container to write; choose one of {", ".join(QUANTISERS)}.'
        ) from None
