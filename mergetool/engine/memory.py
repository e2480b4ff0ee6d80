"""How much memory a run takes, and how many threads it uses."""

from __future__ import annotations

import os

from mergetool.engine import gpu, jobs, quantising
from mergetool.engine.device import CPU, Device
from mergetool.recipe.plan import Plan


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
    held = sum(quantising.capacities([tensor for tensor in plan.tensors if tensor.quantiser]))
    encoding = 16 if held else 0  # a piece scaled, rounded and, in a search, read back
    each = 4 * (plan.registers + 1) + 4 + 4 * windows + 6 * decoded + feedback + encoding
    on_cpu = elements * each + 6_000_000
    pinned = len(device.names) * gpu.room(plan, device).pinned if device.is_gpu else 0
    return 4 * held + (threads or default_threads()) * on_cpu + pinned
