"""Merge methods: the functions of an expression, one family a module.

A method is a pure function of whole parameters (tensors of one shape), of the site they belong to, and of its own
parameters. It registers itself with ``registry.method``, or ``registry.affine`` where it is a weighted sum.
"""

from mergetool.methods.registry import Method, Parameter, Site, affine, find, listing, method, methods

__all__ = ["Method", "Parameter", "Site", "affine", "find", "listing", "method", "methods"]
