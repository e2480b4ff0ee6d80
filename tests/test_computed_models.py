"""A MODEL is an expression: every operation gives with one what it gives with the file that it would be written as."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import mergetool
from mergetool.cli.main import app
from mergetool.errors import ExpressionError, InputMissing, LineageError
from tests.families import checkpoint

MERGE = "'alk.safetensors' + 3*('a.safetensors' - 'b.safetensors')"
METHOD = "ties('alk.safetensors', 'a.safetensors', base='b.safetensors')"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fine-tunes of one base in two layouts, merges of them that were written, and a LoRA."""
    folder = tmp_path_factory.mktemp("home")
    for seed, name in enumerate(["alk", "a", "b", "c"]):
        checkpoint(folder / f"{name}.safetensors", variant=seed, layout="diffusers" if name == "a" else "comfyui")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        mergetool.merge(MERGE, "merge.safetensors")
        mergetool.merge(METHOD, "method.safetensors")
        mergetool.diff("alk.safetensors", "c.safetensors", "lora.safetensors", rank=2, min_dim=1)
        mergetool.merge(f"{MERGE} + 0.5*lora('lora.safetensors')", "with-lora.safetensors")
    return folder


@pytest.fixture
def family(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    return home


WRITTEN = {
    "merge.safetensors": MERGE,
    "method.safetensors": METHOD,
    "with-lora.safetensors": f"{MERGE} + 0.5*lora('lora.safetensors')",
}


def same_tensors(one: Path, other: Path) -> None:
    first, second = load_file(one), load_file(other)
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), second[name].reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("file", WRITTEN)
@pytest.mark.parametrize(
    "options",
    [
        {"rank_thresh": 0.9},
        {"rank": 3, "exclude": ["refiner"]},
        {"rank_thresh": 0.9, "full": True},
        {"rank_thresh": 0.9, "variant2": "c.safetensors", "union": True},
    ],
    ids=lambda options: "+".join(options),
)
def test_a_difference_to_an_expression_is_the_one_to_its_file(
    file: str, options: dict[str, Any], family: Path, tmp_path: Path
) -> None:
    for name, variant in (("file", file), ("text", WRITTEN[file])):
        asked = options | ({"full": tmp_path / f"{name}-full.safetensors"} if "full" in options else {})
        mergetool.diff("b.safetensors", variant, tmp_path / f"{name}.safetensors", min_dim=1, **asked)
    same_tensors(tmp_path / "file.safetensors", tmp_path / "text.safetensors")
    if "full" in options:
        same_tensors(tmp_path / "file-full.safetensors", tmp_path / "text-full.safetensors")


def test_base_and_second_variant_may_be_expressions_too(family: Path, tmp_path: Path) -> None:
    for name, base, second in (("file", "merge.safetensors", "method.safetensors"), ("text", MERGE, METHOD)):
        mergetool.diff(base, "c.safetensors", tmp_path / f"{name}.safetensors", variant2=second, rank=2, min_dim=1)
    same_tensors(tmp_path / "file.safetensors", tmp_path / "text.safetensors")


def test_what_a_difference_bakes_is_the_same(family: Path, tmp_path: Path) -> None:
    for name, base in (("file", "merge.safetensors"), ("text", MERGE)):
        mergetool.diff(base, "c.safetensors", tmp_path / f"{name}.safetensors", rank=2, min_dim=1, checkpoint=tmp_path / f"{name}-baked.safetensors")  # fmt: skip
    same_tensors(tmp_path / "file-baked.safetensors", tmp_path / "text-baked.safetensors")


@pytest.mark.parametrize("file", WRITTEN)
def test_a_comparison_has_the_same_figures(file: str, family: Path) -> None:
    by_file = mergetool.compare("b.safetensors", file, onto="merge.safetensors", multiplier="recommended")
    by_text = mergetool.compare("b.safetensors", WRITTEN[file], onto=MERGE, multiplier="recommended")
    assert by_text.distances == by_file.distances
    assert (by_text.recommended, by_text.lost, by_text.dtype) == (by_file.recommended, by_file.lost, by_file.dtype)


@pytest.mark.filterwarnings("ignore:.* is rounded as its file would be:UserWarning")
@pytest.mark.parametrize("options", [{}, {"dtype": "fp16"}, {"quant": "fp8-scaled"}, {"layout": "diffusers"}], ids=str)
def test_a_conversion_has_the_same_bytes(options: dict[str, Any], family: Path, tmp_path: Path) -> None:
    for name, model in (("file", "merge.safetensors"), ("text", MERGE)):
        mergetool.convert(model, tmp_path / f"{name}.safetensors", **options)
    same_tensors(tmp_path / "file.safetensors", tmp_path / "text.safetensors")


@pytest.mark.parametrize("file", WRITTEN)
def test_a_baked_lora_has_the_same_bytes(file: str, family: Path, tmp_path: Path) -> None:
    for name, model in (("file", file), ("text", WRITTEN[file])):
        mergetool.bake(model, {"lora.safetensors": 0.8}, tmp_path / f"{name}.safetensors")
    same_tensors(tmp_path / "file.safetensors", tmp_path / "text.safetensors")


