"""How much memory a run takes, and how many threads it uses."""

from __future__ import annotations

import os

from mergetool.checkpoint import system
from mergetool.engine import calling, gpu, jobs, quantising
from mergetool.engine.device import CPU, Device
from mergetool.recipe.plan import Plan

SHARE_FOR_METHODS = 0.25
"""Of the main memory, for whole parameters that merge methods work on."""


def default_threads() -> int:
    """The processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def workers(plan: Plan, threads: int | None = None) -> int:
    """How many threads a run uses: ``threads``, or every processor, unless merge methods would fill the memory with their parameters."""
    if threads is not None:
        return threads
    if not any(step.program and step.program.calls for tensor in plan.tensors for step in tensor.steps):
        return default_threads()
    memory = system.main_memory() or 1 << 33
    return max(1, min(default_threads(), int(memory * SHARE_FOR_METHODS) // _of_worker(plan)))


def memory_needed(plan: Plan, threads: int | None = None, device: Device = CPU) -> int:
    """Bytes of anonymous memory that a run allocates, over the interpreter's own."""
    held = sum(quantising.capacities([tensor for tensor in plan.tensors if tensor.quantiser]))
    pinned = len(device.names) * gpu.room(plan, device).pinned if device.is_gpu else 0
    return 4 * held + workers(plan, threads) * _of_worker(plan) + pinned


def _of_worker(plan: Plan) -> int:
    """Bytes that one thread works in."""
    steps = [step for tensor in plan.tensors for step in tensor.steps]
    windows = max((len(step.windows) for step in steps), default=1)
    decoded = max((sum(window.encoding is not None for window in step.windows) for step in steps), default=0)
    elements = max((job.capacity for job in jobs.jobs(plan)), default=0)
    feedback = 6 if plan.options.rounding == "error-feedback" else 0
    encoding = (
        16 if any(tensor.quantiser for tensor in plan.tensors) else 0
    )  # a piece scaled, rounded and, in a search, read back
    called = max((calling.buffers(step.program) for step in steps if step.program), default=0)
    each = 4 * (plan.registers + 1 + called) + 4 + 4 * windows + 6 * decoded + feedback + encoding
    return int(elements * each) + 6_000_000
