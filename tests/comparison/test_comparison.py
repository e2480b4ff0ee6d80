"""A comparison's figures against numpy in float64, and its rounding against the merge that it speaks of."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergetool.checkpoint import dtypes
from mergetool.checkpoint.dtypes import F32
from mergetool.comparison import comparison as comparing
from mergetool.comparison.comparison import Report
from mergetool.engine import job
from mergetool.errors import FamilyError, NonFiniteError, PatternError, UsageError
from mergetool.options.comparing import RECOMMENDED
from mergetool.options.merging import MergeOptions
from tests.families import checkpoint
from tests.quant.models import quantised

SMALLER = 171.1
COSINE = 0.3


def compared(base: Path, variant: Path, **options: object) -> Report:
    asked = {name: str(path) for name, path in options.items() if isinstance(path, Path)}
    opening = {**asked, **{name: options[name] for name in ("options",) if name in options}}
    running = {k: v for k, v in options.items() if k not in opening}
    with comparing.open_comparison(str(base), str(variant), **opening) as opened:  # type: ignore[arg-type]
        return comparing.compare(opened, **running)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a reference 5 % away, and a variant whose difference is 171.1 times smaller and at a cosine of 0.3 to it; another base."""
    folder = tmp_path_factory.mktemp("planted")
    base = load_file(checkpoint(folder / "base.safetensors", dtype=F32))
    random = np.random.default_rng(5)
    reference, variant = {}, {}
    for name, tensor in base.items():
        along, across = (random.standard_normal(tensor.shape) for _ in range(2))
        across -= along * (np.sum(along * across) / np.sum(along * along))
        size = 0.05 * float(tensor.double().norm()) or 1.0
        along, across = (size * each / np.linalg.norm(each) for each in (along, across))
        delta = (COSINE * along + (1 - COSINE**2) ** 0.5 * across) / SMALLER
        reference[name] = (tensor.double() + torch.from_numpy(along)).float()
        variant[name] = (tensor.double() + torch.from_numpy(delta)).float()
    save_file(reference, folder / "reference.safetensors")
    save_file(variant, folder / "variant.safetensors")
    checkpoint(folder / "onto.safetensors", variant=4, layout="diffusers")
    return folder


def test_a_difference_171_times_too_small_is_told_so_overall_and_in_every_group(planted: Path) -> None:
    found = compared(
        planted / "base.safetensors", planted / "variant.safetensors", reference=planted / "reference.safetensors"
    )
    assert found.total.to_reference == pytest.approx(SMALLER, rel=0.01)
    assert float(found.recommended or 0) == pytest.approx(SMALLER, rel=0.01)
    for group, energies in found.groups().items():
        assert energies.to_reference == pytest.approx(SMALLER, rel=0.01), group
        assert energies.cosine == pytest.approx(COSINE, abs=0.03), group  # planted in stored tensors: q, k and v vary


def test_the_other_multiplier_makes_the_wanted_change_of_the_model_it_is_added_to(planted: Path) -> None:
    found = compared(
        planted / "base.safetensors", planted / "variant.safetensors", onto=planted / "onto.safetensors", target=0.004
    )
    onto = load_file(planted / "onto.safetensors")
    norm = sum(float(t.double().square().sum()) for name, t in onto.items() if "refiner" not in name) ** 0.5
    base, variant = (load_file(planted / f"{name}.safetensors") for name in ("base", "variant"))
    delta = (
        sum(float((variant[n].double() - base[n].double()).square().sum()) for n in base if "refiner" not in n) ** 0.5
    )
    assert found.total.to_change(0.004) == pytest.approx(0.004 * norm / delta, rel=1e-5)
    assert found.recommended == Fraction(f"{0.004 * norm / delta:.4g}")


def test_norms_and_cosines_of_every_part_are_numpys(planted: Path) -> None:
    names = ("base", "variant", "reference")
    base, variant, reference = (
        {n: t.double().numpy() for n, t in load_file(planted / f"{name}.safetensors").items()} for name in names
    )
    found = compared(
        planted / "base.safetensors", planted / "variant.safetensors", reference=planted / "reference.safetensors"
    )
    whole = [one for one in found.distances if one.name in base]
    assert len(whole) > 30
    for one in whole:
        delta, other = variant[one.name] - base[one.name], reference[one.name] - base[one.name]
        assert one.energies.base == pytest.approx(np.sum(base[one.name] ** 2), rel=2e-6)
        assert one.energies.variant == pytest.approx(np.sum(variant[one.name] ** 2), rel=2e-6)
        assert one.energies.delta == pytest.approx(np.sum(delta**2), rel=1e-4)  # float32 files hold this delta to 1e-5
        assert one.energies.reference == pytest.approx(np.sum(other**2), rel=2e-6)
        assert one.energies.shared == pytest.approx(np.sum(delta * other), abs=1e-4 * np.sum(delta**2) ** 0.5)