def test_verifying_a_lora_finds_the_same(family: Path) -> None:
    by_file = mergetool.lora_verify("merge.safetensors", "lora.safetensors", "method.safetensors").report
    by_text = mergetool.lora_verify(MERGE, "lora.safetensors", METHOD).report
    assert by_text.residuals == by_file.residuals
    assert by_text.left_out == by_file.left_out


def test_pictures_are_the_same(tmp_path: Path) -> None:
    text = "lab.alkahest + 1.5*(lab.striped - lab.base)"
    mergetool.merge(text, tmp_path / "merge.safetensors")
    found = {}
    for name, base, pipeline in (("file", str(tmp_path / "merge.safetensors"), "lab.alkahest"), ("text", text, None)):
        how: dict[str, Any] = {"steps": 2, "refine_steps": 2, "seeds": 3, "pipeline": pipeline}
        found[name] = mergetool.sample("a blue circle on a gold background", base=base, refiner="lab.turbo", **how)
    pairs = zip(found["file"], found["text"], strict=True)
    assert all(np.array_equal(np.asarray(one.image), np.asarray(other.image)) for one, other in pairs)


def test_a_file_is_measured_against_a_parent_that_is_an_expression(family: Path, tmp_path: Path) -> None:
    (tmp_path / "plain.safetensors").write_bytes((family / "c.safetensors").read_bytes())
    plain = tmp_path / "plain.safetensors"
    by_file = mergetool.verify(str(plain), parents=["merge.safetensors"], images=False).weights
    by_text = mergetool.verify(str(plain), parents=[MERGE], images=False).weights
    assert by_text.distances[MERGE] == by_file.distances["merge.safetensors"]


def test_what_was_made_of_an_expression_records_it_and_its_files_and_is_derived_again(
    family: Path, tmp_path: Path
) -> None:
    baked = tmp_path / "baked.safetensors"
    mergetool.bake(MERGE, {"lora.safetensors": 1}, baked)
    with mergetool.open_model(str(baked)) as opened:
        recipe = json.loads(opened.checkpoint.metadata["mergetool.recipe"])
        inputs = json.loads(opened.checkpoint.metadata["mergetool.inputs"])
    assert recipe["expression"] in ("'alk + 3*(a - b)' + lora('lora')", "'3*(a - b) + alk' + lora('lora')")
    assert sorted(entry["name"] for entry in inputs) == ["a", "alk", "b", "lora"]
    places = {name: f"{name}.safetensors" for name in ("a", "alk", "b", "lora")}
    found = mergetool.verify(str(baked), inputs=places, depth="bytes", images=False)
    assert found.passed
    assert found.replay is not None
    assert found.replay.same
    assert list(found.weights.parents) == ["alk", "a"]
    spoilt = baked.read_bytes()
    baked.write_bytes(spoilt[:-9] + bytes([spoilt[-9] ^ 1]) + spoilt[-8:])
    assert not mergetool.verify(str(baked), inputs=places, images=False).passed


def test_a_difference_records_the_expression_and_every_file(family: Path, tmp_path: Path) -> None:
    mergetool.diff("b.safetensors", MERGE, tmp_path / "x.safetensors", rank=1, min_dim=1)
    with mergetool.open_model(str(family / "alk.safetensors")) as alk:
        print_of_alk = alk.checkpoint.fingerprint()
    from safetensors import safe_open

    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        metadata = file.metadata()
    recipe, inputs = json.loads(metadata["mergetool.diff"]), json.loads(metadata["mergetool.inputs"])
    assert recipe["base"] == "b"
    assert recipe["variant"] in ("alk + 3*(a - b)", "3*(a - b) + alk")
    assert {"name": "alk", "fingerprint": print_of_alk} in inputs
    assert [entry["name"] for entry in inputs] == ["b", "a", "alk"]


def test_a_difference_without_a_name_is_called_after_its_expression(family: Path) -> None:
    from mergetool.api.differences import Diff

    asked = Diff("b.safetensors", MERGE)
    assert asked.name == "alk-3-a-b-minus-b.safetensors"


@pytest.mark.parametrize(
    ("variant", "error", "said"),
    [
        ("'a.safetensors' + 'b.safetensors'", ExpressionError, "`variant`: .* adds two whole models"),
        ("alk - b", ExpressionError, "`variant`: .* is a difference of models"),
        ("alk + 20*(a - b", ExpressionError, "`variant`: .* cannot be read"),
        ("'alk.safetensors' + 3*('nowhere.safetensors' - 'b.safetensors')", InputMissing, "nowhere.safetensors"),
        ("nowhere.safetensors", InputMissing, '"nowhere.safetensors" does not exist'),
        ("My Model - v2 (1).safetensors", InputMissing, "does not exist"),
        ("z-imag", InputMissing, "no model or file is named"),
        ("models/none", InputMissing, "does not exist"),
        ("'no where.safetensors'", InputMissing, "does not exist"),
    ],
)
def test_a_bad_model_is_one_sentence(variant: str, error: type[Exception], said: str, family: Path) -> None:
    with pytest.raises(error, match=said):
        mergetool.diff("b.safetensors", variant, "never.safetensors")


