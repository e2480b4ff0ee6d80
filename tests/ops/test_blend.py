"""The compiled pass over a merge's elements: the bytes and figures of the numpy oracle."""

from __future__ import annotations

import numpy as np
import pytest

from mergetool.checkpoint import dtypes
from mergetool.checkpoint.dtypes import DType
from mergetool.ops import blend
from mergetool.ops.program import Add, Apply, Load, Program, Scale, Subtract
from mergetool.ops.rounding import NEAREST, ErrorFeedback, Rounding, Stochastic
from mergetool.ops.stored import Stored
from mergetool.recipe.compiler import compile_merge
from mergetool.recipe.expression import parse
from mergetool_kernels import compiled
from tests.ops import oracle

pytestmark = pytest.mark.usefixtures("built")

DTYPES = (dtypes.F32, dtypes.BF16, dtypes.F16, dtypes.F8_E4M3, dtypes.F8_E5M2)
SIZES = (0, 1, 7, 8, 1023, 1024, 1025, 10_007)
THREE = compile_merge(parse("a + 1.7 * (b - c)"), {"a": 0, "b": 1, "c": 2})
WEIGHTED = compile_merge(parse("0.3 * a + 0.7 * b"), {"a": 0, "b": 1})
ONE = Program((Load(0, 0),))


@pytest.fixture
def built() -> None:
    assert compiled.is_available(), "these tests want a C compiler where mergetool is installed"


def elements(dtype: DType, count: int, seed: int, *, offset: int = 0) -> memoryview:
    """Finite values over many magnitudes, at an address that is ``offset`` bytes from an aligned one."""
    random = np.random.default_rng(seed)
    values = random.standard_normal(count) * np.exp2(random.integers(-20, 3, count))
    return memoryview(bytearray(offset) + oracle.encode(values.astype(np.float32), dtype))[offset:]


def blended(
    program: Program,
    operands: list[Stored | None],
    dtype: DType,
    first: int | None = None,
    *,
    count: int = 20_000,
    rounding: Rounding = NEAREST,
    saturating: bool = False,
) -> blend.Blended | None:
    room = memoryview(bytearray(4 * count))
    return blend.blend(program, operands, dtype, room, first, rounding=rounding, saturating=saturating)


def every_code(dtype: DType) -> np.ndarray:
    """Every number up to 2**126 of a format of 16 bits or fewer, in float32."""
    codes = np.arange(1 << dtype.bits, dtype=np.uint16 if dtype.bits == 16 else np.uint8)
    with np.errstate(invalid="ignore"):  # NaN
        values = oracle.decode(codes.tobytes(), dtype).astype(np.float32)
    return values[np.abs(values) <= 2.0**126]


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("output", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_bytes_and_movement_are_the_oracles(source: DType, output: DType, count: int) -> None:
    raws = [elements(source, count, seed, offset=seed) for seed in range(3)]
    given = [oracle.decode(bytes(raw), source).astype(np.float32) for raw in raws]
    wanted = oracle.run(THREE, given, np.float32)

    found = blended(THREE, [Stored(raw, source) for raw in raws], output, 0)

    assert found is not None
    assert bytes(found.stored) == oracle.store(wanted, output, NEAREST)
    assert_same_movement(found, wanted, given[0], output)


def assert_same_movement(found: blend.Blended, result: np.ndarray, first: np.ndarray, output: DType) -> None:
    wanted = oracle.measure(result, first, oracle.store(result, output, NEAREST), output)
    movement = found.movement
    assert movement is not None
    assert (movement.moved, movement.eaten, movement.below_half_ulp) == (
        wanted.moved,
        wanted.eaten,
        wanted.below_half_ulp,
    )
    assert movement.delta_energy == pytest.approx(wanted.delta_energy, rel=1e-6)
    assert movement.kept_energy == pytest.approx(wanted.kept_energy, rel=1e-6, abs=1e-6 * wanted.delta_energy)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_every_finite_code_comes_back(dtype: DType) -> None:
    raw = oracle.encode(every_code(dtype), dtype)
    as_floats = blended(ONE, [Stored(memoryview(raw), dtype)], dtypes.F32, count=1 << 16)
    assert as_floats is not None
    assert bytes(as_floats.stored) == oracle.decode(raw, dtype).astype(np.float32).tobytes()
    back = blended(ONE, [Stored(memoryview(raw), dtype)], dtype, count=1 << 16)
    assert back is not None
    assert bytes(back.stored) == raw


@pytest.mark.parametrize("output", DTYPES[1:])
def test_rounding_is_right_at_and_beside_every_tie(output: DType) -> None:
    """Between every two neighbours of the format: the middle, and the float32 numbers on both sides of it."""
    numbers = np.unique(np.abs(every_code(output)).astype(np.float64))
    middles = ((numbers[:-1] + numbers[1:]) / 2).astype(np.float32)
    sizes = np.concatenate([middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(np.inf))])
    values = np.concatenate([sizes, -sizes])

    found = blended(ONE, [Stored(memoryview(values.tobytes()), dtypes.F32)], output, count=len(values))

    assert found is not None
    assert bytes(found.stored) == oracle.store(values, output, NEAREST)


