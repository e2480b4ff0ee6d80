"""Quantised containers, one file each. `mergetool.quant.register` finds them here.

A file is called what the option ``quant`` calls its container, with ``_`` for ``-``, and ends in ``CONTAINER``, its `Quantiser`. Nothing else knows it.
"""
