"""The contract every implementation of the merge arithmetic passes: same bytes as the numpy oracle.

Inherit from ``OpsContract`` and give ``make`` to hold a new implementation to it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import pytest

from mergetool.checkpoint import dtypes
from mergetool.checkpoint.dtypes import DType
from mergetool.ops.contract import Ops
from mergetool.ops.movement import Movement
from mergetool.ops.program import Add, Load, Program, Scale, Subtract
from mergetool.ops.rounding import FORMATS, ErrorFeedback, Nearest, Rounding, Stochastic, stream_key
from mergetool.recipe.compiler import compile_merge
from mergetool.recipe.expression import parse
from tests.ops import oracle

NARROW = [dtypes.F16, dtypes.BF16, dtypes.F8_E4M3, dtypes.F8_E5M2]
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


def between(dtype: DType, count: int, seed: int) -> np.ndarray:
    """Random float32 values over the dtype's normal and subnormal numbers, few of which it can hold."""
    random = np.random.default_rng(seed)
    exponents = random.integers(FORMATS[dtype].smallest - FORMATS[dtype].mantissa - 3, 6, count)
    return (random.standard_normal(count) * np.exp2(np.maximum(exponents, -30))).astype(np.float32)


def edges(dtype: DType) -> np.ndarray:
    """Values at and around the ends of a dtype's range, and at both ends of float32's."""
    fine = np.exp2(float(FORMATS[dtype].smallest - FORMATS[dtype].mantissa))
    ends = [0.0, 2.0**-149, fine / 2, fine, 2 * fine, 2.0 ** FORMATS[dtype].smallest, dtype.largest]
    near = [np.nextafter(np.float32(end), np.float32(to)) for end in ends for to in (0, np.inf)]
    size = np.array([*ends, *near, 3.4e38, np.inf, np.nan], np.float32)
    return np.concatenate([size, -size])


