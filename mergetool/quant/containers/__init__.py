"""Quantised containers that are read and written, one file each, which `mergetool.quant.register` finds by being here.

A file is called what the option ``quant`` calls its container, with ``_`` for ``-``, and ends in ``CONTAINER``, its `Quantiser`. Nothing else knows it.
"""
