"""ConvRot: groups of columns turned by a regular Hadamard matrix before they are quantised.

H is the Kronecker power of [[1,1,1,-1],[1,1,-1,1],[1,-1,1,1],[-1,1,1,1]] over its norm, symmetric and its own inverse. Sums of signed codes are whole
numbers below 2^24 and the norm is a power of two, so the rotation of codes is exact in float32 in any order.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from mergetool.quant.encoding import USUAL_ROTATION, Floats, Layer

GROUP_SIZES = (4, 16, 64, 256, 1024, 4096)


@cache
def hadamard(size: int) -> Floats:
    """The normalised regular Hadamard matrix of a size that is a power of 4; exact in float32."""
    step = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], np.float32) / 2
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.kron(matrix, step)
    return matrix


def rotate_codes(codes: npt.NDArray[Any], group: int, out: Floats) -> None:
    """Write whole numbers below 2^15 [rows, columns], rotated by groups, into ``out``.

    The result is exact.
    """
    np.matmul(codes.reshape(-1, group).astype(np.float32, copy=False), hadamard(group), out=out.reshape(-1, group))


def rotate(values: npt.NDArray[np.floating[Any]], group: int) -> None:
    """Rotate any numbers [rows, columns] by groups of columns, in place.

    It adds in one order, whatever the number of rows, so that pieces of a matrix get the bytes that they have in the whole. Four numbers x become
    half of their sum less the opposite one, digit by digit of their places to the base 4.
    """
    step = 1
    while step < group:
        fours = values.reshape(-1, 4, step)
        half = fours[:, 0] + fours[:, 1]
        half += fours[:, 2]
        half += fours[:, 3]
        half *= half.dtype.type(0.5)
        fours[...] = half[:, None] - fours[:, ::-1]
        step *= 4


def usual(columns: int) -> int:
    """The group size for so many columns: 256, or the largest power of 4 that divides them.

    It is 0, for no rotation, where 4 does not.
    """
    return next((size for size in reversed(GROUP_SIZES) if size <= USUAL_ROTATION and not columns % size), 0)


def checked(layer: Layer, size: object, columns: int) -> int:
    """A group size that a layer states, if it can be one. Raises DataError for any other."""
    if type(size) is not int or size not in GROUP_SIZES or columns % size:
        layer.refuse(
            f"is rotated by groups of {str(size)[:20]} for {columns} columns", "a power of 4 that divides them"
        )
    return size


def always(layer: Layer, columns: int) -> int:
    """The group size of a layer in a container that is always rotated. Raises DataError for a size that cannot be one, or a "convrot": false."""
    if layer.setting("convrot", True) is not True:
        layer.refuse('has a "convrot" that is not true', "a rotation, which this format always has,")
    return checked(layer, layer.setting("convrot_groupsize", USUAL_ROTATION), columns)
