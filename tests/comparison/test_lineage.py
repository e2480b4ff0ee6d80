"""Which models belong together, on the embedded family: every ordered pair, averages, methods and fp16."""

from __future__ import annotations

from fractions import Fraction
from itertools import permutations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergetool import models
from mergetool.checkpoint.dtypes import BF16, F16
from mergetool.comparison import lineage, samples
from mergetool.comparison.finding import Finding
from mergetool.comparison.result import part_of_result
from mergetool.comparison.samples import Samples
from mergetool.engine import job
from mergetool.options.merging import MergeOptions
from mergetool.recipe.expression import parse
from mergetool.recipe.steps import Input
from tests.families import checkpoint
from tests.quant.models import quantised

MEMBERS = ("base", "turbo", "deturbo", "striped", "hollow", "alkahest")
PARENTS = {("striped", "base"), ("deturbo", "turbo"), ("hollow", "turbo"), ("hollow", "deturbo")}
"""Child and model to subtract: what it was trained from, or, of hollow, also what docs/explanation/lab.md found to be right."""


def checked(expression: str, **options: object) -> list[Finding]:
    with job.open_merge(expression, MergeOptions(**options), fingerprints=False) as plan:  # type: ignore[arg-type]
        return lineage.of(plan, Samples(plan.inputs)).findings()


def levels(expression: str, **options: object) -> list[str]:
    return [finding.level for finding in checked(expression, **options)]


@pytest.mark.parametrize("each", [samples.MOST, 64])
def test_every_ordered_pair_of_members_is_judged_right(monkeypatch: pytest.MonkeyPatch, each: int) -> None:
    monkeypatch.setattr(samples, "MOST", each)
    for x, y in permutations(MEMBERS, 2):
        onto = next(name for name in MEMBERS if name not in (x, y))
        found = levels(f"lab.{onto} + 2*(lab.{x} - lab.{y})")
        assert ("warn" in found) == ((x, y) not in PARENTS), (x, y, found)
        assert "error" not in found


def test_a_reversed_pair_is_told_from_a_wrong_one() -> None:
    for child, parent in PARENTS:
        (found,) = checked(f"lab.alkahest + (lab.{parent} - lab.{child})")
        assert f"lab.{child} seems trained on from lab.{parent}" in found.text
    (found,) = checked("lab.alkahest + (lab.striped - lab.turbo)")
    assert "lab.turbo does not look like" in found.text
    assert "114 % in the refiners" in found.text
    assert "lab.base looks like it" in found.text


def test_of_two_ancestors_the_nearer_one_is_named() -> None:
    (found,) = checked("lab.alkahest + 2*(lab.hollow - lab.turbo)")
    assert found.level == "note"
    assert "lab.deturbo lies nearer to lab.hollow" in found.text
    assert checked("lab.alkahest + 2*(lab.hollow - lab.deturbo)") == []


@pytest.mark.parametrize(
    "expression",
    [
        "0.5*lab.turbo + 0.5*lab.base",
        "lab.turbo + 0.3*(lab.base - lab.turbo)",
        "lab.base + (0.5*lab.hollow + 0.5*lab.base - lab.base)",
        "slerp(lab.turbo, lab.base)",
        "weighted_sum(lab.alkahest, lab.striped, alpha=0.1)",
        "0.8*lab.base + 0.2*lab.hollow + 0.5*(lab.striped - lab.base)",
    ],
)
def test_refiners_averaged_from_unrelated_models_are_an_error_unless_kept(expression: str) -> None:
    assert "error" in levels(expression)
    for options in ({"protect": ("refiner",)}, {"multipliers": (("refiner", Fraction(0)),)}):
        kept = levels(expression, keep_from=parse(expression).anchors[0], **options)
        assert "warn" in kept
        assert "error" not in kept


@pytest.mark.parametrize(
    "expression",
    [
        "lab.alkahest + 20*(lab.hollow - lab.deturbo)",
        "lab.alkahest + 1*(lab.striped - lab.base) + 1.5*(lab.hollow - lab.deturbo)",
        "lab.alkahest - 0.5*(lab.striped - lab.base)",
        "lab.alkahest + slerp(lab.striped - lab.base, lab.hollow - lab.deturbo)",
        "lab.turbo",
    ],
)
def test_sums_of_differences_within_a_family_are_passed_in_silence(expression: str) -> None:
    assert checked(expression) == []


def test_refiners_averaged_from_relatives_are_only_noted() -> None:
    (found,) = checked("0.5*lab.turbo + 0.5*lab.deturbo")
    assert found.level == "note"
    assert "7.54 % apart" in found.text
    assert checked("0.5*lab.turbo + 0.5*lab.deturbo", protect=("refiner",), keep_from="lab.turbo") == []


