"""How much memory a run takes, and how many threads it uses."""

from __future__ import annotations

import os

from mergetool.engine import jobs
from mergetool.engine.device import CPU, Device, free_memory
from mergetool.recipe.plan import Plan

# On a GPU: 24 MB of three bf16 operands. Smaller chunks pay for launches and Python, larger ones for pinned memory.
GPU_CHUNK = 1 << 22


def default_threads() -> int:
    """The processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def memory_needed(plan: Plan, threads: int | None = None, device: Device = CPU) -> int:
    """Bytes of anonymous memory that a run allocates, over the interpreter's own."""
    steps = [step for tensor in plan.tensors for step in tensor.steps]
    windows = max((len(step.windows) for step in steps), default=1)
    decoded = max((sum(window.encoding is not None for window in step.windows) for step in steps), default=0)
    elements = max((job.capacity for job in jobs.jobs(plan)), default=0)
    feedback = 6 if plan.options.rounding == "error-feedback" else 0
    held = largest_weight(plan)
    encoding = 16 if held else 0  # a piece scaled, rounded and, in a search, read back
    each = 4 * (plan.registers + 1) + 4 + 4 * windows + 6 * decoded + feedback + encoding
    on_cpu = elements * each + 6_000_000
    if not device.is_gpu:
        return 4 * held + (threads or default_threads()) * on_cpu
    workers, chunk = feeders(plan, threads, device)
    return 4 * held + workers * (chunk * _element(plan) + on_cpu)


def largest_weight(plan: Plan) -> int:
    """Elements of the largest output tensor that is quantised, whose float32 values are held; 0 where none is."""
    return max((tensor.shape[0] * tensor.shape[1] for tensor in plan.tensors if tensor.quantiser), default=0)


def feeders(plan: Plan, threads: int | None, device: Device) -> tuple[int, int]:
    """How many threads feed the GPUs, and the elements of a chunk, within the memory that may be taken of each."""
    room = min(device.memory or free_memory(name) * 4 // 5 for name in device.names) * len(device.names)
    chunk = GPU_CHUNK
    while chunk > jobs.CHUNK and chunk * _element(plan) * len(device.names) > room:
        chunk //= 2
    return max(1, min(threads or default_threads(), room // (chunk * _element(plan)))), chunk


def _element(plan: Plan) -> int:
    """Bytes that one element of the output needs at most on the device, and as many pinned: operands and result."""
    widths = [
        sum(window.dtype.bits for window in step.windows) + tensor.dtype.bits
        for tensor in plan.tensors
        for step in tensor.steps
        if step.program is not None
    ]
    return max(widths, default=16) // 8
