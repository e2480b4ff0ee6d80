"""The memory that a run takes, and the number of threads that this allows."""

from __future__ import annotations

from collections.abc import Sequence

from mergetool.checkpoint import system
from mergetool.engine import bundles, method_calls, quantisation
from mergetool.engine.device import CPU, Device
from mergetool.engine.threads import asked, default_threads
from mergetool.recipe.plan import Plan

SHARE_FOR_METHODS = 0.25
"""The share of the main memory for the whole parameters of merge methods."""


def workers(plans: Sequence[Plan], threads: int | None = None) -> int:
    """Decide how many threads a pass uses.

    It uses ``threads``, or every processor, unless merge methods would fill the memory with their parameters.
    """
    if threads is not None:
        return asked(threads)
    steps = [step for plan in plans for tensor in plan.tensors for step in tensor.steps]
    if not any(step.program and step.program.calls for step in steps):
        return default_threads()
    memory = system.main_memory() or 1 << 33
    return max(1, min(default_threads(), int(memory * SHARE_FOR_METHODS) // _of_worker(plans)))


def memory_needed(plan: Plan, threads: int | None = None, device: Device = CPU) -> int:
    """Bytes of anonymous memory that a run allocates, over the interpreter's own."""
    return memory_of([plan], threads, device)


def memory_of(plans: Sequence[Plan], threads: int | None = None, device: Device = CPU) -> int:
    """Bytes that several plans allocate in as few passes as possible.

    The largest pass counts, and every model that is computed.
    """
    computed = {id(model.checkpoint): model.checkpoint.memory for plan in plans for model in plan.inputs}
    return sum(computed.values()) + max(
        (
            _of_pass([plans[number] for number in together], threads, device)
            for together in bundles.passes(plans, device)
        ),
        default=0,
    )


def _of_pass(plans: Sequence[Plan], threads: int | None, device: Device) -> int:
    held = sum(sum(quantisation.capacities([t for t in plan.tensors if t.quantiser])) for plan in plans)
    pinned = 0
    if device.is_gpu:
        from mergetool.engine import gpu  # imports torch, which takes a second

        pinned = len(device.names) * gpu.room(plans[0], device).pinned
    return 4 * held + workers(plans, threads) * _of_worker(plans) + pinned


def _of_worker(plans: Sequence[Plan]) -> int:
    """Bytes that one thread works in."""
    work = bundles.bundles(plans)
    elements = max((unit.capacity for unit in work), default=0)
    operands = {id(unit.operands): unit.operands for unit in work if isinstance(unit, bundles.Bundle)}.values()
    windows = max((len(used.windows) for used in operands), default=1)
    decoded = max((sum(window.encoding is not None for _, window in used.windows) for used in operands), default=0)
    registers = max((used.registers + len(used.common) for used in operands), default=1)
    programs = [program for used in operands for program in (*used.common, *used.programs) if program]
    called = max((method_calls.buffers(program) for program in programs), default=0)
    feedback = 6 if any(plan.options.rounding == "error-feedback" for plan in plans) else 0
    # a piece scaled, rounded and, in a search, read back
    encoding = 16 if any(tensor.quantiser for plan in plans for tensor in plan.tensors) else 0
    each = 4 * (registers + 1 + called) + 4 + 4 * windows + 6 * decoded + feedback + encoding
    return int(elements * each) + 6_000_000
