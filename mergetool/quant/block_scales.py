"""Block scales in the order that tensor cores read: cuBLAS's 128 x 4 tiles (SWIZZLE_32_4_4).

Tiles of 128 rows by 4 scales lie one after another, row of tiles by row of tiles; inside a tile scale (r, c) is at ``(r % 32) * 16 + (r // 32) * 4 + c``.
Rows are padded with zeros to a multiple of 128 and columns to one of 4.
https://docs.nvidia.com/cuda/cublas/index.html#d-block-scaling-factors-layout
"""

from __future__ import annotations

import numpy as np

from mergetool.quant.encoding import Octets, Span, rounded_up

TILE_ROWS = 128
TILE_COLUMNS = 4


def stored_shape(rows: int, columns: int) -> tuple[int, int]:
    """Shape of the tensor that holds ``rows`` x ``columns`` scales."""
    return rounded_up(rows, TILE_ROWS), rounded_up(columns, TILE_COLUMNS)


def span(tensor: str, row: int, rows: int, columns: int) -> Span:
    """The bytes with the one-byte scales of rows ``[row, row + rows)``, whole rows of tiles."""
    first, last = row // TILE_ROWS, -(-(row + rows) // TILE_ROWS)
    size = TILE_ROWS * rounded_up(columns, TILE_COLUMNS)
    return Span(tensor, first * size, (last - first) * size)


def untiled(raw: memoryview, row: int, rows: int, columns: int) -> Octets:
    """Scales [rows, columns] in plain order from the bytes of `span`."""
    tiles = np.frombuffer(raw, np.uint8).reshape(-1, rounded_up(columns, TILE_COLUMNS) // TILE_COLUMNS, 32, 4, 4)
    plain = tiles.transpose(0, 3, 2, 1, 4).reshape(len(tiles) * TILE_ROWS, -1)
    return plain[row % TILE_ROWS :][:rows, :columns]


def tiled(scales: Octets) -> Octets:
    """Scales [rows, columns] in stored order [padded rows, padded columns].

    The rows are whole rows of tiles, or the last ones.
    """
    rows, columns = stored_shape(*scales.shape)
    plain = np.zeros((rows, columns), np.uint8)
    plain[: scales.shape[0], : scales.shape[1]] = scales
    tiles = plain.reshape(-1, 4, 32, columns // TILE_COLUMNS, TILE_COLUMNS).transpose(0, 3, 2, 1, 4)
    return np.ascontiguousarray(tiles).reshape(rows, columns)
