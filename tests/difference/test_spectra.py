"""The side file of an extraction: what it saves, what it refuses, and that the output does not depend on it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergetool.checkpoint.dtypes import F32
from mergetool.difference.extract import Extraction, extract, on_the_cpu, open_diff
from mergetool.errors import DataError, OutputError, UsageError
from mergetool.lowrank import svd
from mergetool.options.differences import DiffOptions
from tests.difference.test_extract import delta
from tests.families import checkpoint

NAME = "layers.0.feed_forward.w1.weight"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base (ComfyUI, bf16) and variant (diffusers shards, fp32), their difference larger in some matrices than in others."""
    folder = tmp_path_factory.mktemp("family")
    checkpoint(folder / "base.safetensors", variant=0, uneven=2)
    checkpoint(folder / "variant", variant=1, layout="diffusers", dtype=F32, shard_size=10_000_000, uneven=2)
    return folder


@pytest.fixture(scope="module")
def side(family: Path) -> Path:
    """A side file of at most 12 directions a matrix."""
    diff(family, family / "first.safetensors", family / "side.safetensors", rank_thresh=0.9, rank_max=12)
    return family / "side.safetensors"


def diff(folder: Path, output: Path, spectra: Path | None, **options: object) -> Extraction:
    chosen = DiffOptions(spectra=spectra, **options)  # type: ignore[arg-type]
    with open_diff(str(folder / "base.safetensors"), str(folder / "variant"), chosen) as pairing:
        return extract(pairing, output, chosen, overwrite=True)


@pytest.fixture
def no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Search", "strongest_above", "whole_spectrum", "spectrum"):
        monkeypatch.setattr(svd, name, lambda *_: pytest.fail("a matrix was decomposed again"))


CHOICES: list[dict[str, object]] = [
    {"rank_thresh": 0.5, "rank_max": 12},
    {"rank_thresh": 0.97, "rank_max": 12},
    {"rule": "fro", "rank_thresh": 0.8, "rank_max": 12},
    {"rule": "ratio", "rank_thresh": 0.6, "rank_max": 12},
    {"rank": 3},
    {"rank": 12},
    {"budget": 40_000, "rank_max": 12},
    {"budget": 15_000, "rank_max": 0},
]