@pytest.mark.parametrize("output", DTYPES)
def test_movement_of_tiny_and_huge_deltas_is_float64s(output: DType) -> None:
    random = np.random.default_rng(3)
    sizes = np.array([2.0**-149, 2.0**-80, 2.0**-60, 1.0, output.largest / 4 if output.bits < 32 else 2.0**100])
    for size in np.minimum(sizes, 2.0**120):
        first = (random.standard_normal(3000).clip(-3, 3) * size / 4).astype(np.float32)
        other = (random.standard_normal(3000).clip(-3, 3) * size / 4).astype(np.float32)
        operands: list[Stored | None] = [Stored(memoryview(each.tobytes()), dtypes.F32) for each in (first, other)]
        program = Program((Load(0, 0), Load(1, 1), Add(0, 1)))
        found = blended(program, operands, output, 0)
        assert found is not None
        assert_same_movement(found, first + other, first, output)


def test_a_register_may_be_loaded_again_and_added_to_itself() -> None:
    raws = [elements(dtypes.BF16, 1500, seed) for seed in range(3)]
    program = Program((Load(0, 2), Load(1, 0), Add(1, 1), Subtract(0, 1), Load(1, 1), Scale(1, -0.25), Add(0, 1)))
    given = [oracle.decode(bytes(raw), dtypes.BF16) for raw in raws]

    found = blended(program, [Stored(raw, dtypes.BF16) for raw in raws], dtypes.BF16)

    assert found is not None
    assert found.movement is None
    assert bytes(found.stored) == oracle.store(oracle.run(program, given, np.float32), dtypes.BF16, NEAREST)


@pytest.mark.parametrize("at", [0, 5, 1023, 1024, 2999])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.4e38])
@pytest.mark.parametrize("output", DTYPES)
def test_what_is_not_finite_or_does_not_fit_is_left_to_others(output: DType, value: float, at: int) -> None:
    values = np.zeros(3000, np.float32)
    values[at] = value
    assert blended(ONE, [Stored(memoryview(values.tobytes()), dtypes.F32)], output) is None


@pytest.mark.parametrize("output", [dtypes.F16, dtypes.F8_E4M3, dtypes.F8_E5M2])
def test_the_largest_number_fits_and_the_next_does_not(output: DType) -> None:
    for sign in (1, -1):
        fits = np.array([sign * output.largest], np.float32)
        beyond = np.nextafter(fits, np.float32(sign * np.inf))
        assert blended(ONE, [Stored(memoryview(fits.tobytes()), dtypes.F32)], output) is not None
        assert blended(ONE, [Stored(memoryview(beyond.tobytes()), dtypes.F32)], output) is None


def test_a_first_model_that_does_not_fit_is_left_to_others() -> None:
    first, other = np.full(4, 500, np.float32), np.full(4, -400, np.float32)
    operands: list[Stored | None] = [Stored(memoryview(each.tobytes()), dtypes.F32) for each in (first, other)]
    program = Program((Load(0, 0), Load(1, 1), Add(0, 1)))
    assert blended(program, operands, dtypes.F8_E4M3) is not None
    assert blended(program, operands, dtypes.F8_E4M3, 0) is None


def test_programs_and_operands_that_are_not_compiled_are_left_to_others() -> None:
    raw = elements(dtypes.BF16, 8, 1)
    many = Program(tuple(Load(register, 0) for register in range(compiled.REGISTERS + 1)))
    assert blended(many, [Stored(raw, dtypes.BF16)], dtypes.BF16) is None
    assert blended(Program((Load(0, 0), Apply(0, "x", (0,)))), [Stored(raw, dtypes.BF16)], dtypes.BF16) is None
    assert blended(ONE, [None], dtypes.BF16) is None
    assert blended(ONE, [Stored(memoryview(bytes(8)), dtypes.F64)], dtypes.BF16) is None
    assert blended(ONE, [Stored(raw, dtypes.BF16)], dtypes.F64) is None


