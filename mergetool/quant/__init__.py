"""Quantised containers: which one a file is, and whether this version reads it."""

from mergetool.quant.containers import is_side_tensor, quantised_container, refuse_quantised

__all__ = ["is_side_tensor", "quantised_container", "refuse_quantised"]
