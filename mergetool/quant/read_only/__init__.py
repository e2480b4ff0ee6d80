"""Quantised containers that are read and not written, one file each. `mergetool.quant.register` finds them here.

A file ends in ``CONTAINER``, its `Dequantiser`. Nothing else knows it.
"""
