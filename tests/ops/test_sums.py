"""The sums of a comparison, compiled and with numpy, against numpy in float64."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from mergetool.checkpoint.dtypes import BF16, F32, DType
from mergetool.ops import sums
from mergetool.quant.encoding import Floats
from mergetool_kernels import compiled

Implementation = Callable[[Sequence[sums.Stored | None], int], list[float]]
SIZES = (0, 1, 7, 8, 1023, 1024, 1025, 4096, 10_007)


def of_numpy(models: Sequence[sums.Stored | None], count: int) -> list[float]:
    return sums.with_numpy([None if m is None else as_floats(m.raw, m.dtype)[:count] for m in models])


IMPLEMENTATIONS: list[Implementation] = [of_numpy, *([sums.side_by_side] if compiled.is_available() else [])]
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def as_floats(raw: memoryview, dtype: DType) -> Floats:
    if dtype is F32:
        return np.frombuffer(raw, np.float32)
    return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)


def stored(values: Floats, dtype: DType, *, offset: int = 0) -> sums.Stored:
    """The upper halves for bfloat16, at an address that is ``offset`` bytes from an aligned one."""
    values = np.ascontiguousarray(values, np.float32)
    raw = values.tobytes() if dtype is F32 else (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return sums.Stored(memoryview(bytearray(offset) + raw)[offset:], dtype)


def models(count: int, kinds: Sequence[DType | None], *, scale: float = 1.0) -> list[sums.Stored | None]:
    generator = np.random.default_rng(count)
    drawn = [scale * generator.standard_normal(count, np.float32) for _ in kinds]
    return [None if kind is None else stored(values, kind) for values, kind in zip(drawn, kinds, strict=True)]


def expected(models: Sequence[sums.Stored | None]) -> list[float]:
    """In float64, but for the differences, which are taken in float32."""
    base, variant, onto, reference, reference_base = (
        None if m is None else as_floats(m.raw, m.dtype) * np.float32(m.factor) for m in models
    )
    assert base is not None
    assert variant is not None
    none = np.zeros_like(base)
    delta = (variant - base).astype(np.float64)
    other = none if reference is None or reference_base is None else reference - reference_base
    squared = (base, variant, delta, none if onto is None else onto, other)
    return [*(float(np.sum(v.astype(np.float64) ** 2)) for v in squared), float(delta @ other.astype(np.float64))]


def test_the_compiled_kernel_is_built_where_there_is_a_compiler() -> None:
    assert compiled.is_available() or shutil.which("cc") is None
    assert sums.is_read(stored(np.zeros(1), BF16)) == compiled.is_available()


@each_implementation
@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize(
    "kinds",
    [
        (BF16, BF16, None, None, None),
        (BF16, F32, None, None, None),
        (F32, F32, BF16, None, None),
        (BF16, BF16, F32, BF16, F32),
    ],
)
def test_sums_are_those_of_float64(implementation: Implementation, count: int, kinds: tuple[DType | None, ...]) -> None:
    given = models(count, kinds)
    wanted = expected(given)
    size = np.sqrt(wanted[2] * wanted[4])  # of which the last sum may be a small part
    found = implementation(given, count)
    assert found[:5] == pytest.approx(wanted[:5], rel=1e-6)
    assert found[5] == pytest.approx(wanted[5], abs=1e-6 * size)


@pytest.mark.parametrize("kinds", [(BF16, BF16, None, None, None), (BF16, F32, BF16, F32, BF16)])
def test_every_model_is_multiplied_by_its_scale(kinds: tuple[DType | None, ...]) -> None:
    given = [
        None if model is None else model._replace(factor=factor)
        for model, factor in zip(models(3001, kinds), (0.5, 3e-4, 7.0, 1.0, 0.1), strict=True)
    ]
    if compiled.is_available():
        wanted = expected(given)
        found = sums.side_by_side(given, 3001)
        assert found[:5] == pytest.approx(wanted[:5], rel=1e-6)
        assert found[5] == pytest.approx(wanted[5], abs=1e-6 * np.sqrt(wanted[2] * wanted[4]))


@each_implementation
@pytest.mark.parametrize("scale", [1e-36, 1e-22, 1e-17, 1e16, 1e24, 1e37])
def test_squares_that_leave_float32_are_added_up_all_the_same(implementation: Implementation, scale: float) -> None:
    given = models(3000, (BF16, BF16, F32, None, None), scale=scale)
    assert implementation(given, 3000)[:5] == pytest.approx(expected(given)[:5], rel=1e-6)


@each_implementation
def test_a_tiny_difference_of_large_models_is_not_lost(implementation: Implementation) -> None:
    base = np.zeros(8192, np.float32)
    base[::512] = 1
    tiny = np.where(base == 1, base, np.float32(1e-25))
    found = implementation([stored(values, F32) for values in (base, tiny, tiny, tiny, base)], 8192)
    wanted = (8192 - 16) * 1e-50
    assert found[2] == pytest.approx(wanted, rel=1e-6, abs=0)
    assert found[4:] == pytest.approx([wanted, wanted], rel=1e-6, abs=0)


@each_implementation
def test_a_tiny_reference_beside_a_large_difference_is_not_lost(implementation: Implementation) -> None:
    one, none = np.ones(8192, np.float32), np.zeros(8192, np.float32)
    tiny = np.full(8192, 1e-25, np.float32)
    found = implementation([stored(values, F32) for values in (one, 3 * one, one, tiny, none)], 8192)
    assert found[4] == pytest.approx(8192e-50, rel=1e-6, abs=0)


@each_implementation
@pytest.mark.parametrize("kind", [BF16, F32])
def test_what_is_equal_differs_by_exactly_nothing(implementation: Implementation, kind: DType) -> None:
    model = models(2500, (kind,))[0]
    found = implementation([model, model, None, None, None], 2500)
    assert found[2:] == [0, 0, 0, 0]
    assert found[0] == found[1] > 0


@each_implementation
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1023, 2047, 2500])
@pytest.mark.parametrize("of", range(5))
def test_what_is_not_finite_is_seen(implementation: Implementation, bad: float, place: int, of: int) -> None:
    drawn = [np.full(2501, 0.5, np.float32) for _ in range(5)]
    drawn[of][place] = bad
    given = [stored(values, BF16) for values in drawn]
    assert not np.isfinite(sum(implementation(given, 2501)))


def test_elements_may_lie_at_any_address() -> None:
    drawn = [np.random.default_rng(seed).standard_normal(1500, np.float32) for seed in (1, 2)]
    aligned = [*(stored(values, BF16) for values in drawn), None, None, None]
    for offset in (1, 2, 3, 5):
        moved = [*(stored(values, BF16, offset=offset) for values in drawn), None, None, None]
        if compiled.is_available():
            assert sums.side_by_side(moved, 1500) == sums.side_by_side(aligned, 1500)


def test_too_few_bytes_are_refused() -> None:
    if compiled.is_available():
        with pytest.raises(ValueError, match="model 1 has 20 bytes"):
            compiled.sums([(memoryview(bytes(size)), compiled.BFLOAT16, 1.0) for size in (22, 20)], 11)


def test_without_the_library_a_comparison_takes_float32_only(monkeypatch: pytest.MonkeyPatch) -> None:
    given = models(2000, (F32, F32, None, None, None))
    before = sums.side_by_side(given, 2000)
    monkeypatch.setattr(compiled, "is_available", lambda: False)
    assert not sums.is_read(stored(np.zeros(1), BF16))
    assert sums.is_read(stored(np.zeros(1), F32))
    assert not sums.is_read(stored(np.zeros(1), F32)._replace(factor=0.5))
    assert sums.side_by_side(given, 2000) == pytest.approx(before, rel=1e-6)
