"""GGUF files for tests, written by the ``gguf`` package; Q4_K, which that package only reads, is packed here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

Q = gguf.GGMLQuantizationType


def q4_k(rows: np.ndarray) -> np.ndarray:
    """Float32 [rows, multiple of 256] as Q4_K bytes: 8 blocks of 32 with 6-bit scales and minima in a superblock of 256."""
    blocks = rows.astype(np.float32).reshape(-1, 8, 32)
    low = np.minimum(blocks.min(axis=2), 0)
    step = (blocks.max(axis=2) - low) / 15
    d = (step.max(axis=1) / 63).astype(np.float16)
    dmin = (-low.min(axis=1) / 63).astype(np.float16)
    with np.errstate(divide="ignore", invalid="ignore"):
        scales = np.nan_to_num(np.rint(step / d[:, None].astype(np.float32))).clip(0, 63).astype(np.uint8)
        minima = np.nan_to_num(np.rint(-low / dmin[:, None].astype(np.float32))).clip(0, 63).astype(np.uint8)
        real_step = d[:, None].astype(np.float32) * scales
        real_low = dmin[:, None].astype(np.float32) * minima
        codes = np.nan_to_num((blocks + real_low[:, :, None]) / real_step[:, :, None])
    codes = np.rint(codes).clip(0, 15).astype(np.uint8)
    packed_scales = np.empty((len(blocks), 12), np.uint8)
    packed_scales[:, 0:4] = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    packed_scales[:, 4:8] = minima[:, :4] | (minima[:, 4:] >> 4) << 6
    packed_scales[:, 8:12] = scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4
    pairs = codes.reshape(-1, 4, 2, 32)
    nibbles = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)
    head = np.stack([d, dmin], axis=1).view(np.uint8)
    return np.concatenate([head, packed_scales, nibbles], axis=1).reshape(len(rows), -1)


def packed(values: np.ndarray, kind: Q) -> np.ndarray:
    """Values in the stored form of ``kind``."""
    return q4_k(values) if kind is Q.Q4_K else gguf.quants.quantize(values, kind)


def write(path: Path, tensors: Mapping[str, tuple[np.ndarray, Q]]) -> Path:
    """A GGUF file of float32 arrays, each stored as its type; a Z-Image file's architecture is ``lumina2``."""
    writer = gguf.GGUFWriter(path, "lumina2")
    writer.add_string("general.name", "test")
    writer.add_array("tokens", ["a", "b"])
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, packed(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
