"""The ranks of a budget: against every other choice of ranks where they can all be tried, and in real files."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from mergetool.checkpoint.dtypes import BF16, F32, DType
from mergetool.checkpoint.reader import Checkpoint
from mergetool.difference import budget as budgets
from mergetool.difference import ranks
from mergetool.difference.budget import Spectrum, file_size, ranks_for
from mergetool.difference.extract import Extraction, extract, open_diff
from mergetool.errors import UsageError
from mergetool.options.differences import DiffOptions
from tests.difference.test_extract import delta
from tests.families import checkpoint
from tests.lowrank.contract import Float64

METADATA = {"format": "pt", "mergetool.diff": "{}"}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base (ComfyUI, bf16) and variant (diffusers shards, fp32), their difference larger in some matrices than in others."""
    folder = tmp_path_factory.mktemp("family")
    checkpoint(folder / "base.safetensors", variant=0, uneven=2)
    checkpoint(folder / "variant", variant=1, layout="diffusers", dtype=F32, shard_size=10_000_000, uneven=2)
    return folder


def diff(folder: Path, output: Path, spectra: Path | None = None, **options: object) -> Extraction:
    chosen = DiffOptions(**{"rank_max": 0, "spectra": spectra, **options})  # type: ignore[arg-type]
    with open_diff(str(folder / "base.safetensors"), str(folder / "variant"), chosen) as pairing:
        return extract(pairing, output, chosen)


def spectrum(name: str, m: int, n: int, energies: Sequence[float]) -> Spectrum:
    return Spectrum(f"{name}.lora_A.weight", f"{name}.lora_B.weight", (m, n), np.array(energies))


def random_spectra(seed: int) -> list[Spectrum]:
    rng = np.random.default_rng(seed)
    return [
        spectrum(f"layers.{i}", m, n, sorted(rng.exponential(10.0 ** rng.integers(-1, 3), 4), reverse=True))
        for i, (m, n) in enumerate([(300, 200), (100, 500), (800, 120), (90, 70)])
    ]


def kept(spectra: Sequence[Spectrum], ranks: Sequence[int]) -> float:
    return sum(float(one.energies[:rank].sum()) for one, rank in zip(spectra, ranks, strict=True))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_no_other_choice_of_ranks_of_that_size_keeps_more(seed: int, dtype: DType) -> None:
    """Every choice is tried; the best may be better by less than one direction, whose rest of the file is too small for it."""
    spectra = random_spectra(seed)
    every = [
        (file_size(spectra, ranks, dtype, METADATA), kept(spectra, ranks))
        for ranks in itertools.product(range(5), repeat=4)
    ]
    exact = 0
    for budget in (2500, 5000, 7777, 12_000, 20_000):
        ranks = ranks_for(spectra, budget, dtype, METADATA)
        ours, size = kept(spectra, ranks), file_size(spectra, ranks, dtype, METADATA)
        assert size <= budget
        best = max(energy for other, energy in every if other <= budget)
        exact += ours == pytest.approx(best)
        # At the size of this very file nothing beats it by more than alignment and names, 192 bytes, can hold.
        rate = max(energy / one.cost(dtype) for one in spectra for energy in one.energies)
        assert max(energy for other, energy in every if other <= size) <= ours + 192 * rate
    assert exact >= 2


def test_a_small_matrix_is_cheaper_by_the_byte() -> None:
    spectra = [spectrum("large", 4000, 4000, [4.0, 4.0]), spectrum("small", 400, 400, [3.0, 3.0])]
    budget = file_size(spectra, [1, 2], BF16, METADATA)
    assert ranks_for(spectra, budget, BF16, METADATA) == [1, 2]
    assert ranks_for(spectra, budget - 64, BF16, METADATA) == [0, 2]


def test_what_is_too_large_for_the_rest_makes_way_for_what_is_not() -> None:
    spectra = [spectrum("large", 4000, 4000, [9.0, 8.0]), spectrum("small", 100, 100, [0.1, 0.1])]
    budget = file_size(spectra, [1, 2], BF16, METADATA)
    assert ranks_for(spectra, budget, BF16, METADATA) == [1, 2]


def test_names_in_the_header_are_paid_for_by_the_first_direction() -> None:
    # By energy a byte of the factors alone the tiny matrix comes first, and its names take the room of a direction.
    spectra = [spectrum("tiny", 2, 2, [1.0]), spectrum("plain", 60, 60, [12.0, 11.0])]
    budget = file_size(spectra, [0, 2], BF16, METADATA)
    assert file_size(spectra, [1, 1], BF16, METADATA) <= budget
    assert ranks_for(spectra, budget, BF16, METADATA) == [0, 2]


def test_a_budget_for_nothing_is_refused_and_says_what_is_needed() -> None:
    spectra = [spectrum("w", 400, 400, [3.0])]
    least = file_size(spectra, [1], BF16, METADATA)
    assert ranks_for(spectra, least, BF16, METADATA) == [1]
    with pytest.raises(UsageError, match=str(least)):
        ranks_for(spectra, least - 1, BF16, METADATA)


# Real files


def energies_of(folder: Path, found: Extraction) -> dict[str, Float64]:
    return {one.name: np.linalg.svd(delta(folder, one.name), compute_uv=False) ** 2 for one in found.layers}


