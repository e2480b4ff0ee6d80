"""Noise levels from `steps`, `shift`, `scheduler` and `strength`, without any model.

A level sigma is the share of noise in a latent, 1 at the start and 0 at the end. All schedules are of one shape: times t from 1
down to 0, shifted to sigma = s t / (1 + (s - 1) t). They differ in the times.

simple, normal, sgm_uniform, beta   ComfyUI's of these names, for a flow model (comfy/samplers.py of 0.30.0): from a table of 1000 levels
diffusers                           even times, as FlowMatchEulerDiscreteScheduler of diffusers 0.39 and later has them

Every level is the program's own float32 number, to the last bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mergetool.errors import UsageError
from mergetool.options.sampling import MEANINGS, MOST_STEPS, SCHEDULERS, Scheduler, StrengthMeaning

TABLE = 1000
"""Levels in ComfyUI's table."""

Levels = NDArray[np.float32]


def levels(steps: int, shift: float, scheduler: Scheduler = "simple") -> tuple[float, ...]:
    """The noise levels of a whole run, from 1 to 0.

    There are ``steps`` + 1 of them; ``beta`` leaves out those that are equal, and beyond 1000 steps the others of ComfyUI's
    repeat some. Example: ``levels(4, 3.0)`` is about (1, 0.9, 0.75, 0.5, 0). Raises UsageError for steps outside 1 to
    MOST_STEPS, a shift that is no positive number, and an unknown scheduler.
    """
    if not 1 <= steps <= MOST_STEPS:
        raise UsageError(f"the number of steps is 1 to {MOST_STEPS}, not {steps}.")
    if not 0 < shift < 1e6:
        raise UsageError(f"`shift` is a positive number, not {shift:g}.")
    if scheduler not in _SCHEDULERS:
        raise UsageError(f'a scheduler is one of {", ".join(SCHEDULERS)}, not "{scheduler}".')
    return tuple(float(level) for level in _SCHEDULERS[scheduler](steps, shift))


def refinement_levels(
    steps: int, shift: float, strength: float, meaning: StrengthMeaning, scheduler: Scheduler = "simple"
) -> tuple[float, ...]:
    """The noise levels of a second stage, down to 0.

    The first is the one that the picture is brought to.

    ``comfyui``: the last ``steps`` of a schedule of int(steps / strength) steps, so ``steps`` evaluations from a level that
    depends on strength and shift (KSampler's denoise, which counts from 0.9999 up as 1). ``diffusers``: the schedule of
    ``steps`` steps from step int(steps - steps * strength) on, so a share of the steps (ZImageImg2ImgPipeline of diffusers
    0.39 and later; 0.37 and 0.38 end with an evaluation at level 0, which changes nothing).

    Example: at strength 0.15, 8 steps and shift 3 the first makes 8 evaluations from 0.348, the second 2 from 0.5.
    Raises UsageError for a strength outside 0 to 1, and as `levels` does.
    """
    if not 0.0 < strength <= 1.0:
        raise UsageError(f"`strength` is above 0 and at most 1, not {strength:g}; at 0 there is nothing to refine.")
    if meaning not in MEANINGS:
        raise UsageError(f'`strength_as` is one of {", ".join(MEANINGS)}, not "{meaning}".')
    whole = levels(steps, shift, scheduler)
    if meaning == "diffusers":
        return whole[int(max(steps - min(steps * strength, steps), 0)) :]
    if strength > 0.9999:
        return whole
    total = int(steps / strength)
    if total > MOST_STEPS:
        raise UsageError(f"`strength={strength:g}` makes a schedule of {total} steps; {MOST_STEPS} is the limit.")
    return levels(total, shift, scheduler)[-steps - 1 :]


def shifted(time: float, shift: float) -> float:
    """The level of one time, in float64."""
    return shift * time / (1 + (shift - 1) * time)


def _shifted(times: Levels, shift: float) -> Levels:
    """Levels of times, every operation in float32 as torch does it with Python's numbers."""
    return times if shift == 1.0 else np.float32(shift) * times / (np.float32(1) + np.float32(shift - 1) * times)


@functools.lru_cache(maxsize=8)
def _table(shift: float) -> Levels:
    """ComfyUI's 1000 levels, rising (ModelSamplingDiscreteFlow)."""
    return _shifted(np.arange(1, TABLE + 1, dtype=np.float32) / np.float32(TABLE), shift)


def _from(start: np.float32, end: np.float32, count: int) -> Levels:
    """torch.linspace to the last bit: from both ends, one rounding to float32 each."""
    index = np.arange(count)
    if count == 1:
        return np.array([start])
    step = float((end - start) / np.float32(count - 1))
    rising, falling = float(start) + step * index, float(end) - step * (count - 1 - index)
    return np.where(index < count // 2, rising, falling).astype(np.float32)


def _ended(levels: Levels) -> Levels:
    return np.append(levels, np.float32(0))


def _simple(steps: int, shift: float) -> Levels:
    quotient = TABLE / steps
    return _ended(_table(shift)[[-1 - int(i * quotient) for i in range(steps)]])


def _normal(steps: int, shift: float, *, sgm: bool = False) -> Levels:
    """Even times between the ends of the table, which are levels: they are shifted a second time."""
    start, end = _table(shift)[-1], _table(shift)[0]
    if sgm:
        return _ended(_shifted(_from(start, end, steps + 1)[:-1], shift))
    if math.isclose(float(_shifted(end, shift)), 0, abs_tol=1e-5):
        return _shifted(_from(start, end, steps + 1), shift)
    return _ended(_shifted(_from(start, end, steps), shift))


def _beta(steps: int, shift: float) -> Levels:
    """Times at the quantiles of Beta(0.6, 0.6), in the table (arXiv 2407.12173)."""
    from scipy.special import betaincinv

    quantiles = betaincinv(0.6, 0.6, 1 - np.linspace(0, 1, steps, endpoint=False))
    index = np.rint(quantiles * (TABLE - 1)).astype(int)
    return _ended(_table(shift)[index[np.append(True, index[1:] != index[:-1])]])


def _diffusers(steps: int, shift: float) -> Levels:
    """Even times from 1 to 1/steps, shifted in one rounding less than ComfyUI's."""
    even = _from(np.float32(1), np.float32(1.0 / steps), steps)
    return _ended((shift * even / (1 + (shift - 1) * even)).astype(np.float32))


_SCHEDULERS: dict[str, Callable[[int, float], Levels]] = {
    "simple": _simple,
    "normal": _normal,
    "sgm_uniform": functools.partial(_normal, sgm=True),
    "beta": _beta,
    "diffusers": _diffusers,
}