def test_a_wrong_pair_inside_a_method_is_found() -> None:
    found = checked("lab.alkahest + slerp(lab.striped - lab.turbo, lab.hollow - lab.deturbo)")
    assert [finding.level for finding in found] == ["warn"]
    assert "lab.striped - lab.turbo" in found[0].text


def test_a_quantised_child_is_no_stranger(tmp_path: Path) -> None:
    folder = models.EMBEDDED / "striped" / "transformer"
    quantised(tmp_path / "striped.safetensors", next(folder.glob("*.safetensors")), "nvfp4", refiners=False)
    assert checked(f"lab.alkahest + (lab.base - '{tmp_path / 'striped.safetensors'}')")[0].text.count("reversed") == 1
    assert checked(f"lab.alkahest + ('{tmp_path / 'striped.safetensors'}' - lab.base)") == []


def test_models_that_share_nothing_are_no_parents(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        values = torch.randn(128, 64, generator=torch.Generator().manual_seed(seed))
        save_file({"blocks.0.weight": values}, tmp_path / f"{name}.safetensors")
    a, b = (tmp_path / f"{name}.safetensors" for name in "ab")
    (found,) = checked(f"'{a}' + 0.1*('{a}' - '{b}')")
    assert found.level == "warn"
    assert "different weights altogether" in found.text


def test_registered_models_are_asked_and_broken_ones_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGETOOL_CONFIG_DIR", str(tmp_path / "config"))
    base = load_file(next((models.EMBEDDED / "base" / "transformer").glob("*.safetensors")))
    torch.manual_seed(0)
    far = {name: t + 0.2 * t.std() * torch.randn(t.shape).bfloat16() if t.ndim > 1 else t for name, t in base.items()}
    save_file(far, tmp_path / "far.safetensors")
    save_file(base, tmp_path / "near.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    models.add("near", str(tmp_path / "near.safetensors"))
    models.add("broken", str(tmp_path / "broken.safetensors"))
    striped = next((models.EMBEDDED / "striped" / "transformer").glob("*.safetensors"))
    found = checked(f"'{striped}' + 0.1*('{striped}' - '{tmp_path / 'far.safetensors'}')")
    assert any("near lies nearer" in finding.text for finding in found), found


# --- fp16 ----------------------------------------------------------------------------------------------------


def test_the_norm_that_comfyui_looks_at_is_judged_in_the_result(tmp_path: Path) -> None:
    for name, spread in (("a", 0.2), ("b", 0.41)):
        stored = load_file(checkpoint(tmp_path / f"{name}.safetensors"))
        depth = 1 + max(int(key.split(".")[1]) for key in stored if key.startswith("layers."))
        gains = stored[f"layers.{depth - 2}.ffn_norm1.weight"]
        alternating = torch.tensor([1.0, -1.0]).repeat(gains.numel() // 2) * spread + 1
        stored[f"layers.{depth - 2}.ffn_norm1.weight"] = alternating.to(gains.dtype)
        save_file(stored, tmp_path / f"{name}.safetensors")
    a, b = (f"'{tmp_path / name}.safetensors'" for name in "ab")
    texts = {
        m: [finding.text for finding in checked(f"{a} + {m}*({b} - {a})", dtype=F16) if "fp16" in finding.text]
        for m in ("0.5", "1", "1.2")
    }
    assert texts["0.5"] == []
    assert "just below" in texts["1"][0]
    assert "0.450" in texts["1.2"][0]
    assert "does not compute in fp16" in texts["1.2"][0]
    assert not [f for f in checked(f"{a} + 1.2*({b} - {a})", dtype=BF16) if "fp16" in f.text]


def test_a_part_of_the_result_is_what_the_merge_writes(tmp_path: Path) -> None:
    expression = "lab.alkahest + 2*(lab.striped - lab.base)"
    with job.open_merge(expression) as plan:
        job.run_merge(plan, tmp_path / "out.safetensors", threads=1)
        stored = load_file(tmp_path / "out.safetensors")
        for name in ("layers.4.ffn_norm1.weight", "layers.2.attention.to_k.weight"):
            assert torch.equal(torch.from_numpy(part_of_result(plan, name)), stored[name].float().flatten())
        with pytest.raises(KeyError):
            part_of_result(plan, "layers.99.ffn_norm1.weight")


def test_a_model_of_very_many_parts_is_sampled_in_the_same_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({f"layers.{i}.weight": torch.ones(64, 64) for i in range(50)}, tmp_path / "many.safetensors")
    monkeypatch.setattr(samples, "TOTAL", 50 * 128)
    with models.open_model(str(tmp_path / "many.safetensors")) as opened:
        sample = Samples([Input("many", opened.checkpoint, opened.anatomy)]).of(0)
    assert sum(values.size for values in sample.values.values()) == 50 * 128
    assert set(sample.sizes.values()) == {64 * 64}
