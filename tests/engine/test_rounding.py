"""How a merge rounds, and what it says of its delta, on real files, against the oracle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mergetool.checkpoint import dtypes
from mergetool.checkpoint.dtypes import DType
from mergetool.checkpoint.reader import Checkpoint
from mergetool.engine import job, jobs
from mergetool.engine.runs import Measure, Outcome
from mergetool.errors import NonFiniteError
from mergetool.ops.cpu import CpuOps
from mergetool.ops.movement import Movement
from mergetool.ops.rounding import MODES, ErrorFeedback, Nearest, Rounding, Stochastic, stream_key
from mergetool.options.merging import MergeOptions
from tests.families import checkpoint
from tests.ops import oracle

MERGE = "'alk.safetensors' + 2*('a.safetensors' - 'b.safetensors')"
FUSED = "layers.1.attention.qkv.weight"


def run(
    output: Path, text: str = MERGE, threads: int | None = None, measure: Measure = "sample", **options: object
) -> Outcome:
    with job.open_merge(text, MergeOptions(**options)) as plan:  # type: ignore[arg-type]
        return job.run_merge(plan, output, threads=threads, measure=measure)


def elements(path: Path, name: str) -> np.ndarray:
    with Checkpoint.open(path) as opened:
        return oracle.decode(opened.read(name), opened.tensors[name].dtype).astype(np.float32)


def stored(path: Path, name: str) -> bytes:
    with Checkpoint.open(path) as opened:
        return opened.read(name)


def results(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The merge of one tensor before rounding, and the anchor's elements, both float32."""
    alk, a, b = (elements(folder / f"{model}.safetensors", name) for model in ("alk", "a", "b"))
    return alk + np.float32(2) * (a - b), alk


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with Checkpoint.open(path) as opened:
        return {name: info.shape for name, info in opened.tensors.items()}


def expected(rounding: str, seed: int, name: str, shape: tuple[int, ...]) -> Rounding:
    if rounding == "stochastic":
        return Stochastic(stream_key(seed, name), 0)
    return ErrorFeedback(shape[-1]) if rounding == "error-feedback" else Nearest()


@pytest.mark.parametrize("dtype", [dtypes.BF16, dtypes.F16, dtypes.F8_E4M3, dtypes.F8_E5M2], ids=lambda d: d.name)
@pytest.mark.parametrize(("rounding", "seed"), [("nearest", 0), ("stochastic", 41), ("error-feedback", 0)])
def test_every_tensor_is_rounded_as_the_oracle_rounds_it(family: Path, rounding: str, seed: int, dtype: DType) -> None:
    run(family / "out.safetensors", rounding=rounding, seed=seed, dtype=dtype)
    for name in (FUSED, "layers.0.feed_forward.w2.weight", "layers.0.attention_norm1.weight", "x_pad_token"):
        result, _ = results(family, name)
        how = expected(rounding, seed, name, shapes(family / "alk.safetensors")[name])
        assert stored(family / "out.safetensors", name) == oracle.store(result, dtype, how), name


@pytest.mark.parametrize("rounding", MODES)
def test_bytes_and_figures_do_not_depend_on_the_number_of_threads(family: Path, rounding: str) -> None:
    outcomes = [run(family / f"{n}.safetensors", threads=n, rounding=rounding) for n in (1, 2, 4)]
    files = {(family / f"{n}.safetensors").read_bytes() for n in (1, 2, 4)}
    assert len(files) == 1
    assert outcomes[0].movements == outcomes[1].movements == outcomes[2].movements


