"""Merge methods against those of mergekit and sd-mecha, as installed from PyPI.

``case``: what one comparison is and how it is made. ``peers``: the two tools, called with plain tensors. ``cases_*``: the comparisons.
"""
