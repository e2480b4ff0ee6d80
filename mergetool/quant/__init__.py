"""Quantised containers, one file each: which weights of a file are in one, and their values as float32."""

from mergetool.quant.containers import Quantised, encodings, is_side_tensor, quantised, side_tensors
from mergetool.quant.encoding import Encoding, Span
from mergetool.quant.output import quantiser
from mergetool.quant.quantiser import Quantiser

__all__ = [
    "Encoding",
    "Quantised",
    "Quantiser",
    "Span",
    "encodings",
    "is_side_tensor",
    "quantised",
    "quantiser",
    "side_tensors",
]
