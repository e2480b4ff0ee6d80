"""The difference of one parameter in two models, in float32, with its energy.

Files are read front to back in pieces of 1 MB by one thread, which the kernel reads ahead of by itself: 2.7 GB/s cold
here, with a fifth of the kernel time of announcing whole matrices (POSIX_FADV_WILLNEED, 2.0 GB/s) or of four readers
(1.4 GB/s).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mergetool.arch import Part
from mergetool.difference.pairs import Pair, Pairing
from mergetool.engine.feeding.values import ValueReader
from mergetool.lowrank.krylov import fast_bfloat16
from mergetool.lowrank.matrices import Dense
from mergetool.lowrank.norms import energy as energy_of
from mergetool.ops.tensors import as_tensor
from mergetool.recipe.steps import Input, window_of

# 256 Ki elements: the two inputs, the difference and its squares stay in the cache. Twice as many took 2 % longer,
# half as many 8 %.
CHUNK = 1 << 18


class Buffers:
    """Room for one difference of up to ``elements``, used again and again.

    A fresh buffer a matrix costs more than the subtraction: 157 MB of new pages are 38 thousand page faults.
    """

    def __init__(self, elements: int) -> None:
        self.matrix = torch.empty(elements, dtype=torch.float32)
        self.sketch = torch.empty(elements if fast_bfloat16() else 0, dtype=torch.bfloat16)


class DeltaReader:
    """Reads the differences of a pairing, each into the buffers it is given; for one thread."""

    def __init__(self, pairing: Pairing, values: ValueReader) -> None:
        self._pairing = pairing
        self._values = values
        self._other = torch.empty(CHUNK, dtype=torch.float32)
        self._scratch = torch.empty(CHUNK, dtype=torch.float32)

    def read(self, pair: Pair, buffers: Buffers) -> Dense:
        """Read the difference of ``pair``; of a LoRA, its change.

        Each element is one float32 subtraction of exactly widened values.
        """
        count, shape = pair.base.numel, pair.shape
        energy = 0.0
        for start in range(0, count, CHUNK):
            end = min(start + CHUNK, count)
            difference = buffers.matrix[start:end]
            self._subtract(pair, start, difference)
            energy += energy_of(difference)
            if len(buffers.sketch):
                buffers.sketch[start:end].copy_(difference)
        sketch = buffers.sketch[:count].view(shape) if len(buffers.sketch) else None
        return Dense(buffers.matrix[:count].view(shape), energy, sketch)

    def energy(self, pair: Pair) -> float:
        """The energy of the difference of ``pair`` alone."""
        return sum(map(energy_of, self._differences(pair)), 0.0)

    def _differences(self, pair: Pair) -> Iterator[torch.Tensor]:
        """The difference of ``pair`` chunk by chunk, in one buffer; the base's values are in ``_other`` meanwhile."""
        for start in range(0, pair.base.numel, CHUNK):
            difference = self._scratch[: min(CHUNK, pair.base.numel - start)]
            self._subtract(pair, start, difference)
            yield difference

    def _subtract(self, pair: Pair, start: int, out: torch.Tensor) -> None:
        self._load(out, self._pairing.variant, pair.variant, start, slot=0)
        if self._pairing.variant.is_lora:
            return
        other = self._other[: out.numel()]
        self._load(other, self._pairing.base, pair.base, start, slot=1)
        out.sub_(other)

    def _load(self, out: torch.Tensor, model: Input, part: Part, start: int, *, slot: int) -> None:
        found = self._values.fetch(slot, model.checkpoint, window_of(slot, model, part), start, out.numel())
        if found.is_plain:
            out.copy_(as_tensor(found.raw[0], found.dtype))
        else:
            found.decode(out.numpy())
        self._values.release(found)
