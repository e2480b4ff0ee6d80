"""How far a merge lands from its anchor: measured on a sample, against the norms of whole models in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergetool.comparison import preflight, samples
from mergetool.comparison.landing import Landing
from mergetool.comparison.preflight import Preflight
from mergetool.engine import job
from mergetool.errors import LineageError
from mergetool.models import EMBEDDED
from mergetool.options.merging import MergeOptions
from mergetool.recipe.steps import Window

BRIDGE = "lab.alkahest + {}*(lab.striped - lab.base)"


def checked(text: str, **options: object) -> Preflight:
    with job.open_merge(text, MergeOptions(**options)) as plan:  # type: ignore[arg-type]
        return preflight.check(plan)


def landed(text: str, **options: object) -> Landing:
    return checked(text, **options).landing


def weights(name: str) -> dict[str, torch.Tensor]:
    (path,) = (EMBEDDED / name / "transformer").glob("*.safetensors")
    return {key: value.double() for key, value in load_file(path).items()}


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return float(sum(value.square().sum() for value in tensors.values()) ** 0.5)


@pytest.mark.parametrize("factor", [0.5, 1.5, 20])
def test_the_distance_is_the_norm_of_the_change_over_that_of_the_anchor(factor: float) -> None:
    alkahest, striped, base = weights("alkahest"), weights("striped"), weights("base")
    wanted = factor * norm({key: striped[key] - base[key] for key in base}) / norm(alkahest)
    assert landed(BRIDGE.format(factor)).distance == pytest.approx(wanted, rel=0.1)  # a sample of 4096 elements a part


def test_parts_that_are_kept_count_as_not_moved() -> None:
    alkahest, striped, base = weights("alkahest"), weights("striped"), weights("base")
    merged = [key for key in base if "refiner" not in key]
    wanted = 20 * norm({key: striped[key] - base[key] for key in merged}) / norm(alkahest)
    assert landed(BRIDGE.format(20), protect=("refiner",)).distance == pytest.approx(wanted, rel=0.1)


def test_parts_that_are_taken_from_another_model_count_as_moved() -> None:
    base, turbo = weights("base"), weights("turbo")
    taken = [key for key in base if "refiner" in key]
    wanted = norm({key: turbo[key] - base[key] for key in taken}) / norm(base)
    found = landed("lab.base + 1e-9*(lab.striped - lab.base)", protect=("refiner",), keep_from="lab.turbo")
    assert found.distance == pytest.approx(wanted, rel=0.1)


def test_the_distances_within_the_expression_stand_beside_it() -> None:
    ((x, y, share),) = landed(BRIDGE.format(20)).differences
    striped, base = weights("striped"), weights("base")
    wanted = norm({key: striped[key] - base[key] for key in base}) / (norm(striped) * norm(base)) ** 0.5
    assert (x, y, share) == ("lab.striped", "lab.base", pytest.approx(wanted, rel=0.1))


@pytest.mark.parametrize(
    ("factor", "level", "words"),
    [
        ("1.5", "note", "moves lab.alkahest by 9.7"),
        ("20", "warn", "pictures may turn to noise"),
        ("1e30", "error", "leaves nothing of lab.alkahest"),
        ("1e38", "error", "leaves nothing of lab.alkahest"),
        ("1e-30", "warn", "as good as a copy of lab.alkahest"),
    ],
)
def test_distance_alone_decides_what_is_said(factor: str, level: str, words: str) -> None:
    found = checked(BRIDGE.format(factor)).findings[0]
    assert found.level == level
    assert words in found.text


def test_a_large_factor_of_a_tiny_difference_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = weights("base")
    save_file({key: value.float() for key, value in base.items()}, "base.safetensors")
    save_file({key: (value * (1 + 1e-4)).float() for key, value in base.items()}, "tuned.safetensors")
    found = checked("lab.base + 171*('tuned.safetensors' - 'base.safetensors')")
    assert found.landing.distance == pytest.approx(0.0171, rel=0.01)
    assert [finding.level for finding in found.findings[:1]] == ["note"]


def test_an_error_is_refused_with_the_way_out() -> None:
    with pytest.raises(LineageError, match=r"more than 300 % leaves nothing .*; `force` merges anyway"):
        checked(BRIDGE.format("1e6")).refuse()


def test_a_lora_is_measured_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    up, down = torch.randn(96, 4), torch.randn(4, 96)
    key = "diffusion_model.layers.0.attention.to_q"
    save_file({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, "style.safetensors")
    found = landed("lab.base + 2*lora('style.safetensors')")
    wanted = float((2 * (up @ down).double()).norm()) / norm(weights("base"))
    assert found.distance == pytest.approx(wanted, rel=0.2)  # 42 of its 96 rows


def test_what_merge_methods_make_is_counted_as_not_measured() -> None:
    assert landed("slerp(lab.base, lab.striped, t=0.1)").unmeasured > 0


def test_a_distance_beyond_float32_is_no_number_in_json() -> None:
    assert landed(BRIDGE.format("1e38")).record()["distance"] in (None, pytest.approx(6.49e36, rel=0.2))


def test_an_element_is_read_once_for_lineage_and_landing(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, str, int]] = []
    read = samples._read

    def told(reader: object, checkpoint: object, window: Window, start: int, count: int) -> object:
        seen.append((id(checkpoint), window.tensor, start))
        return read(reader, checkpoint, window, start, count)  # type: ignore[arg-type]

    monkeypatch.setattr(samples, "_read", told)
    checked("lab.alkahest + 1.25*(lab.striped - lab.base)")
    assert len(seen) == len(set(seen)) > 100
