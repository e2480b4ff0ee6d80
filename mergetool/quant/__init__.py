"""Quantised containers, one file each: which weights of a file are in one, and their values as float32."""

from mergetool.quant.containers import encodings, encodings_of, is_side_tensor, refused_container
from mergetool.quant.encoding import Encoding, Span
from mergetool.quant.output import quantiser
from mergetool.quant.quantiser import Quantiser

__all__ = [
    "Encoding",
    "Quantiser",
    "Span",
    "encodings",
    "encodings_of",
    "is_side_tensor",
    "quantiser",
    "refused_container",
]
