"""``mergetool merge RECIPE.yaml`` and ``mergetool replay`` as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.cli.run import mergetool
from tests.families import checkpoint

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "benchmarks" / "recipes"

RECIPE = """\
models:
  alk: alk.safetensors
  tuned: sub/a.safetensors
  parent: sub/b.safetensors
sweep:
  m: [2, 20]
outputs:
  carried:
    merge: alk + m * (tuned - parent)
    protect: refiner
    verify: weights
  half:
    merge: 0.5*carried + 0.5*alk
    protect: refiner
    output: half-{m}.safetensors
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipes" / "sub").mkdir(parents=True)
    for seed, name in enumerate(["alk", "sub/a", "sub/b"]):
        checkpoint(tmp_path / "recipes" / f"{name}.safetensors", variant=seed)
    (tmp_path / "recipes" / "r.yaml").write_text(RECIPE)
    (tmp_path / "out").mkdir()
    return tmp_path


OUTPUTS = ["carried-2.safetensors", "carried-20.safetensors", "half-2.safetensors", "half-20.safetensors"]


def expected(folder: Path, name: str, m: float) -> np.ndarray:
    """What a carried tensor is, in float64, before it is rounded to bf16."""
    alk, a, b = (load_file(folder / "recipes" / f"{n}.safetensors")[name].double() for n in ("alk", "sub/a", "sub/b"))
    return (alk + m * (a - b)).numpy()  # type: ignore[no-any-return]


def test_a_recipe_is_planned_made_and_then_up_to_date(folder: Path) -> None:
    dry = mergetool("merge", "recipes/r.yaml", "-o", "out", "--dry-run", cwd=folder)
    assert dry.code == 0, dry.err
    assert list((folder / "out").iterdir()) == []
    assert "half (m=20): 0.5*carried + 0.5*alk, planned when carried (m=20) is there" in dry.out

    made = mergetool("merge", "recipes/r.yaml", "-o", "out", cwd=folder)
    assert made.code == 0, made.err
    assert made.out.startswith("recipe  recipes/r.yaml: 4 outputs, 4 to make\n")
    assert sorted(path.name for path in (folder / "out").iterdir() if path.suffix == ".safetensors") == OUTPUTS
    assert made.out.count("\nsound   ") == 2

    name, kept = "layers.0.feed_forward.w1.weight", "noise_refiner.0.feed_forward.w1.weight"
    for m in (2, 20):
        found = load_file(folder / "out" / f"carried-{m}.safetensors")
        wanted = expected(folder, name, m)
        # One rounding to bf16, of 8 bits, and float32 sums of terms up to 20 times a weight.
        assert np.all(np.abs(found[name].double().numpy() - wanted) <= np.abs(wanted) * 2**-8 + 1e-5)
        assert torch.equal(found[kept], load_file(folder / "recipes" / "alk.safetensors")[kept])

    before = {path: path.stat().st_mtime_ns for path in (folder / "out").iterdir()}
    again = mergetool("merge", "recipes/r.yaml", "-o", "out", "--json", cwd=folder)
    assert [output["state"] for output in again.json["outputs"]] == ["current"] * 4
    assert {path: path.stat().st_mtime_ns for path in (folder / "out").iterdir()} == before


def test_an_output_is_the_bytes_of_the_same_expression(folder: Path) -> None:
    assert mergetool("merge", "recipes/r.yaml", "--var", "m=20", "-o", "out", cwd=folder).code == 0
    typed = "'recipes/alk.safetensors' + 20 * ('recipes/sub/a.safetensors' - 'recipes/sub/b.safetensors')"
    assert mergetool("merge", typed, "--protect", "refiner", "-o", "typed.safetensors", cwd=folder).code == 0
    carried = (folder / "out" / "carried.safetensors").read_bytes()
    assert carried == (folder / "typed.safetensors").read_bytes()