def rounded(ops: Ops, values: np.ndarray, dtype: DType, rounding: Rounding) -> tuple[bytes, int]:
    ops.load(0, memoryview(values.tobytes()), dtypes.F32)
    view, beyond = ops.store(0, dtype, rounding)
    return bytes(view), beyond


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

    @pytest.mark.parametrize("first", [0, 1, 2**32 - 50, 3 * 2**32 - 2000, 2**40 + 12345])
    @pytest.mark.parametrize("dtype", NARROW, ids=lambda d: d.name)
    def test_stochastic_rounding_is_the_oracles(self, dtype: DType, first: int) -> None:
        values = between(dtype, 4099, 11)
        how = Stochastic(stream_key(5, "layers.0.weight"), first)
        found, _ = rounded(self.make(4099, 1), values, dtype, how)
        assert found == oracle.store(values, dtype, how)
        assert found != oracle.encode(values, dtype)

    @pytest.mark.parametrize("row", [1, 2, 31, 400])
    @pytest.mark.parametrize("dtype", NARROW, ids=lambda d: d.name)
    def test_error_feedback_is_the_oracles(self, dtype: DType, row: int) -> None:
        values = between(dtype, 1200 // row * row, 12)
        found, _ = rounded(self.make(1200, 1), values, dtype, ErrorFeedback(row))
        assert found == oracle.store(values, dtype, ErrorFeedback(row))

    @pytest.mark.parametrize("how", [Stochastic(7, 0), ErrorFeedback(3), Nearest()], ids=lambda h: type(h).__name__)
    @pytest.mark.parametrize("dtype", NARROW, ids=lambda d: d.name)
    def test_every_rounding_agrees_with_the_oracle_at_the_ends_of_the_range(self, dtype: DType, how: Rounding) -> None:
        values = np.repeat(edges(dtype), 3)
        found, beyond = rounded(self.make(256, 1), values, dtype, how)
        back, wanted = oracle.decode(found, dtype), oracle.decode(oracle.store(values, dtype, how), dtype)
        np.testing.assert_array_equal(back, wanted)
        finite = ~np.isnan(back)
        np.testing.assert_array_equal(np.signbit(back[finite]), np.signbit(wanted[finite]))
        if not isinstance(how, ErrorFeedback):
            lost = np.isinf(wanted) & np.isfinite(values) if dtype.bits > 8 else np.abs(values) > dtype.largest
            assert beyond == lost.sum()

    @pytest.mark.parametrize("dtype", NARROW, ids=lambda d: d.name)
    @pytest.mark.parametrize("how", [Stochastic(7, 0), ErrorFeedback(100)], ids=lambda h: type(h).__name__)
    def test_what_the_dtype_holds_is_stored_as_it_is(self, dtype: DType, how: Rounding) -> None:
        values = oracle.decode(stored(dtype, 1000, 4), dtype).astype(np.float32)
        found, _ = rounded(self.make(1000, 1), values, dtype, how)
        np.testing.assert_array_equal(oracle.decode(found, dtype), values)

    @pytest.mark.parametrize("how", [Stochastic(7, 0), ErrorFeedback(10)], ids=lambda h: type(h).__name__)
    def test_fp32_is_never_rounded(self, how: Rounding) -> None:
        values = between(dtypes.BF16, 1000, 5)
        assert rounded(self.make(1000, 1), values, dtypes.F32, how) == (values.tobytes(), 0)

    @pytest.mark.parametrize("how", [Stochastic(7, 0), ErrorFeedback(1), ErrorFeedback(1000)], ids=str)
    def test_storing_leaves_the_register_as_it_is(self, how: Rounding) -> None:
        ops, values = self.make(1000, 1), between(dtypes.BF16, 1000, 13)
        rounded(ops, values, dtypes.BF16, how)
        assert bytes(ops.store(0, dtypes.F32)[0]) == values.tobytes()

    def test_stochastic_rounding_to_bf16_adds_a_random_lower_half(self) -> None:
        values, how = between(dtypes.BF16, 1000, 6), Stochastic(stream_key(0, "x"), 9)
        wanted = (values.view(np.uint32) + (0xFFFF - (oracle.random_bits(how, 1000) >> 16))) >> 16
        found = np.frombuffer(rounded(self.make(1000, 1), values, dtypes.BF16, how)[0], "<u2")
        np.testing.assert_array_equal(found, wanted)

    @pytest.mark.parametrize("dtype", NARROW, ids=lambda d: d.name)
    def test_a_draw_equal_to_the_rest_rounds_down_and_one_below_it_up(self, dtype: DType) -> None:
        step, how = 2.0 ** -FORMATS[dtype].mantissa, Stochastic(1, 0)
        draws = (oracle.random_bits(how, 65536) >> 8) * 2.0**-24
        values = (1 + draws * step).astype(np.float32)
        equal = (values - 1.0) / step == draws  # where float32 has the bits for it
        assert equal.sum() > 20
        down = oracle.decode(rounded(self.make(65536, 1), values, dtype, how)[0], dtype)
        up = oracle.decode(rounded(self.make(65536, 1), np.nextafter(values, np.float32(2)), dtype, how)[0], dtype)
        assert (set(down[equal]), set(up[equal])) == ({1.0}, {1 + step})

    @pytest.mark.parametrize("dtype", NARROW, ids=lambda d: d.name)
    def test_stochastic_rounding_is_right_on_average(self, dtype: DType) -> None:
        """A value 30 % of the way to its neighbour goes there in 30 % of 4096 draws: 4 standard deviations are 2.9 %."""
        step = 2.0 ** -FORMATS[dtype].mantissa
        values = np.full(4096, 1 + 0.3 * step, np.float32)
        found = oracle.decode(rounded(self.make(4096, 1), values, dtype, Stochastic(1, 0))[0], dtype)
        assert set(found) == {1, 1 + step}
        assert abs((found - 1).mean() / step - 0.3) < 0.029

    @pytest.mark.parametrize("dtype", NARROW, ids=lambda d: d.name)
    def test_error_feedback_keeps_the_sum_of_a_row(self, dtype: DType) -> None:
        values = between(dtype, 400, 8).clip(-1, 1)
        found = oracle.decode(rounded(self.make(400, 1), values, dtype, ErrorFeedback(400))[0], dtype)
        assert abs(found.sum() - values.astype(np.float64).sum()) <= 2.0 ** -FORMATS[dtype].mantissa

    @pytest.mark.parametrize("dtype", NARROW, ids=lambda d: d.name)
    def test_a_capped_element_leaves_nothing_to_the_next(self, dtype: DType) -> None:
        values = np.array([3e38 if dtype is dtypes.F16 else 3.4e38, 1.0, np.nan, 1.0, -np.inf, 1.0], np.float32)
        found = oracle.decode(rounded(self.make(6, 1), values, dtype, ErrorFeedback(6))[0], dtype)
        assert found[1::2].tolist() == [1, 1, 1]

    @pytest.mark.parametrize("size", [1, 1023, 1025, 4099])
    @pytest.mark.parametrize("relative", [1e-4, 1e-2, 1.0])
    @pytest.mark.parametrize("output", BLENDED, ids=lambda d: d.name)
    @pytest.mark.parametrize("source", [dtypes.F32, dtypes.BF16, dtypes.F8_E4M3], ids=lambda d: d.name)
    def test_what_moved_and_what_came_through_are_the_oracles(
        self, source: DType, output: DType, relative: float, size: int
    ) -> None:
        raw = stored(source, size, 1)
        first = oracle.decode(raw, source).astype(np.float32)
        random = np.random.default_rng(2)
        delta = random.standard_normal(size) * relative * np.abs(first) * (random.random(size) < 0.9)
        ops = self.make(4099, 2)
        result = (first + delta).astype(np.float32)
        ops.load(0, memoryview(result.tobytes()), dtypes.F32)
        ops.load(1, memoryview(raw), source)
        view, _ = ops.store(0, output, Stochastic(3, 0), 1)
        self.assert_equal(ops.measure(0, 1, output), oracle.measure(result, first, bytes(view), output))

    @pytest.mark.parametrize("scale", [1e-30, 1e25])
    @pytest.mark.parametrize("output", [dtypes.F32, dtypes.BF16, dtypes.F8_E4M3], ids=lambda d: d.name)
    def test_deltas_whose_squares_leave_float32_are_measured_too(self, output: DType, scale: float) -> None:
        random = np.random.default_rng(5)
        first, result = (random.standard_normal((2, 500)) * scale).astype(np.float32)
        first[7], result[9] = np.nan, np.inf
        found = self.measured(first, result, output)
        assert found.moved == 498
        self.assert_equal(found, oracle.measure(result, first, oracle.encode(result, output), output))

    def test_half_a_unit_is_that_of_the_first_models_element(self) -> None:
        """bf16 around 1 is spaced by 2**-7 above and 2**-8 below; a move by less than 2**-8 is below half a unit."""
        first = np.array([1, 1, 1, 1, 1, 0, 0], np.float32)
        moves = np.array([0, 2**-8, 2**-8 - 2**-20, -(2**-9) - 2**-20, -(2**-8), 2**-134, 2**-135], np.float32)
        found = self.measured(first, first + moves, dtypes.BF16)
        assert (found.moved, found.eaten, found.below_half_ulp) == (6, 4, 3)

    def measured(self, first: np.ndarray, result: np.ndarray, output: DType) -> Movement:
        ops = self.make(len(first), 2)
        ops.load(0, memoryview(result.tobytes()), dtypes.F32)
        ops.load(1, memoryview(first.tobytes()), dtypes.F32)
        ops.store(0, output, first=1)
        return ops.measure(0, 1, output)

    @staticmethod
    def assert_equal(found: Movement, wanted: Movement) -> None:
        """Counts exactly; sums to float32's precision over a run, which is what the contract promises at least."""
        counts = ("moved", "eaten", "below_half_ulp")
        assert [getattr(found, c) for c in counts] == [getattr(wanted, c) for c in counts]
        assert found.delta_energy == pytest.approx(wanted.delta_energy, rel=1e-6)
        assert found.kept_energy == pytest.approx(wanted.kept_energy, rel=1e-6, abs=1e-6 * wanted.delta_energy)
