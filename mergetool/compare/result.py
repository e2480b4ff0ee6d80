"""One part of a merge's result, without the merge."""

from __future__ import annotations

import numpy as np

from mergetool.checkpoint.dtypes import DType
from mergetool.engine.reading import PositionedFetcher, ValueReader
from mergetool.ops.contract import execute
from mergetool.ops.cpu import CpuOps, as_tensor
from mergetool.quant.encoding import Floats
from mergetool.recipe.plan import Plan
from mergetool.recipe.steps import COPY, Step


def part_of_result(plan: Plan, part: str) -> Floats:
    """The values that ``plan`` stores for ``part``, as float32; for small parts, since it holds all of it.

    Raises KeyError for a part that the output does not have, and what reading raises.
    """
    steps = ((tensor, step) for tensor in plan.tensors for step in tensor.steps if step.part == part)
    for tensor, step in steps:
        return _stored(plan, step, tensor.dtype)
    raise KeyError(part)


def _stored(plan: Plan, step: Step, dtype: DType) -> Floats:
    ops = CpuOps(capacity=max(1, step.elements), registers=plan.registers)
    reader = ValueReader(PositionedFetcher())

    def load(register: int, model: int) -> None:
        window = step.windows[model]
        found = reader.fetch(model, plan.inputs[window.input].checkpoint, window, 0, step.elements)
        if found.is_plain:
            ops.load(register, found.raw[0], found.dtype)
        else:
            found.decode(ops.room(register, found.count))

    execute(step.program or COPY, ops, load)
    raw, _ = ops.store(0, dtype)
    return np.array(as_tensor(raw, dtype).float().numpy())
