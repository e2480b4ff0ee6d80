"""One part of a merge's result, without the rest of the merge."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mergetool.engine import merge
from mergetool.quant.encoding import Floats
from mergetool.quant.fp8 import widened
from mergetool.recipe.plan import Plan


def part_of_result(plan: Plan, part: str) -> Floats:
    """The values that ``plan`` stores for ``part``, as float32: the engine's own bytes. It holds the whole tensor.

    Raises KeyError for a part that the output does not have as plain floats, and what `engine.merge.run` raises.
    """
    for tensor in plan.tensors:
        for step in tensor.steps:
            if step.part == part and tensor.quantiser is None:
                kept = _Kept(sum(each.elements for each in tensor.steps) * tensor.dtype.bits // 8)
                merge.run(
                    replace(plan, tensors=(tensor,)), kept, threads=1, reader="pread", non_finite="keep", measure="off"
                )
                values = widened(memoryview(kept.octets), tensor.dtype)
                return np.array(values[step.first : step.first + step.elements])
    raise KeyError(part)


class _Kept:
    """An output in memory."""

    def __init__(self, size: int) -> None:
        self.octets = bytearray(size)

    def write(self, name: str, start: int, data: memoryview) -> None:
        self.octets[start : start + len(data)] = data
