"""Method calls of a run: on whole parameters, on the CPU or, where there is one, on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

from mergetool import methods, packages
from mergetool.adapters.rows import StackedRows
from mergetool.engine.device import Device, failure
from mergetool.methods import Site
from mergetool.ops.program import Apply, Program
from mergetool.recipe.plan import Plan
from mergetool.recipe.steps import OutputTensor, Step

if TYPE_CHECKING:
    from torch import Tensor


def buffers(program: Program) -> float:
    """Count the float32 tensors that a program's methods hold at once.

    They have the parameter's size, and come besides the program's registers.
    """
    return max((methods.find(call.method).buffers(len(call.arguments)) for call in program.calls), default=0)


def shape_of(tensor: OutputTensor, step: Step) -> tuple[int, ...]:
    """The shape of a step's part: some rows of its output tensor, or all of it."""
    rest = tensor.shape[1:]
    return (step.elements // (prod(rest) or 1), *rest) if tensor.shape else ()


def require_torch(plans: Sequence[Plan]) -> None:
    """Import torch before the work begins where methods or LoRAs are computed with it. Raises PackageError."""
    steps = [step for plan in plans for tensor in plan.tensors for step in tensor.steps]
    called = sorted({call.method for step in steps if step.program for call in step.program.calls})
    if called:
        packages.require("torch", f"merge methods, such as {called[0]},")
    elif any(isinstance(window.encoding, StackedRows) for step in steps for window in step.windows):
        packages.require("torch", "LoRAs in a merge")


class Caller:
    """Does the method calls of all workers of a run; on each GPU one at a time."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._locks = {name: threading.Lock() for name in device.names}

    def apply(self, call: Apply, tensors: Sequence[Tensor], part: str) -> tuple[Tensor, bool]:
        """Apply the method, and tell whether the GPU had no memory for that.

        The result is on the CPU.

        Raises DeviceError for a GPU that fails.
        """
        if not self._locks:
            return self._call(call, tensors, part), False
        import torch

        name = next((name for name, lock in self._locks.items() if not lock.locked()), self._device.names[0])
        with self._locks[name]:
            try:
                return self._call(call, [tensor.to(name) for tensor in tensors], part).cpu(), False
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
            except torch.AcceleratorError as error:
                raise failure(name, error) from None
        return self._call(call, tensors, part), True

    @staticmethod
    def _call(call: Apply, tensors: Sequence[Tensor], part: str) -> Tensor:
        return methods.find(call.method).apply(tensors, Site(part), dict(call.parameters))