def test_steps_and_buffers_that_do_not_fit_each_other_are_refused() -> None:
    raw, out = memoryview(bytes(16)), memoryview(bytearray(16))
    one = [(raw, compiled.BFLOAT16, 1.0)]
    for steps in ([(compiled.LOAD, 0, 1)], [(compiled.LOAD, 8, 0)], [(compiled.SCALE, 0, 0)], [(9, 0, 0)]):
        with pytest.raises(ValueError, match="not there"):
            compiled.blend(steps, [], one, 8, out, compiled.BFLOAT16)
    with pytest.raises(ValueError, match="model 0 has 16 bytes"):
        compiled.blend([(compiled.LOAD, 0, 0)], [], one, 9, memoryview(bytearray(18)), compiled.BFLOAT16)
    with pytest.raises(ValueError, match="the output has 16 bytes"):
        compiled.blend([(compiled.LOAD, 0, 0)], [], one, 8, out, compiled.FLOAT32)
    with pytest.raises(ValueError, match="no operand 1"):
        compiled.blend([(compiled.LOAD, 0, 0)], [], one, 8, out, compiled.BFLOAT16, 1)


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("scale", [2.1e-4, 1.0, 3.7])
def test_operands_are_multiplied_by_their_scale_first(source: DType, scale: float) -> None:
    raws = [elements(source, 5000, seed) for seed in range(3)]
    scales = [np.float32(scale), np.float32(0.9 * scale), np.float32(1)]
    given = [oracle.decode(bytes(raw), source).astype(np.float32) * one for raw, one in zip(raws, scales, strict=True)]
    wanted = oracle.run(THREE, given, np.float32)
    operands: list[Stored | None] = [Stored(raw, source, float(s)) for raw, s in zip(raws, scales, strict=True)]

    found = blended(THREE, operands, dtypes.BF16, 0)

    assert found is not None
    assert bytes(found.stored) == oracle.store(wanted, dtypes.BF16, NEAREST)
    assert found.largest == np.abs(wanted).max()
    assert_same_movement(found, wanted, given[0], dtypes.BF16)


@pytest.mark.parametrize("output", [dtypes.F8_E4M3, dtypes.F8_E5M2])
def test_saturating_keeps_what_is_beyond_at_the_largest_number(output: DType) -> None:
    values = np.array([1, 3, 0, -0.0, 1.0001, -1.0001, 1e5, -1e30], np.float32) * np.float32(output.largest)
    operand: list[Stored | None] = [Stored(memoryview(values.tobytes()), dtypes.F32)]
    found = blended(ONE, operand, output, saturating=True)
    assert found is not None
    assert bytes(found.stored) == oracle.store(values, output, NEAREST)
    for bad in (np.nan, np.inf, -np.inf):
        values[5] = bad
        operand = [Stored(memoryview(values.tobytes()), dtypes.F32)]
        assert blended(ONE, operand, output, saturating=True) is None


@pytest.mark.parametrize("first", [0, 12_345, 2**32 - 777, 2**32 - 3, 7 * 2**32 + 5, 2**62])
@pytest.mark.parametrize("output", DTYPES)
def test_stochastic_bytes_and_movement_are_the_oracles(output: DType, first: int) -> None:
    raws = [elements(dtypes.BF16, 3001, seed) for seed in range(3)]
    given = [oracle.decode(bytes(raw), dtypes.BF16).astype(np.float32) for raw in raws]
    wanted = oracle.run(THREE, given, np.float32)
    rounding = Stochastic(0xFEDC_BA98_7654_3210, first)
    expected = oracle.store(wanted, output, rounding)

    found = blended(THREE, [Stored(raw, dtypes.BF16) for raw in raws], output, 0, rounding=rounding)

    assert found is not None
    assert bytes(found.stored) == expected
    movement, measured = oracle.measure(wanted, given[0], expected, output), found.movement
    assert measured is not None
    assert (measured.moved, measured.eaten) == (movement.moved, movement.eaten)
    assert measured.kept_energy == pytest.approx(movement.kept_energy, rel=1e-5)


@pytest.mark.parametrize("output", DTYPES[1:])
def test_stochastic_rounding_of_every_number_leaves_it_and_of_every_middle_is_the_oracles(output: DType) -> None:
    numbers = np.unique(np.abs(every_code(output)).astype(np.float64))
    middles = ((numbers[:-1] + numbers[1:]) / 2).astype(np.float32)
    values = np.concatenate([numbers.astype(np.float32), middles, np.nextafter(middles, np.float32(0)), -middles])
    rounding = Stochastic(99, 3)

    found = blended(
        ONE, [Stored(memoryview(values.tobytes()), dtypes.F32)], output, rounding=rounding, count=len(values)
    )

    assert found is not None
    assert bytes(found.stored) == oracle.store(values, output, rounding)
    assert bytes(found.stored)[: len(numbers) * output.itemsize] == oracle.encode(numbers.astype(np.float32), output)


