"""The difference of one parameter in two models, in float32, with its energy."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mergetool.arch import Part
from mergetool.engine.reading import Fetcher
from mergetool.lora.pairs import Pair, Pairing
from mergetool.ops.cpu import as_tensor
from mergetool.recipe.plan import Input

# 512 Ki elements, as in the merge: the two inputs, the difference and its squares stay in the cache.
CHUNK = 1 << 19


@dataclass(frozen=True, slots=True)
class Delta:
    """``variant - base`` of one parameter.

    ``matrix`` is float32 [out, in], None where only the energy was asked for; ``energy`` is its squared Frobenius
    norm: float32 products over chunks, summed in float64. It is not finite when an input is not.
    """

    matrix: torch.Tensor | None
    energy: float


def read_delta(pairing: Pairing, pair: Pair, fetch: Fetcher, *, with_matrix: bool) -> Delta:
    """The difference of ``pair``, each element one float32 subtraction of exactly widened values."""
    count = pair.base.numel
    whole = torch.empty(count if with_matrix else min(count, CHUNK), dtype=torch.float32)
    other = torch.empty(min(count, CHUNK), dtype=torch.float32)
    energy = 0.0
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        difference = whole[start : start + size] if with_matrix else whole[:size]
        _load(difference, pairing.variant, pair.variant, start, fetch, slot=0)
        _load(other[:size], pairing.base, pair.base, start, fetch, slot=1)
        difference.sub_(other[:size])
        energy += _energy(difference)
    return Delta(whole.view(pair.base.shape) if with_matrix else None, energy)


def row_offset(model: Input, part: Part) -> int:
    """Bytes from the start of the stored tensor to the part's first row: q, k and v lie inside a fused qkv."""
    info = model.checkpoint.tensors[part.stored.tensor]
    return part.stored.row * (info.nbytes // max(1, info.shape[0] if info.shape else 1))


def _load(out: torch.Tensor, model: Input, part: Part, start: int, fetch: Fetcher, *, slot: int) -> None:
    file, base = model.checkpoint.locate(part.stored.tensor)
    width = part.dtype.itemsize
    offset, size = base + row_offset(model, part) + start * width, out.numel() * width
    raw = fetch.fetch(slot, file, offset, size)
    out.copy_(as_tensor(raw, part.dtype))
    raw.release()
    fetch.release(file, offset, size)


def _energy(values: torch.Tensor) -> float:
    energy = float(torch.dot(values, values))
    # Squares of values below 1e-19 vanish in float32 and above 1e19 overflow: rare enough to be done again.
    if 1e-30 < energy < 1e30:
        return energy
    return float(values.double().square().sum())
