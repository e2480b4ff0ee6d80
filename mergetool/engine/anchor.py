"""Choose the model that a merge changes, where the expression leaves it open.

The user is asked only if the answer changes a byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import zip_longest

from mergetool.errors import UsageError
from mergetool.ops.program import Load
from mergetool.recipe.expression import Expression
from mergetool.recipe.plan import Plan
from mergetool.recipe.steps import COPY, OutputTensor, Step, Window

PIECE = 16 << 20
"""Bytes of two copies that are compared at a time."""


def chosen(expression: Expression, plan_from: Callable[[str], Plan]) -> Plan:
    """Plan ``expression`` around its anchor. ``plan_from`` plans it around a model of a given name.

    Of several anchors the first is taken where the output's tensors are the same with each, byte for byte. Raises UsageError where
    they are not, and what planning raises.
    """
    first, *others = expression.anchors
    plan = plan_from(first)
    for other in others:
        difference = _difference(plan, plan_from(other))
        if difference:
            names = " or ".join(f'`keep_from="{name}"`' for name in expression.anchors)
            raise UsageError(
                f'"{expression.text}" could be a change of {first} or of {other}, and {difference}; say which it is with {names}.'
            )
    return plan


def _difference(plan: Plan, other: Plan) -> str | None:
    """The way in which the tensors of two plans differ, None where they hold the same bytes."""
    seconds = {tensor.name: tensor for tensor in other.tensors}
    if seconds.keys() != {tensor.name for tensor in plan.tensors}:
        return "their tensors have different names"
    for tensor in plan.tensors:
        second = seconds[tensor.name]
        if (tensor.dtype, tensor.shape, tensor.constant) != (second.dtype, second.shape, second.constant):
            return f'"{tensor.name}" would be {tensor.stored_as} with one and {second.stored_as} with the other'
        for step, twin in zip_longest(tensor.steps, second.steps):
            if not _is_same(plan, step, other, twin):
                return _reason(tensor, step, plan)
    return None


def _reason(tensor: OutputTensor, step: Step, plan: Plan) -> str:
    if step.multiplier != 1:
        return f'`multipliers` scales the change of "{step.part}", which is another in each'
    taken = plan.inputs[step.windows[0].input].name
    return f'"{tensor.name}" is taken from it as it is ({step.reason}, from {taken}) and differs between them'


def _is_same(plan: Plan, step: Step | None, other: Plan, twin: Step | None) -> bool:
    """Whether two steps give the same bytes: by the same operations on the same elements, or as copies of equal bytes."""
    if step is None or twin is None or step.program != twin.program or step.elements != twin.elements:
        return False
    if list(_operands(plan, step)) == list(_operands(other, twin)):
        return True
    return step.program in (None, COPY) and _holds_same(plan, step, other, twin)


def _operands(plan: Plan, step: Step) -> Iterator[tuple[str, Window | None, str, int, int]]:
    """The operands of a step's program, wherever the models stand among the inputs."""
    loads = sum(isinstance(each, Load) for each in step.program.instructions) if step.program else 1
    for window in step.windows[:loads]:
        product = window if window.encoding is not None else None
        yield plan.inputs[window.input].name, _anywhere(product), window.tensor, window.start, window.row


def _anywhere(window: Window | None) -> Window | None:
    return None if window is None else Window(0, window.tensor, window.start, window.dtype, window.encoding, window.row)


def _holds_same(plan: Plan, step: Step, other: Plan, twin: Step) -> bool:
    mine, theirs = step.windows[0], twin.windows[0]
    if mine.dtype != theirs.dtype or mine.encoding or theirs.encoding:
        return False
    size = mine.nbytes(step.elements)
    here, there = plan.inputs[mine.input].checkpoint, other.inputs[theirs.input].checkpoint
    for at in range(0, size, PIECE):
        count = min(PIECE, size - at)
        if here.read(mine.tensor, mine.start + at, count) != there.read(theirs.tensor, theirs.start + at, count):
            return False
    return True