def test_a_reference_may_have_a_base_of_its_own(planted: Path) -> None:
    found = compared(
        planted / "variant.safetensors",
        planted / "reference.safetensors",
        reference=planted / "reference.safetensors",
        reference_base=planted / "base.safetensors",
    )
    assert found.total.cosine == pytest.approx(1, abs=0.01)
    assert found.reference == (str(planted / "reference.safetensors"), str(planted / "base.safetensors"))


def test_refiners_are_measured_and_count_in_no_total_unless_they_are_included(planted: Path) -> None:
    plain = compared(planted / "base.safetensors", planted / "variant.safetensors")
    every = compared(
        planted / "base.safetensors", planted / "variant.safetensors", options=MergeOptions(include=("*",))
    )
    assert plain.is_excluded("refiner")
    assert not every.is_excluded("refiner")
    assert plain.groups()["refiner"] == every.groups()["refiner"]
    assert every.total.elements == plain.total.elements + plain.groups()["refiner"].elements
    assert every.total.elements == sum(t.numel() for t in load_file(planted / "base.safetensors").values())


# --- what a merge loses to rounding --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of unknown architecture with a tensor of eleven chunks, of which a merge measures two, and a third to add to."""
    folder = tmp_path_factory.mktemp("large")
    random = np.random.default_rng(7)
    wide = torch.from_numpy(random.standard_normal((2816, 2048), np.float32) * 0.02)
    moves = torch.from_numpy(random.standard_normal((2816, 2048), np.float32) * 0.0001)
    small = torch.from_numpy(random.standard_normal((64, 32), np.float32))
    for name, share in (("base", 0.0), ("variant", 1.0), ("onto", 13.0)):
        stored = {"wide.weight": (wide + share * moves).bfloat16(), "small.weight": (small + 0.01 * share).bfloat16()}
        save_file(stored, folder / f"{name}.safetensors")
    return folder


def merged(report: Report, out: Path) -> job.Outcome:
    with job.open_merge(report.expression, report.options) as plan:
        outcome = job.run_merge(plan, out, threads=1)
        assert report.rounding == outcome.movements.groups(plan)
        return outcome


@pytest.mark.parametrize("multiplier", [Fraction(1), Fraction(-1, 3), RECOMMENDED])
def test_what_rounding_loses_is_exactly_what_the_merge_reports(
    large: Path, tmp_path: Path, multiplier: Fraction | str
) -> None:
    found = compared(
        large / "base.safetensors",
        large / "variant.safetensors",
        onto=large / "onto.safetensors",
        multiplier=multiplier,
    )
    outcome = merged(found, tmp_path / "out.safetensors")
    assert found.lost == outcome.movements.total
    assert found.sampled
    assert outcome.movements.sampled
    assert 0 < found.lost.moved < 1_200_000  # of 5.8 M
    assert found.lost.kept_energy != found.lost.delta_energy
    assert (found.lost.eaten > 0) == (multiplier != RECOMMENDED)
    if multiplier == RECOMMENDED:
        assert found.multiplier == found.recommended


@pytest.mark.parametrize("dtype", ["fp16", "fp8_e4m3"])
def test_it_is_that_of_another_output_dtype_and_of_the_parts_that_are_included(
    planted: Path, tmp_path: Path, dtype: str
) -> None:
    options = MergeOptions(include=("attention", "norm"), dtype=dtypes.output_dtype(dtype))
    found = compared(
        planted / "base.safetensors", planted / "variant.safetensors", options=options, multiplier=Fraction("20.5")
    )
    assert found.dtype == dtype
    assert found.lost == merged(found, tmp_path / "out.safetensors").movements.total
    assert found.lost.moved > 0


def test_quantised_models_are_compared_by_their_values(planted: Path, tmp_path: Path) -> None:
    values = quantised(tmp_path / "q.safetensors", planted / "variant.safetensors", "int8")
    base = load_file(planted / "base.safetensors")
    found = compared(planted / "base.safetensors", tmp_path / "q.safetensors", multiplier=Fraction(3))
    wanted = {n: float(np.sum((values[n].astype(np.float64) - base[n].double().numpy()) ** 2)) for n in base}
    kept = [name for name in base if "refiner" not in name]
    assert found.total.delta == pytest.approx(sum(wanted[name] for name in kept), rel=1e-5)
    assert found.lost == merged(found, tmp_path / "out.safetensors").movements.total