@pytest.mark.parametrize("options", CHOICES)
@pytest.mark.usefixtures("no_search")
def test_any_choice_below_what_was_found_needs_no_search(
    family: Path, side: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    found = diff(family, tmp_path / "lora.safetensors", side, **options)
    assert found.searched == []
    assert found.layers


@pytest.mark.parametrize("options", CHOICES)
def test_the_choice_is_that_of_a_run_without_a_side_file(
    family: Path, side: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    plain = diff(family, tmp_path / "plain.safetensors", None, **options)
    found = diff(family, tmp_path / "lora.safetensors", side, **options)
    assert [(one.name, one.rank, one.capped) for one in found.layers] == [
        (one.name, one.rank, one.capped) for one in plain.layers
    ]
    for one, other in zip(found.layers, plain.layers, strict=True):  # what is kept may be better: more was looked for
        assert other.energy - 1e-5 < one.energy < other.energy + 1e-3
        assert one.residual < other.residual + 5e-5
    assert found.skipped == plain.skipped


def test_the_run_that_makes_the_side_file_gives_the_bytes_of_those_that_use_it(family: Path, tmp_path: Path) -> None:
    options = {"rank_thresh": 0.9, "rank_max": 20}
    for name in ("one", "two"):
        found = diff(family, tmp_path / f"{name}.safetensors", tmp_path / "side.safetensors", **options)
        assert bool(found.searched) == (name == "one")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_values_are_the_singular_values_and_rows_span_their_directions(family: Path, side: Path) -> None:
    tensors = load_file(side)
    truth = delta(family, NAME)
    exact = np.linalg.svd(truth, compute_uv=False)
    np.testing.assert_allclose(tensors[f"{NAME}.values"], exact[:12], rtol=1e-3)
    rows = tensors[f"{NAME}.rows"]
    assert (rows.dtype, rows.shape) == (torch.bfloat16, (12, min(truth.shape)))
    basis = np.linalg.qr(rows.double().numpy().T)[0]
    inside = truth @ basis if truth.shape[0] >= truth.shape[1] else truth.T @ basis
    assert (inside**2).sum() == pytest.approx((exact[:12] ** 2).sum(), rel=1e-3)


def test_a_side_file_is_smaller_than_the_lora_of_its_ranks(family: Path, side: Path, tmp_path: Path) -> None:
    diff(family, tmp_path / "lora.safetensors", None, rank=12)
    assert side.stat().st_size < 0.75 * (tmp_path / "lora.safetensors").stat().st_size


def test_what_is_missing_is_searched_for_and_added(family: Path, side: Path, tmp_path: Path) -> None:
    grown = tmp_path / "side.safetensors"
    shutil.copy(side, grown)
    found = diff(family, tmp_path / "lora.safetensors", grown, rank=30)
    assert found.searched == sorted(one.name for one in found.layers)
    assert load_file(grown)[f"{NAME}.rows"].shape[0] == 30
    assert diff(family, tmp_path / "lora.safetensors", grown, rank=30).searched == []


def test_matrices_that_another_run_left_out_stay_in_the_file(family: Path, side: Path, tmp_path: Path) -> None:
    grown = tmp_path / "side.safetensors"
    diff(family, tmp_path / "lora.safetensors", grown, rank=4, include=("attention",))
    found = diff(family, tmp_path / "lora.safetensors", grown, rank=4)
    assert found.searched == sorted(one.name for one in found.layers if "attention" not in one.groups)
    assert {f"{one.name}.rows" for one in found.layers} <= set(load_file(grown))


@pytest.mark.parametrize("rule", ["sum", "knee"])
def test_rules_about_the_whole_spectrum_find_it_in_the_file(
    family: Path, tmp_path: Path, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {"rule": rule} | ({"rank_thresh": 0.5} if rule == "sum" else {})
    plain = diff(family, tmp_path / "plain.safetensors", None, **chosen)
    diff(family, tmp_path / "one.safetensors", tmp_path / "side.safetensors", **chosen)
    monkeypatch.setattr(svd, "spectrum", lambda *_: pytest.fail("a matrix was decomposed again"))
    found = diff(family, tmp_path / "two.safetensors", tmp_path / "side.safetensors", **chosen)
    assert [(one.rank, one.capped) for one in found.layers] == [(one.rank, one.capped) for one in plain.layers]
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_other_models_are_refused(family: Path, side: Path, tmp_path: Path) -> None:
    (tmp_path / "variant").symlink_to(family / "variant")
    checkpoint(tmp_path / "base.safetensors", variant=5)
    with pytest.raises(UsageError, match="other models"):
        diff(tmp_path, tmp_path / "lora.safetensors", side)
    assert not (tmp_path / "lora.safetensors").exists()


def test_another_seed_is_refused(family: Path, side: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`seed=0`"):
        diff(family, tmp_path / "lora.safetensors", side, seed=3)


def test_a_file_that_is_something_else_is_refused_and_not_replaced(family: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"w": torch.ones(3)}, other)
    before = other.read_bytes()
    with pytest.raises(DataError, match="no file of spectra"):
        diff(family, tmp_path / "lora.safetensors", other)
    assert other.read_bytes() == before


def test_a_model_of_the_pair_is_no_side_file(family: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        diff(family, tmp_path / "lora.safetensors", family / "base.safetensors")


def test_the_output_is_no_side_file(family: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the same file"):
        diff(family, tmp_path / "lora.safetensors", tmp_path / "lora.safetensors")


def spoiled(side: Path, target: Path, spoil: Callable[[dict[str, torch.Tensor], dict[str, object]], None]) -> Path:
    with safe_open(side, "pt") as opened:
        metadata = dict(opened.metadata())
    tensors, described = load_file(side), json.loads(metadata["mergetool.spectra"])
    spoil(tensors, described)
    save_file(tensors, target, metadata | {"mergetool.spectra": json.dumps(described)})
    return target


DAMAGE: dict[str, Callable[..., object]] = {
    "values rise": lambda t, d: t.update({f"{NAME}.values": t[f"{NAME}.values"].flip(0)}),
    "a value is NaN": lambda t, d: t[f"{NAME}.values"].fill_(torch.nan),
    "a row is infinite": lambda t, d: t[f"{NAME}.rows"][0].fill_(torch.inf),
    "rows are of another length": lambda t, d: t.update({f"{NAME}.rows": t[f"{NAME}.rows"][:, :5].contiguous()}),
    "rows are float32": lambda t, d: t.update({f"{NAME}.rows": t[f"{NAME}.rows"].float()}),
    "rows are missing": lambda t, d: t.pop(f"{NAME}.rows"),
    "more rows than values": lambda t, d: t.update({f"{NAME}.values": t[f"{NAME}.values"][:4]}),
    "a total is negative": lambda t, d: d["matrices"][NAME].update(total=-1.0),
    "a total is NaN": lambda t, d: d["matrices"][NAME].update(total=float("nan")),
    "another format": lambda t, d: d.update(format=2),
    "no list of matrices": lambda t, d: d.update(matrices=[1]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused(family: Path, side: Path, tmp_path: Path, damage: str) -> None:
    bad = spoiled(side, tmp_path / "bad.safetensors", DAMAGE[damage])
    with pytest.raises(DataError, match="spectr"):
        diff(family, tmp_path / "lora.safetensors", bad)
    assert not (tmp_path / "lora.safetensors").exists()


def test_directions_that_were_tampered_with_are_found_out_and_searched_for_anew(
    family: Path, side: Path, tmp_path: Path
) -> None:
    wrong = spoiled(side, tmp_path / "wrong.safetensors", lambda t, d: t[f"{NAME}.rows"].normal_())
    plain = diff(family, tmp_path / "plain.safetensors", None, rank=8)
    found = diff(family, tmp_path / "lora.safetensors", wrong, rank=8)
    for one, other in zip(found.layers, plain.layers, strict=True):
        assert one.energy == pytest.approx(other.energy, abs=2e-5), one.name


def test_the_recipe_says_that_a_side_file_was_used(family: Path, side: Path, tmp_path: Path) -> None:
    diff(family, tmp_path / "lora.safetensors", side, rank=2)
    with safe_open(tmp_path / "lora.safetensors", "pt") as opened:
        assert json.loads(opened.metadata()["mergetool.diff"])["spectra"] is True
    with safe_open(side, "pt") as opened:
        assert str(family) not in json.dumps(opened.metadata())


@pytest.mark.parametrize(
    ("options", "only"),
    [
        ({}, ""),
        ({"rank": 3}, ""),
        ({"rule": "fro"}, ""),
        ({"rule": "sum"}, "`rule=sum`"),
        ({"rule": "ratio", "rank_thresh": 0.1}, "`rule=ratio`"),
        ({"budget": 10_000}, "`budget`"),
    ],
)
def test_what_a_device_cannot_do_is_done_on_the_cpu_and_named(
    family: Path, tmp_path: Path, options: dict[str, object], only: str
) -> None:
    chosen = DiffOptions(**options)  # type: ignore[arg-type]
    assert on_the_cpu(chosen) == only
    beside = replace(chosen, spectra=tmp_path / "side.safetensors")
    assert on_the_cpu(beside) == (only if "budget" in only else "`spectra`")
    if only:
        outputs = []
        for device in (None, torch.device("cpu")):
            outputs.append(tmp_path / f"{device}.safetensors")
            with open_diff(str(family / "base.safetensors"), str(family / "variant"), chosen) as pairing:
                extract(pairing, outputs[-1], chosen, device=device)
        assert outputs[0].read_bytes() == outputs[1].read_bytes()
