"""Methods that interpolate on a sphere: directions and sizes apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from torch import Tensor

from mergetool.methods.registry import Range, Site, method
from mergetool.ops.reductions import dot, norm

PARALLEL = 0.9995
"""Cosines beyond which the arc is a straight line to float32, and dividing by its sine would only lose digits."""


@method(takes="any", least=2, most=2)
def slerp(
    tensors: Sequence[Tensor], site: Site, *, t: Annotated[float, Range(text="the place between the two")] = 0.5
) -> Tensor:
    """Go from one to the other along the arc between them, each parameter as one vector.

    Formula: (sin((1-t)*w)*x1 + sin(t*w)*x2) / sin(w) with w the angle between x1 and x2; x1 + t*(x2-x1) where abs(cos w) > 0.9995
    Source: Animating rotation with quaternion curves, Shoemake 1985
    """
    a, b = tensors
    lengths = norm(a) * norm(b)
    cosine = max(-1.0, min(1.0, dot(a, b) / lengths)) if lengths else 1.0
    if abs(cosine) > PARALLEL:
        return a + (b - a) * t
    angle = math.acos(cosine)
    return a * (math.sin((1 - t) * angle) / math.sin(angle)) + b * (math.sin(t * angle) / math.sin(angle))
