"""Noise levels: what `steps`, `shift` and `strength` come to, before any model is loaded.

A level sigma is the share of noise in a latent, 1 at the start and 0 at the end. Z-Image's schedule is an even one,
shifted: sigma = s x / (1 + (s - 1) x) for x = 1, (N-1)/N, ..., 1/N, then 0 (FlowMatchEulerDiscreteScheduler).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mergetool.errors import UsageError

StrengthMeaning = Literal["comfyui", "diffusers"]

MOST_STEPS = 10_000


def levels(steps: int, shift: float) -> tuple[float, ...]:
    """``steps`` + 1 noise levels from 1 to 0, in float32 as the scheduler computes them.

    Example: ``levels(4, 3.0)`` is about (1, 0.9, 0.75, 0.5, 0). Raises UsageError for steps below 1 or a shift that is
    not a positive number.
    """
    _require_steps(steps)
    if not 0 < shift < 1e6:
        raise UsageError(f"--shift is a positive number, not {shift:g}.")
    even = _even(steps)
    shifted = shift * even / (1 + (shift - 1) * even)
    return (*(float(level) for level in shifted.astype(np.float32)), 0.0)


def refinement_levels(steps: int, shift: float, strength: float, meaning: StrengthMeaning) -> tuple[float, ...]:
    """The noise levels of a second stage, from the one that the picture is brought to down to 0.

    ``comfyui``: the last ``steps`` of a schedule of int(steps / strength) steps, so ``steps`` evaluations from a level that
    depends on strength and shift (KSampler's denoise). ``diffusers``: the schedule of ``steps`` steps from step
    int(steps - steps * strength) on, so a share of the steps (ZImageImg2ImgPipeline).

    Example: at strength 0.15, 8 steps and shift 3 the first makes 8 evaluations from 0.348, the second 2 from 0.5.
    Raises UsageError for a strength outside 0 to 1.
    """
    if not 0.0 < strength <= 1.0:
        raise UsageError(f"--strength is above 0 and at most 1, not {strength:g}; at 0 there is nothing to refine.")
    _require_steps(steps)
    if meaning == "diffusers":
        first = int(max(steps - min(steps * strength, steps), 0))
        return levels(steps, shift)[first:]
    total = int(steps / strength)
    if total > MOST_STEPS:
        raise UsageError(f"--strength {strength:g} makes a schedule of {total} steps; {MOST_STEPS} is the limit.")
    return levels(total, shift)[-steps - 1 :]


def _even(steps: int) -> NDArray[np.float32]:
    """1 to 1/steps as torch.linspace gives them to the last bit: from both ends, one rounding to float32 each."""
    index = np.arange(steps)
    last = np.float32(1.0 / steps)
    step = float((last - np.float32(1.0)) / np.float32(max(1, steps - 1)))
    return np.where(index < steps // 2, 1.0 + step * index, float(last) - step * (steps - 1 - index)).astype(np.float32)


def _require_steps(steps: int) -> None:
    if not 1 <= steps <= MOST_STEPS:
        raise UsageError(f"the number of steps is 1 to {MOST_STEPS}, not {steps}.")
