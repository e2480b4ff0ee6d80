"""What torch eager and torch.compile are asked for is what the kernel does: the same bytes, and the same figures."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from benchmarks.bench_kernels import BRIDGE, MULTIPLIER
from benchmarks.kernel_rivals import Bridge, compiled
from mergetool_kernels import blend

COUNT = 20_000


def bridge(dtype: torch.dtype) -> Bridge:
    """Three models: in half of their elements the second and third are the same, in many more what they add is less than a step of the first."""
    generator = torch.Generator().manual_seed(5)
    a, b, other = (torch.randn(COUNT, generator=generator) for _ in range(3))
    same = torch.rand(COUNT, generator=generator) < 0.5
    c = torch.where(same, b, b + 0.1 * other)
    if dtype == torch.bfloat16:
        a[7] = float("inf")
        return Bridge(a.to(dtype), (b / 1000).to(dtype), (c / 1000).to(dtype), MULTIPLIER)
    scales = torch.tensor([2e-4]), torch.tensor([2e-6]), torch.tensor([2e-6])
    a, b, c = ((part * 90).clamp(-448, 448).to(dtype) for part in (a, b, c))
    return Bridge(a, b, c, MULTIPLIER, scales, torch.tensor([4500.0]))


def by_kernel(given: Bridge) -> tuple[bytes, list[float]]:
    stored = torch.empty_like(given.a)
    scales = given.scales or (None,) * 3
    operands = [
        blend.KernelOperand(part, scale) for part, scale in zip((given.a, given.b, given.c), scales, strict=True)
    ]
    with np.errstate(over="ignore", invalid="ignore"):
        found = blend.blend(BRIDGE, operands, [MULTIPLIER], stored, inverse_scale=given.inverse, base=0)
    assert found.counts is not None
    assert found.sums is not None
    return stored.view(torch.uint8).numpy().tobytes(), [*found.counts.sum(0).tolist(), *found.sums.sum(0).tolist()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted: no GPU is needed")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_the_same_bytes_and_figures(dtype: torch.dtype) -> None:
    given = bridge(dtype)
    stored, figures = given.counted()
    wanted_bytes, wanted = by_kernel(given)
    found = [float(figure) for figure in figures]
    assert stored.view(torch.uint8).numpy().tobytes() == wanted_bytes
    assert found[:5] == wanted[:5]
    assert found[5:] == pytest.approx(wanted[5:], rel=1e-4)
    assert min(wanted[2:5]) > 1000, "a figure that is near 0 would prove nothing"


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile wants a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_compiled_they_do_the_same_work(dtype: torch.dtype) -> None:
    """torch.compile takes a cast and its way back for nothing; figures of what rounding did would then all be 0."""
    given = bridge(dtype)
    found = [float(figure) for figure in compiled(given.counted)()[1]]  # type: ignore[index]
    assert found == pytest.approx([float(figure) for figure in given.counted()[1]], rel=1e-2)


def test_stochastic_rounding_is_right_on_average() -> None:
    value = torch.full((200_000,), 1.0 + 3 / 1024).bfloat16()
    given = Bridge(value, torch.full_like(value, 2.0**-9), torch.zeros_like(value), 0.5)
    assert float(given.stochastic().float().mean()) == pytest.approx(float(value[0]) + 2.0**-10, abs=1e-4)