@pytest.mark.parametrize("rounding", MODES)
def test_bytes_and_counts_do_not_depend_on_the_chunks(
    family: Path, rounding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(family / "whole.safetensors", rounding=rounding)
    monkeypatch.setattr(jobs, "CHUNK", 1000)
    monkeypatch.setattr(jobs, "ROWS_CHUNK", 500)
    parts = run(family / "parts.safetensors", measure="all", rounding=rounding)
    assert (family / "parts.safetensors").read_bytes() == (family / "whole.safetensors").read_bytes()
    assert parts.movements.total.eaten == whole.movements.total.eaten
    assert parts.movements.total.projection == pytest.approx(whole.movements.total.projection, rel=1e-6)


def test_a_sample_is_the_first_of_every_eight_chunks(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "CHUNK", 100)
    sampled, everything, nothing = (
        run(family / f"{measure}.safetensors", measure=measure).movements for measure in ("sample", "all", "off")
    )
    result, first = results(family, FUSED)
    third = first.size // 3  # q, k and v are parts of their own
    looked_at = np.arange(first.size) % third // 100 % 8 == 0
    moved = (result.reshape(-1) != first.reshape(-1)) & looked_at
    assert sampled.tensors()[FUSED].moved == moved.sum()
    assert sampled.sampled
    assert everything.tensors()[FUSED].moved == (result != first).sum()
    assert not everything.sampled
    assert nothing.parts == {}
    assert len({(family / f"{measure}.safetensors").read_bytes() for measure in ("sample", "all", "off")}) == 1


def test_another_seed_draws_other_numbers(family: Path) -> None:
    for seed in (0, 1):
        run(family / f"{seed}.safetensors", rounding="stochastic", seed=seed)
    one, other = (stored(family / f"{seed}.safetensors", FUSED) for seed in (0, 1))
    assert one != other


def test_two_tensors_draw_different_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    same = np.linspace(-1, 1, 5000, dtype=np.float32)
    save_file({"x.weight": same, "y.weight": same}, "model.safetensors")
    run(tmp_path / "out.safetensors", "1*'model.safetensors'", rounding="stochastic", dtype=dtypes.BF16)
    assert stored(tmp_path / "out.safetensors", "x.weight") != stored(tmp_path / "out.safetensors", "y.weight")


def test_parts_of_a_fused_vector_pass_no_error_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v of a fused bias are a row each, so that the bytes are those of split ones."""
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "x.safetensors", dtype=dtypes.F32)
    name = "layers.1.attention.qkv.bias"
    bias = np.random.default_rng(0).standard_normal(192).astype(np.float32)
    save_file({**load_file("x.safetensors"), name: bias}, "x.safetensors")
    run(tmp_path / "out.safetensors", "1*'x.safetensors'", rounding="error-feedback", dtype=dtypes.BF16)
    found = stored(tmp_path / "out.safetensors", name)
    assert found == oracle.store(bias, dtypes.BF16, ErrorFeedback(64))
    assert found != oracle.store(bias, dtypes.BF16, ErrorFeedback(192))


@pytest.mark.parametrize("dtype", [None, dtypes.F8_E4M3], ids=str)
@pytest.mark.parametrize("rounding", MODES)
def test_figures_of_every_tensor_are_the_oracles(family: Path, rounding: str, dtype: DType | None) -> None:
    outcome = run(family / "out.safetensors", rounding=rounding, dtype=dtype, protect=("refiner",))
    found = outcome.movements.tensors()
    assert set(found) == {name for name in shapes(family / "alk.safetensors") if "refiner" not in name}
    for name, movement in found.items():
        wanted = oracle.measure(*results(family, name), stored(family / "out.safetensors", name), dtype or dtypes.BF16)
        assert_equal(movement, wanted)


def test_a_group_is_the_sum_of_its_parts(family: Path) -> None:
    with job.open_merge(MERGE, MergeOptions(protect=("refiner",))) as plan:
        outcome = job.run_merge(plan, family / "out.safetensors")
        groups = outcome.movements.groups(plan)
    assert "refiner" not in groups
    result, first = results(family, FUSED)
    raw = stored(family / "out.safetensors", FUSED)
    third, whole = len(first) // 3, 2
    wanted = [oracle.measure(result[:third], first[:third], raw[: whole * third], dtypes.BF16)]
    result, first = results(family, "layers.0.attention.qkv.weight")
    raw = stored(family / "out.safetensors", "layers.0.attention.qkv.weight")
    wanted.append(oracle.measure(result[:third], first[:third], raw[: whole * third], dtypes.BF16))
    assert_equal(groups["q"], Movement.total(wanted))
    assert groups["q"].moved + groups["k"].moved + groups["v"].moved < groups["attention"].moved


@pytest.mark.parametrize("rounding", MODES)
def test_a_finite_value_that_bf16_cannot_hold_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounding: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"x.weight": np.array([1, 3.4e38], np.float32)}, "model.safetensors")
    with pytest.raises(NonFiniteError, match=r"1 of 2 elements are beyond bf16's largest value 3\.38953e"):
        run(tmp_path / "out.safetensors", "1*'model.safetensors'", rounding=rounding, dtype=dtypes.BF16)


def test_a_model_with_itself_moves_nothing(family: Path) -> None:
    total = run(family / "out.safetensors", "1*'alk.safetensors'").movements.total
    assert (total.moved, total.projection) == (0, 1.0)


def assert_equal(found: Movement, wanted: Movement) -> None:
    assert (found.moved, found.eaten, found.below_half_ulp) == (wanted.moved, wanted.eaten, wanted.below_half_ulp)
    assert found.delta_energy == pytest.approx(wanted.delta_energy, rel=1e-6)
    assert found.kept_energy == pytest.approx(wanted.kept_energy, rel=1e-6, abs=1e-6 * wanted.delta_energy)


def test_one_element_at_fp8s_end_is_rounded_stochastically_with_the_others() -> None:
    """Torch has no masked fill for FP8: the largest element of every scaled weight is at the end."""
    ops = CpuOps(capacity=64, registers=1)
    ops.room(0, 64)[:] = np.linspace(-1, 448, 64, dtype=np.float32)
    stored, _ = ops.store(0, dtypes.F8_E4M3, Stochastic(1, 0))
    assert oracle.decode(bytes(stored), dtypes.F8_E4M3)[-1] == 448
