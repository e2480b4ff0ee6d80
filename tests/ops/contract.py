"""The contract every implementation of the merge arithmetic passes: same bytes as the numpy oracle.

Inherit from ``OpsContract`` and give ``make`` to hold a new implementation to it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import pytest

from mergetool.checkpoint import dtypes
from mergetool.checkpoint.dtypes import DType
from mergetool.ops import oracle
from mergetool.ops.contract import Ops
from mergetool.ops.program import Add, Load, Program, Scale, Subtract
from mergetool.recipe.compiler import compile_merge
from mergetool.recipe.expression import parse

BLENDED = [dtypes.F32, dtypes.F16, dtypes.BF16, dtypes.F8_E4M3, dtypes.F8_E5M2]
SIZES = [0, 1, 3, 31, 32, 33, 255, 257, 1024, 4099]
SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    2**-149,
    -(2**-149),
    2**-126,
    3e38,
    -3e38,
    65504.0,
    65520.0,
    448.0,
    449.0,
    464.0,
    57344.0,
]


def stored(dtype: DType, count: int, seed: int) -> bytes:
    """Finite random values over many magnitudes, in a stored dtype."""
    random = np.random.default_rng(seed)
    values = random.standard_normal(count) * np.exp2(random.integers(-20, 3, count))
    return oracle.encode(values.astype(np.float32), dtype)


def execute(ops: Ops, program: Program, inputs: list[bytes], sources: list[DType], output: DType) -> tuple[bytes, int]:
    for step in program.instructions:
        match step:
            case Load(register, model):
                ops.load(register, memoryview(inputs[model]), sources[model])
            case _:
                _arithmetic(ops, step)
    view, beyond = ops.store(0, output)
    return bytes(view), beyond


def _arithmetic(ops: Ops, step: object) -> None:
    match step:
        case Scale(register, factor):
            ops.scale(register, factor)
        case Add(register, other):
            ops.add(register, other)
        case Subtract(register, other):
            ops.subtract(register, other)


class OpsContract(ABC):
    """Subclasses give ``make(capacity, registers)``."""

    @abstractmethod
    def make(self, capacity: int, registers: int) -> Ops: ...

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("dtype", BLENDED, ids=lambda d: d.name)
    def test_bridge_merge_is_the_oracles_bytes(self, dtype: DType, size: int) -> None:
        program = compile_merge(parse("a + 171.1*(b - c)"), {"a": 0, "b": 1, "c": 2})
        inputs = [stored(dtype, size, seed) for seed in range(3)]
        found, _ = execute(self.make(4099, program.registers), program, inputs, [dtype] * 3, dtype)
        decoded = [oracle.decode(raw, dtype) for raw in inputs]
        assert found == oracle.encode(oracle.run(program, decoded, np.float32), dtype)

    @pytest.mark.parametrize("output", BLENDED, ids=lambda d: d.name)
    @pytest.mark.parametrize("source", BLENDED, ids=lambda d: d.name)
    def test_every_dtype_rounds_to_every_other_as_the_oracle_does(self, source: DType, output: DType) -> None:
        program = compile_merge(parse("a"), {"a": 0})
        raw = stored(source, 1000, 7)
        found, _ = execute(self.make(1000, 1), program, [raw], [source], output)
        assert found == oracle.encode(oracle.decode(raw, source), output)

    @pytest.mark.parametrize("output", BLENDED, ids=lambda d: d.name)
    def test_edges_of_the_number_line(self, output: DType) -> None:
        raw = np.array(SPECIAL, np.float32).tobytes()
        found, beyond = execute(self.make(64, 1), compile_merge(parse("a"), {"a": 0}), [raw], [dtypes.F32], output)
        with np.errstate(over="ignore"):
            assert found == oracle.encode(np.array(SPECIAL, np.float32), output)
        if output in (dtypes.F16, dtypes.F8_E4M3, dtypes.F8_E5M2):
            largest = 65520.0 if output is dtypes.F16 else np.nextafter(output.largest, np.inf)
            assert beyond == sum(abs(value) >= largest for value in SPECIAL)

    @pytest.mark.parametrize("dtype", [dtypes.F8_E4M3, dtypes.F8_E5M2], ids=lambda d: d.name)
    def test_every_fp8_code_is_read_as_its_definition_says(self, dtype: DType) -> None:
        raw = bytes(range(256))
        found, _ = execute(self.make(256, 1), compile_merge(parse("a"), {"a": 0}), [raw], [dtype], dtypes.F32)
        np.testing.assert_array_equal(np.frombuffer(found, np.float32), oracle.decode(raw, dtype))

    def test_every_bf16_bit_pattern_survives_reading_and_writing(self) -> None:
        raw = np.arange(65536, dtype="<u2").tobytes()
        found, _ = execute(self.make(65536, 1), compile_merge(parse("a"), {"a": 0}), [raw], [dtypes.BF16], dtypes.BF16)
        bits, back = np.frombuffer(raw, "<u2"), np.frombuffer(found, "<u2")
        nan = (bits & 0x7FFF) > 0x7F80
        np.testing.assert_array_equal(back[~nan], bits[~nan])
        assert ((back[nan] & 0x7FFF) > 0x7F80).all()

    def test_rounding_to_bf16_is_to_nearest_even(self) -> None:
        low = np.uint32(0x3F800000)
        ties = np.array([low + 0x8000, low + 0x18000, low + 0x7FFF, low + 0x8001], np.uint32)
        found, _ = execute(
            self.make(4, 1), compile_merge(parse("a"), {"a": 0}), [ties.tobytes()], [dtypes.F32], dtypes.BF16
        )
        assert np.frombuffer(found, "<u2").tolist() == [0x3F80, 0x3F82, 0x3F80, 0x3F81]

    def test_multiply_and_add_are_not_contracted(self) -> None:
        """With a fused multiply-add 1 + eps would show; two roundings give exactly 0."""
        x = np.float32(1 + 2**-23)
        product = np.float32(x * x)
        program = compile_merge(parse("a + 2*(b - c)"), {"a": 0, "b": 1, "c": 2})
        values = [np.full(64, -2 * product, np.float32), np.full(64, product, np.float32), np.zeros(64, np.float32)]
        found, _ = execute(
            self.make(64, program.registers), program, [v.tobytes() for v in values], [dtypes.F32] * 3, dtypes.F32
        )
        assert not np.frombuffer(found, np.float32).any()

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_a_non_finite_element_is_found(self, bad: float) -> None:
        values = np.ones(1000, np.float32)
        values[[417, 600]] = bad
        ops = self.make(1000, 1)
        ops.load(0, memoryview(values.tobytes()), dtypes.F32)
        assert not ops.is_finite(0)
        assert ops.first_non_finite(0) == (2, 417)

    def test_large_finite_values_are_finite(self) -> None:
        ops = self.make(1000, 1)
        ops.load(0, memoryview(np.full(1000, 3e38, np.float32).tobytes()), dtypes.F32)
        assert ops.is_finite(0)

    def test_bytes_at_an_odd_address_are_read(self) -> None:
        raw = stored(dtypes.BF16, 100, 3)
        ops = self.make(100, 1)
        ops.load(0, memoryview(b"x" + raw)[1:], dtypes.BF16)
        assert bytes(ops.store(0, dtypes.BF16)[0]) == raw
