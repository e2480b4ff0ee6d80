"""The CPU arithmetic passes the contract, and works on large chunks block by block without a seam."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from mergetool.checkpoint import dtypes
from mergetool.checkpoint.dtypes import DType
from mergetool.ops.contract import Ops
from mergetool.ops.conversion import STORED, narrow, widen
from mergetool.ops.cpu import CpuOps
from mergetool.ops.cpu_rounding import BLOCK
from mergetool.ops.rounding import Stochastic
from mergetool_kernels import compiled
from tests.ops import oracle
from tests.ops.contract import NARROW, OpsContract, between, rounded


class TestCpuOps(OpsContract):
    def make(self, capacity: int, registers: int) -> Ops:
        return CpuOps(capacity=capacity, registers=registers)


class TestCpuOpsWithoutACompiler(TestCpuOps):
    """numpy alone, on chunks that the compiled kernels would have converted."""

    @pytest.fixture(autouse=True)
    def _no_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(compiled, "is_available", lambda: False)


def halves_of_every_kind() -> np.ndarray:
    """All float32 whose upper half is any, with lower halves around what rounds up and down: 262,144 values, NaN and infinity among them."""
    upper = np.arange(65536, dtype=np.uint32)[:, None] << np.uint32(16)
    return (upper | np.array([0, 0x7FFF, 0x8000, 0x8001], np.uint32)).reshape(-1).view(np.float32)


@pytest.mark.parametrize("dtype", NARROW, ids=lambda d: d.name)
@pytest.mark.parametrize("kernels", [True, False], ids=["compiled", "numpy"])
def test_conversions_are_the_oracles_for_every_kind_of_value(
    dtype: DType, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        monkeypatch.setattr(compiled, "is_available", lambda: False)
    values = halves_of_every_kind()
    found, back = np.empty(len(values), STORED[dtype]), np.empty(len(values), np.float32)
    for at in range(0, len(values), 4096):  # most pieces are ordinary: those go through the kernels
        piece = slice(at, at + 4096)
        narrow(values[piece], dtype, found[piece])
        widen(found[piece], dtype, back[piece])
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = oracle.decode(oracle.encode(values, dtype), dtype)
    np.testing.assert_array_equal(back, wanted)
    signed = ~np.isnan(wanted)
    np.testing.assert_array_equal(np.signbit(back[signed]), np.signbit(wanted[signed]))


@pytest.mark.parametrize("dtype", NARROW, ids=lambda d: d.name)
def test_stochastic_rounding_has_no_seams_between_blocks(dtype: DType) -> None:
    """The chunk crosses a block and, inside another block, the index 2**32."""
    count, first = 2 * BLOCK + 777, 2**32 - BLOCK - 333
    values = between(dtype, count, 3)
    ops = CpuOps(capacity=count, registers=1)
    whole, _ = rounded(ops, values, dtype, Stochastic(9, first))
    cuts = [0, 1000, BLOCK, BLOCK + 333, count]
    pieces = [rounded(ops, values[a:b], dtype, Stochastic(9, first + a))[0] for a, b in pairwise(cuts)]
    assert whole == b"".join(pieces)


def test_figures_of_a_large_chunk_are_those_of_float64() -> None:
    """Sums over runs of 1024 in float32 and over runs in float64 stay within 1e-8 of float64 throughout."""
    random = np.random.default_rng(0)
    first = oracle.decode(
        oracle.encode(random.standard_normal(BLOCK + 5000).astype(np.float32), dtypes.BF16), dtypes.BF16
    )
    result = (first * (1 + 0.01 * random.standard_normal(len(first)))).astype(np.float32)
    ops = CpuOps(capacity=len(first), registers=2)
    raw, _ = rounded(ops, result, dtypes.BF16, Stochastic(1, 0))
    ops.load(1, memoryview(oracle.encode(first, dtypes.BF16)), dtypes.BF16)
    found, wanted = ops.measure(0, 1, dtypes.BF16), oracle.measure(result, first, raw, dtypes.BF16)
    assert (found.moved, found.eaten, found.below_half_ulp) == (wanted.moved, wanted.eaten, wanted.below_half_ulp)
    assert found.delta_energy == pytest.approx(wanted.delta_energy, rel=1e-8)
    assert found.projection == pytest.approx(wanted.projection, rel=1e-8)


def test_fp64_chunks_are_stored_whole() -> None:
    values = np.linspace(-1, 1, 5000, dtype=np.float32)
    assert (
        rounded(CpuOps(capacity=5000, registers=1), values, dtypes.F64, Stochastic(0, 0))[0]
        == values.astype("f8").tobytes()
    )
