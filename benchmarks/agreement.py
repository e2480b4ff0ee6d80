"""Is an output the merge it claims to be? Compares it, tensor by tensor, with float32 arithmetic in torch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far outputs are from a + alpha * (b - c) in float32, rounded once to the first model's dtype."""

    elements: int
    unequal: int  # elements whose stored value is not the reference's
    largest: float  # largest absolute difference


def compare(
    outputs: Sequence[Path], models: Sequence[Path], alpha: float, *, protected: str | None = None
) -> Agreement:
    """Read everything once, one tensor of each at a time; `protected` tensors must equal the first model's.

    Raises ValueError when the outputs together do not hold exactly the first model's tensors, or one has
    another shape or dtype.
    """
    with ExitStack() as stack:
        a, b, c = (stack.enter_context(safe_open(path, framework="pt")) for path in models)
        found = {}
        for path in outputs:
            file = stack.enter_context(safe_open(path, framework="pt"))
            found.update(dict.fromkeys(file.keys(), file))
        if found.keys() != set(a.keys()):
            names = ", ".join(sorted(found.keys() ^ set(a.keys()))[:5])
            raise ValueError(f"{outputs}: the tensors are not those of {models[0]}; not in both: {names}")
        elements, unequal, largest = 0, 0, 0.0
        for name, file in found.items():
            wanted = a.get_tensor(name)
            if protected is None or protected not in name:
                delta = b.get_tensor(name).float() - c.get_tensor(name).float()
                wanted = (wanted.float() + alpha * delta).to(wanted.dtype)
            got = file.get_tensor(name)
            if (got.shape, got.dtype) != (wanted.shape, wanted.dtype):
                raise ValueError(
                    f'"{name}" is {got.dtype} {list(got.shape)}; wanted {wanted.dtype} {list(wanted.shape)}'
                )
            difference = torch.sub(got.float(), wanted.float()).abs_()
            elements += got.numel()
            unequal += int(torch.count_nonzero(difference))
            largest = max(largest, float(difference.max())) if got.numel() else largest
    return Agreement(elements, unequal, largest)