def test_no_file_is_looked_for_before_an_expression_is_refused() -> None:
    with pytest.raises(ExpressionError, match="`onto`"):
        mergetool.compare("nowhere", "nowhere-else", onto="a + b")


def test_a_file_whose_name_reads_as_an_expression_is_that_file(family: Path, tmp_path: Path) -> None:
    strange = tmp_path / "a + b - c.safetensors"
    strange.write_bytes((family / "c.safetensors").read_bytes())
    with mergetool.open_model(str(strange)) as opened:
        assert len(opened.checkpoint.files) == 1
    with mergetool.open_model(f"'{strange}'") as opened:
        assert len(opened.checkpoint.files) == 1


def test_what_a_merge_would_be_told_is_told(family: Path, tmp_path: Path) -> None:
    far = "'alk.safetensors' + 300*('a.safetensors' - 'b.safetensors')"
    with pytest.raises(LineageError):
        mergetool.merge(far, tmp_path / "far.safetensors")
    with pytest.warns(UserWarning, match="leaves nothing of"):
        mergetool.compare("b.safetensors", far)
    with pytest.raises(LineageError, match="leaves nothing of"):
        mergetool.convert(far, tmp_path / "far.safetensors")
    with pytest.raises(LineageError, match="leaves nothing of"):
        mergetool.bake(far, {"lora.safetensors": 1}, tmp_path / "far.safetensors")
    assert not (tmp_path / "far.safetensors").exists()


def test_an_input_of_an_expression_is_not_written_over(family: Path) -> None:
    before = (family / "a.safetensors").read_bytes()
    for write in (
        lambda: mergetool.diff("b.safetensors", MERGE, "a.safetensors", rank=1, min_dim=1, overwrite=True),
        lambda: mergetool.convert(MERGE, "a.safetensors", overwrite=True),
    ):
        with pytest.raises(Exception, match="is the input"):
            write()
    assert (family / "a.safetensors").read_bytes() == before


def test_a_recipe_takes_expressions_in_differences(family: Path, tmp_path: Path) -> None:
    recipe = family / "diff.yaml"
    recipe.write_text(
        "models: {alk: alk.safetensors, a: a.safetensors, b: b.safetensors}\n"
        "variables: {m: 3}\n"
        "outputs:\n"
        "  x:\n"
        '    diff: {base: b, variant: "alk + {m}*(a - b)", rank: 2, min-dim: 1}\n'.replace("min-dim", "min_dim")
    )
    made = mergetool.Recipe(recipe).make(tmp_path)
    assert [one.state for one in made] == ["absent"]
    mergetool.diff("b.safetensors", MERGE, tmp_path / "direct.safetensors", rank=2, min_dim=1)
    same_tensors(made[0].path, tmp_path / "direct.safetensors")
    assert [one.state for one in mergetool.Recipe(recipe).make(tmp_path)] == ["current"]


def test_an_unknown_name_in_a_recipes_expression_has_its_place(family: Path) -> None:
    recipe = family / "wrong.yaml"
    recipe.write_text('models: {a: a.safetensors, b: b.safetensors}\ndiff:\n  base: b\n  variant: "a + 2*(c - b)"\n')
    with pytest.raises(mergetool.MergetoolError, match=r'wrong\.yaml:4:.*"c" is no model'):
        mergetool.Recipe(recipe)


def test_the_command_line_takes_expressions(family: Path, tmp_path: Path) -> None:
    ran = CliRunner().invoke(
        app, ["diff", "--base", "b.safetensors", "--variant", MERGE, "--rank", "2", "--min-dim", "1", "-o", str(tmp_path / "x.safetensors")]
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    assert "moves alk.safetensors by" in ran.output
    refused = CliRunner().invoke(app, ["diff", "--base", "b.safetensors", "--variant", "a + b"])
    assert refused.exit_code == 2
    assert "--variant" in refused.stderr


@pytest.mark.filterwarnings("ignore:.* is rounded as its file would be:UserWarning")
def test_a_quantised_anchor_gives_the_values_of_its_merge(family: Path, tmp_path: Path) -> None:
    mergetool.convert("alk.safetensors", tmp_path / "q.safetensors", quant="fp8-scaled")
    text = f"'{tmp_path}/q.safetensors' + 3*('a.safetensors' - 'b.safetensors')"
    mergetool.merge(text, tmp_path / "m.safetensors")
    for name, model in (("file", str(tmp_path / "m.safetensors")), ("text", text)):
        mergetool.convert(model, tmp_path / f"{name}.safetensors", quant="fp8-scaled")
    same_tensors(tmp_path / "file.safetensors", tmp_path / "text.safetensors")
