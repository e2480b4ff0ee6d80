"""The differences of two models, one parameter after the other, in float32, with their energy.

The next difference is read and subtracted by one background thread while the last one is decomposed. It reads both
files front to back in pieces of 1 MB, which the kernel reads ahead of by itself: 2.7 GB/s cold on one thread here, with
a fifth of the kernel time of announcing whole matrices (POSIX_FADV_WILLNEED, 2.0 GB/s) or of four readers (1.4 GB/s).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from mergetool.arch import Part
from mergetool.checkpoint.inputs import InputFile
from mergetool.engine.reading import Fetcher, Method, fetcher
from mergetool.lora.krylov import fast_bfloat16
from mergetool.lora.pairs import Pair, Pairing
from mergetool.ops.cpu import as_tensor
from mergetool.recipe.plan import Input

# 512 Ki elements, as in the merge: the two inputs, the difference and its squares stay in the cache.
CHUNK = 1 << 19
# Squares are summed in float32 over runs of this length and in float64 over the runs: right to 1e-9, where one float32
# sum over a matrix is 0.5 % too low.
RUN = 256


@dataclass(frozen=True, slots=True)
class Delta:
    """``variant - base`` of one parameter.

    ``matrix`` is float32 [out, in] and ``sketch`` the same rounded to bfloat16 where this CPU is fast in that, else
    None; both are None where only the energy was asked for, and are overwritten by the next difference. ``energy`` is
    the squared Frobenius norm; it is not finite when an input is not.
    """

    matrix: torch.Tensor | None
    sketch: torch.Tensor | None
    energy: float


def deltas(pairing: Pairing, method: Method, files: Sequence[InputFile]) -> Iterator[tuple[Pair, Delta]]:
    """Every pair in order with its difference, which stays valid until the next one is asked for.

    Only pairs without a reason to be left out get a matrix. ``method`` auto is positioned reads: into a buffer that is
    reused they were half again as fast as windows on a mapping, which pay for new pages at every step.
    """
    fetchers = [fetcher("pread" if method == "auto" else method, list(files)) for _ in range(2)]
    readers = [DeltaReader(pairing, fetch) for fetch in fetchers]
    # torch's thread count is a property of the thread: this one leaves the decomposition its own.
    background = ThreadPoolExecutor(1, thread_name_prefix="delta", initializer=torch.set_num_threads, initargs=(1,))
    try:
        following = background.submit(readers[0].read, pairing.pairs[0])
        for i, pair in enumerate(pairing.pairs):
            delta = following.result()
            if i + 1 < len(pairing.pairs):
                following = background.submit(readers[(i + 1) % 2].read, pairing.pairs[i + 1])
            yield pair, delta
    finally:
        background.shutdown(cancel_futures=True)


class DeltaReader:
    """Reads differences one after the other into buffers that are made once.

    A fresh buffer a matrix costs more than the subtraction: 157 MB of new pages are 38 thousand page faults.
    """

    def __init__(self, pairing: Pairing, fetch: Fetcher) -> None:
        self._pairing = pairing
        self._fetch = fetch
        largest = max((pair.base.numel for pair in pairing.decomposed), default=0)
        self._matrix = torch.empty(largest, dtype=torch.float32)
        self._sketch = torch.empty(largest if fast_bfloat16() else 0, dtype=torch.bfloat16)
        self._other = torch.empty(CHUNK, dtype=torch.float32)
        self._scratch = torch.empty(CHUNK, dtype=torch.float32)

    def read(self, pair: Pair) -> Delta:
        """The difference of ``pair``, each element one float32 subtraction of exactly widened values."""
        count = pair.base.numel
        with_matrix = not pair.reason
        energy = 0.0
        for start in range(0, count, CHUNK):
            size = min(CHUNK, count - start)
            difference = self._matrix[start : start + size] if with_matrix else self._scratch[:size]
            self._load(difference, self._pairing.variant, pair.variant, start, slot=0)
            self._load(self._other[:size], self._pairing.base, pair.base, start, slot=1)
            difference.sub_(self._other[:size])
            energy += squared_norm(difference)
            if with_matrix and len(self._sketch):
                self._sketch[start : start + size].copy_(difference)
        if not with_matrix:
            return Delta(None, None, energy)
        sketch = self._sketch[:count].view(pair.base.shape) if len(self._sketch) else None
        return Delta(self._matrix[:count].view(pair.base.shape), sketch, energy)

    def _load(self, out: torch.Tensor, model: Input, part: Part, start: int, *, slot: int) -> None:
        file, base = model.checkpoint.locate(part.stored.tensor)
        width = part.dtype.itemsize
        offset, size = base + _row_offset(model, part) + start * width, out.numel() * width
        raw = self._fetch.fetch(slot, file, offset, size)
        out.copy_(as_tensor(raw, part.dtype))
        raw.release()
        self._fetch.release(file, offset, size)


def _row_offset(model: Input, part: Part) -> int:
    """Bytes from the start of the stored tensor to the part's first row: q, k and v lie inside a fused qkv."""
    info = model.checkpoint.tensors[part.stored.tensor]
    return part.stored.row * (info.nbytes // max(1, info.shape[0] if info.shape else 1))


def squared_norm(values: torch.Tensor) -> float:
    """The sum of squares of a flat float32 tensor."""
    whole = values.numel() // RUN * RUN
    energy = _sum_of_squares(torch.linalg.vector_norm(values[:whole].view(-1, RUN), dim=1))
    energy += _sum_of_squares(values[whole:])
    # Squares of values below 1e-19 vanish in float32 and above 1e19 overflow: rare enough to be done again.
    return energy if 1e-30 < energy < 1e30 else _sum_of_squares(values)


def _sum_of_squares(values: torch.Tensor) -> float:
    return float(values.double().square().sum())