def test_what_is_out_of_date_is_replaced_only_when_asked(folder: Path) -> None:
    single = folder / "recipes" / "one.yaml"
    single.write_text(
        "models: {alk: alk.safetensors, a: sub/a.safetensors}\nvariables: {m: 2}\nmerge: alk + m*(a - alk)\n"
    )
    arguments = ("merge", "recipes/one.yaml", "-o", "x.safetensors")
    assert mergetool(*arguments, cwd=folder).code == 0
    before = (folder / "x.safetensors").read_bytes()
    refused = mergetool(*arguments, "--var", "m=3", cwd=folder)
    assert refused.code == 73
    assert "recipes/one.yaml:1:1: " in refused.err
    assert "its recipe is another (expression)" in refused.err
    assert (folder / "x.safetensors").read_bytes() == before
    assert mergetool(*arguments, "--var", "m=3", "--overwrite", cwd=folder).code == 0
    assert (folder / "x.safetensors").read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("recipes/gone.yaml",), 66, "gone.yaml"),
        (("recipes/r.yaml", "-o", "one.safetensors"), 2, "4 outputs"),
        (("recipes/r.yaml", "-o", "no-folder"), 73, "does not exist"),
        (("recipes/r.yaml", "--protect", "refiner"), 2, "or write it in the file"),
        (("recipes/r.yaml", "--var", "n=1"), 2, '"n"'),
        (("lab.base", "--var", "m=1", "-o", "x.safetensors"), 2, "--var"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(arguments: tuple[str, ...], code: int, words: str, folder: Path) -> None:
    ran = mergetool("merge", *arguments, cwd=folder)
    assert (ran.code, len(ran.err.splitlines())) == (code, 1), ran.err
    assert words in ran.err


def test_an_error_in_a_recipe_is_one_line_with_its_place(folder: Path) -> None:
    (folder / "wrong.yaml").write_text("merge: lab.base + 2*(lab.striped - lab.base)\nprotec: refiner\n")
    ran = mergetool("merge", "wrong.yaml", cwd=folder)
    assert (ran.code, ran.err) == (
        2,
        'mergetool: wrong.yaml:2:1: there is no key "protec" here; did you mean "protect"?\n',
    )


def test_the_schema_is_printed(tmp_path: Path) -> None:
    ran = mergetool("merge", "--schema", cwd=tmp_path)
    assert ran.json == json.loads((ROOT / "docs" / "reference" / "recipe.schema.json").read_text())


def test_a_replay_is_the_same_bytes_until_something_changes(folder: Path) -> None:
    assert mergetool("merge", "recipes/r.yaml", "--var", "m=20", "-o", "out", cwd=folder).code == 0
    inputs = [
        "--input=alk=recipes/alk.safetensors",
        "--input=a=recipes/sub/a.safetensors",
        "--input=b=recipes/sub/b.safetensors",
    ]
    same = mergetool("replay", "out/carried.safetensors", *inputs, cwd=folder)
    assert (same.code, same.err) == (0, "")
    assert "\nsame    every byte of 1 file" in same.out
    (folder / "recipes/sub/b.safetensors").unlink()
    checkpoint(folder / "recipes/sub/b.safetensors", variant=9)
    other = mergetool("replay", "out/carried.safetensors", *inputs, "-o", "again.safetensors", cwd=folder)
    assert (other.code, other.err) == (
        1,
        "mergetool: out/carried.safetensors differs from the file that its recipe makes now.\n",
    )
    assert 'OTHER   the input "b" has changed' in other.out
    assert (folder / "again.safetensors").stat().st_size == (folder / "out" / "carried.safetensors").stat().st_size
    as_json = mergetool("replay", "out/carried.safetensors", *inputs, "--json", cwd=folder)
    assert (as_json.code, as_json.json["same"], as_json.json["reasons"]) == (1, False, ['the input "b" has changed'])


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_a_community_recipe_is_planned_on_the_embedded_models(name: str, tmp_path: Path) -> None:
    ran = mergetool("merge", RECIPES / f"{name}.yaml", "--dry-run", cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert "plan    " in ran.out
    assert list(tmp_path.glob("*.safetensors")) == []


def test_the_re_turbo_recipe_runs_and_its_lora_is_the_difference(tmp_path: Path) -> None:
    ran = mergetool("merge", RECIPES / "re-turbo.yaml", cwd=tmp_path)
    assert ran.code == 0, ran.err
    data = ROOT / "mergetool" / "lab" / "data"
    turbo, deturbo = (
        load_file(data / member / "transformer" / "diffusion_pytorch_model.safetensors")
        for member in ("turbo", "deturbo")
    )
    returned = load_file(tmp_path / "returned.safetensors")
    name = "layers.2.attention.to_q.weight"
    delta = (turbo[name].double() - deturbo[name].double()).numpy()
    left = (turbo[name].double() - returned[name].double()).numpy()
    # 0.995 of the energy is kept: at most sqrt(0.005) of the norm is left, and half a unit of bf16 in every weight.
    rounding = np.linalg.norm(turbo[name].double().numpy()) * 2**-9
    assert np.linalg.norm(left) <= 0.005**0.5 * np.linalg.norm(delta) + rounding
    assert np.linalg.norm(left) > 0


def test_a_verification_has_the_options_of_the_command(tmp_path: Path) -> None:
    look = "{depth: bytes, steps: 2, refine_steps: 1, cfg: 3.5, seeds: [1, 2], prompts: look.txt, negative: red, report: page.html}"
    (tmp_path / "look.txt").write_text("a red circle on a white background\n")
    (tmp_path / "r.yaml").write_text(f"merge: lab.alkahest + 0.5*(lab.striped - lab.base)\nverify: {look}\n")
    (tmp_path / "page.html").write_text("mine")
    refused = mergetool("merge", "r.yaml", cwd=tmp_path)
    assert (refused.code, '"page.html" exists' in refused.err) == (73, True)
    assert list(tmp_path.glob("*.safetensors")) == []
    (tmp_path / "page.html").unlink()
    ran = mergetool("merge", "r.yaml", "--json", cwd=tmp_path)
    seen = ran.json["outputs"][0]["verify"]
    assert seen["replay"]["same"]
    made = [one["parameters"] for one in seen["pictures"]["columns"][0]["pictures"]]
    assert [(one["seed"], one["negative"], one["first"]["guidance"]) for one in made] == [
        (1, "red", 2.5),
        (2, "red", 2.5),
    ]
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("look", "place", "words"),
    [
        ("{strength: '0,5'}", "2:20", "written with a point: 0.5"),
        ("{steps: 0}", "2:17", "a whole number from 1 to 10000"),
        ("{sampler: heun}", "2:19", "one of euler, res_multistep, dpmpp_2m_sde"),
        ("{guidance: 2, cfg: 3}", "2:20", '"guidance" and "cfg" set the same thing'),
    ],
)
def test_a_value_of_a_verification_is_refused_before_any_model_is_opened(
    tmp_path: Path, look: str, place: str, words: str
) -> None:
    (tmp_path / "r.yaml").write_text(f"merge: lab.x + 0.5*(lab.y - lab.z)\nverify: {look}\n")
    ran = mergetool("merge", "r.yaml", cwd=tmp_path)
    assert (ran.code, f"r.yaml:{place}: " in ran.err, words in ran.err) == (2, True, True), ran.err