# --- which files ---------------------------------------------------------------------------------------------


def test_layout_shards_threads_and_reader_change_no_figure(tmp_path: Path) -> None:
    plain = checkpoint(tmp_path / "plain.safetensors")
    comfyui = checkpoint(tmp_path / "a.safetensors", variant=1)
    diffusers = checkpoint(tmp_path / "b", variant=1, layout="diffusers", shard_size=2_000_000)
    one = compared(plain, comfyui, threads=1, reader="mmap")
    other = compared(plain, diffusers, threads=3, reader="pread")
    assert one.distances == other.distances
    assert one.lost == other.lost


def test_what_only_one_model_has_is_named(planted: Path, tmp_path: Path) -> None:
    stored = load_file(planted / "variant.safetensors")
    del stored["layers.0.ffn_norm1.weight"]
    save_file(stored, tmp_path / "less.safetensors")
    found = compared(planted / "base.safetensors", tmp_path / "less.safetensors")
    assert [name for name, _ in found.left_out] == ["layers.0.ffn_norm1.weight"]
    assert "less.safetensors" in found.left_out[0][1]


def test_nan_is_refused_by_model_and_tensor(planted: Path, tmp_path: Path) -> None:
    stored = load_file(planted / "variant.safetensors")
    stored["layers.1.feed_forward.w2.weight"][3, 4] = float("nan")
    save_file(stored, tmp_path / "bad.safetensors")
    place = rf"bad\.safetensors: tensor \"layers\.1\.feed_forward\.w2\.weight\".*element {3 * stored['layers.1.feed_forward.w2.weight'].shape[1] + 4}\)"
    with pytest.raises(NonFiniteError, match=place):
        compared(planted / "base.safetensors", tmp_path / "bad.safetensors")
    options = MergeOptions(exclude=("layers.1",))
    assert compared(planted / "base.safetensors", tmp_path / "bad.safetensors", options=options).total.delta > 0


def test_what_differs_nowhere_has_no_recommended_multiplier(planted: Path, tmp_path: Path) -> None:
    (tmp_path / "same.safetensors").write_bytes((planted / "base.safetensors").read_bytes())
    found = compared(planted / "base.safetensors", tmp_path / "same.safetensors", multiplier=RECOMMENDED)
    assert found.total.distance == 0
    assert found.recommended is None
    assert found.lost.moved == 0


def test_values_whose_squares_leave_float32_are_measured(tmp_path: Path) -> None:
    for name, share in (("a", 1.0), ("b", 3.0)):
        stored = {"tiny.weight": torch.full((4, 9), share * 1e-30), "huge.weight": torch.full((4, 9), share * 1e30)}
        save_file(stored, tmp_path / f"{name}.safetensors")
    found = {
        one.name: one.energies for one in compared(tmp_path / "a.safetensors", tmp_path / "b.safetensors").distances
    }
    assert found["tiny.weight"].distance == pytest.approx(2)
    assert found["huge.weight"].distance == pytest.approx(2)


def test_requests_that_make_no_sense_are_refused(planted: Path, large: Path) -> None:
    base, variant = planted / "base.safetensors", planted / "variant.safetensors"
    with pytest.raises(UsageError, match="name two different models"):
        compared(base, base)
    with pytest.raises(UsageError, match="`reference_base`"):
        compared(base, variant, reference=base)
    with pytest.raises(UsageError, match="no `reference` to be subtracted from"):
        compared(base, variant, reference_base=base)
    with pytest.raises(UsageError, match="other than 0"):
        compared(base, variant, multiplier=Fraction(0))
    with pytest.raises(FamilyError, match="different families"):
        compared(base, large / "base.safetensors")
    with pytest.raises(PatternError, match="layerz"):
        compared(base, variant, options=MergeOptions(exclude=("layerz",)))


def test_torch_has_its_threads_back_afterwards(tmp_path: Path) -> None:
    """Values in float64 are widened by torch, one thread of it in each of the comparison's own."""
    for variant, name in enumerate(("a", "b")):
        values = load_file(checkpoint(tmp_path / f"{name}.safetensors", variant=variant))
        save_file({key: value.double() for key, value in values.items()}, tmp_path / f"{name}.safetensors")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        compared(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 3
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