def test_a_draw_that_equals_the_rest_rounds_down() -> None:
    drawn = oracle.random_bits(Stochastic(3, 0), 1000) >> 8
    index = int(np.flatnonzero(drawn % 16 == 0)[0])  # 8 + the draw is then a float32
    one = np.array([1 + int(drawn[index]) * 2.0**-27, 0], np.float32)  # of steps of 1/8
    above = np.nextafter(one, np.float32(2))
    for values, code in ((one, 0x38), (above, 0x39)):
        given: list[Stored | None] = [Stored(memoryview(values.tobytes()), dtypes.F32)]
        found = blended(ONE, given, dtypes.F8_E4M3, rounding=Stochastic(3, index))
        assert found is not None
        assert found.stored[0] == code


@pytest.mark.parametrize("at", [0, 1023, 2999])
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0x7F800001, 0x7F800000, 0xFF800000])
@pytest.mark.parametrize("output", DTYPES)
def test_what_is_not_finite_is_never_dithered_into_a_number(output: DType, bits: int, at: int) -> None:
    values = np.zeros(3000, np.uint32)
    values[at] = bits
    given: list[Stored | None] = [Stored(memoryview(values.tobytes()), dtypes.F32)]
    for saturating in (False, True):
        assert blended(ONE, given, output, rounding=Stochastic(1, 0), saturating=saturating) is None


@pytest.mark.parametrize("output", [dtypes.F8_E4M3, dtypes.F8_E5M2])
def test_stochastic_rounding_saturates_as_the_oracle_does(output: DType) -> None:
    values = (np.random.default_rng(1).standard_normal(4000) * output.largest / 2).astype(np.float32)
    given: list[Stored | None] = [Stored(memoryview(values.tobytes()), dtypes.F32)]
    rounding = Stochastic(5, 77)
    assert blended(ONE, given, output, rounding=rounding) is None
    found = blended(ONE, given, output, rounding=rounding, saturating=True)
    assert found is not None
    assert bytes(found.stored) == oracle.store(values, output, rounding)


def test_error_feedback_is_left_to_others() -> None:
    assert (
        blended(ONE, [Stored(elements(dtypes.BF16, 8, 1), dtypes.BF16)], dtypes.BF16, rounding=ErrorFeedback(8)) is None
    )


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("dtype", [dtypes.F8_E4M3, dtypes.F8_E5M2])
def test_what_storing_with_a_scale_did_is_numpys(dtype: DType, count: int) -> None:
    random, scale = np.random.default_rng(count), np.float32(2.1e-4)
    first = (random.standard_normal(count) * 0.02).astype(np.float32)
    delta = random.standard_normal(count) * np.exp2(random.integers(-20, -6, count)) * (random.random(count) < 0.7)
    result = (first + delta).astype(np.float32)
    came, alone = (oracle.encode(values / scale, dtype) for values in (result, first))
    stands, base = (oracle.decode(codes, dtype).astype(np.float32) for codes in (came, alone))

    found = blend.moves(result, first, Stored(memoryview(came), dtype, float(scale)), memoryview(alone))

    assert found is not None
    moves, change = result - first, stands * scale - base * scale
    least, bits = (2.0**-6, 3) if dtype is dtypes.F8_E4M3 else (2.0**-14, 2)
    exponent = np.floor(np.log2(np.maximum(np.abs(base), least)))
    half = np.exp2(exponent - bits - 1).astype(np.float32) * scale
    assert found.moved == np.count_nonzero(moves)
    assert found.eaten == np.count_nonzero((moves != 0) & (change == 0))
    assert found.below_half_ulp == np.count_nonzero((moves != 0) & (np.abs(moves) < half))
    assert found.delta_energy == pytest.approx(np.sum(moves.astype(np.float64) ** 2), rel=1e-12)
    assert found.kept_energy == pytest.approx(float(moves.astype(np.float64) @ change.astype(np.float64)), rel=1e-12)


def test_moves_that_are_not_finite_or_do_not_fit_are_not_summed() -> None:
    one = np.ones(8, np.float32)
    codes = memoryview(bytes(8))
    for bad in (np.nan, np.inf):
        other = one.copy()
        other[3] = bad
        assert blend.moves(other, one, Stored(codes, dtypes.F8_E4M3), codes) is None
    assert blend.moves(one, one, Stored(codes, dtypes.F64), codes) is None
    with pytest.raises(ValueError, match="32, 32, 7 and 8 bytes"):
        blend.moves(one, one, Stored(codes[:7], dtypes.F8_E4M3), codes)


def test_the_weighted_sum_is_the_oracles() -> None:
    raws = [elements(dtypes.F16, 5000, seed) for seed in range(2)]
    given = [oracle.decode(bytes(raw), dtypes.F16) for raw in raws]
    found = blended(WEIGHTED, [Stored(raw, dtypes.F16) for raw in raws], dtypes.F8_E4M3, 1)
    assert found is not None
    result = oracle.run(WEIGHTED, given, np.float32)
    assert bytes(found.stored) == oracle.store(result, dtypes.F8_E4M3, NEAREST)
    assert_same_movement(found, result, given[1], dtypes.F8_E4M3)