def test_ranks_of_a_file_are_those_of_the_whole_spectra(family: Path, tmp_path: Path) -> None:
    """Every kept direction is worth more a byte than every one that is not, by numpy's singular values."""
    found = diff(family, tmp_path / "lora.safetensors", budget=80_000)
    exact = energies_of(family, found)
    costs = {one.name: sum(one.shape) * 2 for one in found.layers}
    worst = min(exact[one.name][one.rank - 1] / costs[one.name] for one in found.layers if one.rank)
    best = max(exact[one.name][one.rank] / costs[one.name] for one in found.layers if one.rank)
    assert len({one.rank for one in found.layers}) > 2
    assert worst > best * 0.99
    for one in found.layers:
        assert one.energy == pytest.approx(exact[one.name][: one.rank].sum() / exact[one.name].sum(), abs=1e-4)


@pytest.mark.parametrize("budget", [9_000, 20_001, 50_000, 77_777, 150_000, 400_000])
def test_the_file_is_never_above_the_budget_and_less_than_a_direction_below(
    family: Path, tmp_path: Path, budget: int
) -> None:
    found = diff(family, tmp_path / "lora.safetensors", budget=budget)
    size = (tmp_path / "lora.safetensors").stat().st_size
    largest = max(2 * sum(one.shape) for one in found.layers)
    assert budget - largest - 320 < size <= budget


def test_a_budget_beats_every_fixed_rank_and_threshold_of_its_size(family: Path, tmp_path: Path) -> None:
    def residual(found: Extraction) -> float:
        return sum(one.residual**2 * one.total for one in found.layers)

    others = [{"rank": 1}, {"rank": 3}, {"rank": 9}, {"rank_thresh": 0.5}, {"rank_thresh": 0.9}, {"rank_thresh": 0.98}]
    for i, options in enumerate(others):
        plain = diff(family, tmp_path / f"{i}.safetensors", **options)
        size = (tmp_path / f"{i}.safetensors").stat().st_size
        best = diff(family, tmp_path / f"{i}-budget.safetensors", budget=size)
        assert (tmp_path / f"{i}-budget.safetensors").stat().st_size <= size
        assert residual(best) < residual(plain), options


def test_matrices_that_want_more_than_the_first_guess_are_searched_again(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = diff(family, tmp_path / "expected.safetensors", budget=80_000)
    searched: list[int] = []
    find = ranks.find

    def counted(name: str, *rest: object) -> object:
        searched.append(int(rest[-1]))  # type: ignore[call-overload]
        return find(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(ranks, "find", counted)
    monkeypatch.setattr(budgets, "LEAST", 1)
    monkeypatch.setattr(budgets, "FIRST_GUESS", 0.01)
    found = diff(family, tmp_path / "lora.safetensors", budget=80_000)
    assert {1, 2, 4} < set(searched)
    assert [(one.name, one.rank) for one in found.layers] == [(one.name, one.rank) for one in expected.layers]


def test_a_matrix_without_directions_is_counted_and_not_stored(family: Path, tmp_path: Path) -> None:
    found = diff(family, tmp_path / "lora.safetensors", budget=9_000)
    empty = [one for one in found.layers if one.rank == 0]
    stored = load_file(tmp_path / "lora.safetensors")
    assert empty
    assert len(stored) == 2 * (len(found.layers) - len(empty))
    for one in empty:
        assert (one.energy, one.residual) == (0.0, 1.0)
        assert one.total == pytest.approx((delta(family, one.name) ** 2).sum(), rel=1e-5)
        assert not any(one.name.removesuffix(".weight") in key for key in stored)


def test_a_cap_limits_every_matrix_of_a_budget(family: Path, tmp_path: Path) -> None:
    free = diff(family, tmp_path / "free.safetensors", budget=60_000)
    found = diff(family, tmp_path / "lora.safetensors", budget=60_000, rank_max=4)
    assert max(one.rank for one in free.layers) > 4
    assert max(one.rank for one in found.layers) == 4
    assert {one.rank for one in found.layers if one.capped} == {4}


def test_a_budget_for_everything_keeps_everything(family: Path, tmp_path: Path) -> None:
    found = diff(family, tmp_path / "lora.safetensors", budget=100_000_000, dtype=F32)
    assert all(one.residual < 1e-5 for one in found.layers)


def test_excluded_and_unchanged_are_accounted_for_as_without_a_budget(family: Path, tmp_path: Path) -> None:
    plain = diff(family, tmp_path / "plain.safetensors", exclude=("refiner",))
    found = diff(family, tmp_path / "lora.safetensors", exclude=("refiner",), budget=50_000)
    assert found.skipped == plain.skipped
    assert [one.name for one in found.layers] == [one.name for one in plain.layers]
    assert found.total == pytest.approx(plain.total)


def test_the_recipe_says_the_budget(family: Path, tmp_path: Path) -> None:
    diff(family, tmp_path / "lora.safetensors", budget=50_000)
    with Checkpoint.open(tmp_path / "lora.safetensors") as opened:
        recipe = json.loads(opened.metadata["mergetool.diff"])
    assert (recipe["budget"], recipe["rank_max"], recipe.get("rank_thresh")) == (50_000, 0, None)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_budgets_bytes_do_not_depend_on_threads(family: Path, tmp_path: Path, threads: int) -> None:
    options = DiffOptions(budget=50_000, rank_max=0)
    diff(family, tmp_path / "reference.safetensors", budget=50_000)
    with open_diff(str(family / "base.safetensors"), str(family / "variant"), options) as pairing:
        extract(pairing, tmp_path / "lora.safetensors", options, threads=threads)
    assert (tmp_path / "lora.safetensors").read_bytes() == (tmp_path / "reference.safetensors").read_bytes()
