"""The Python API gives what the commands give, on the embedded models."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

import mergetool
from mergetool.api.pictures import Picture
from mergetool.errors import LineageError, MergetoolError, OutputError, UsageError
from mergetool.options.merging import MergeOptions
from tests.cli.run import mergetool as command

BRIDGE = "lab.alkahest + 1.5*(lab.striped - lab.base)"


def test_a_merge_is_the_commands_bytes_and_says_what_was_done(tmp_path: Path) -> None:
    groups = {"layers": "linear(0.5,1)", "layers.0-1": 0.5, "v": Fraction(1, 3)}
    done = mergetool.merge(BRIDGE, tmp_path / "api.safetensors", protect=["refiner"], multipliers=groups)
    settings = [word for group, value in groups.items() for word in ("--set", f"{group}={value}")]
    code = command("merge", BRIDGE, "--protect", "refiner", *settings, "-o", "cli.safetensors", cwd=tmp_path).code
    assert code == 0
    assert done.output.read_bytes() == (tmp_path / "cli.safetensors").read_bytes()
    assert set(done.tensors) == {"merged", "protected: refiner"}
    assert done.outcome.movements.total.moved > 0


def test_progress_is_told_what_is_done_and_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    mergetool.merge(BRIDGE, tmp_path / "out.safetensors", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_patterns_as_one_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r'\["refiner"\]'):
        mergetool.merge(BRIDGE, tmp_path / "out.safetensors", protect="refiner")


def test_a_failed_merge_is_one_error_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(MergetoolError, match="is no embedded model; choose one of"):
        mergetool.merge("lab.alkahest + (lab.stripes - lab.base)", tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_difference_is_the_commands_bytes(tmp_path: Path) -> None:
    found = mergetool.diff(
        "lab.base", "lab.striped", tmp_path / "api.safetensors", rank_thresh=0.9, exclude=["refiner"]
    )
    assert found.extraction is not None
    options = ["--base", "lab.base", "--variant", "lab.striped", "--rank-thresh", "0.9", "--exclude", "refiner"]
    assert command("diff", *options, "-o", "cli.safetensors", cwd=tmp_path).code == 0
    assert (tmp_path / "api.safetensors").read_bytes() == (tmp_path / "cli.safetensors").read_bytes()
    with safe_open(tmp_path / "api.safetensors", "np") as stored:
        ranks = [stored.get_slice(key).get_shape()[0] for key in stored.keys() if "lora_A" in key]  # noqa: SIM118
    assert sorted(layer.rank for layer in found.extraction.layers if layer.rank) == sorted(ranks)


def test_pictures_of_every_seed_and_strength_repeat(tmp_path: Path) -> None:
    def make() -> list[Picture]:
        return mergetool.sample(
            "a blue circle on a gold background",
            base="lab.base",
            refiner="lab.turbo",
            steps=2,
            seeds=[1, 2],
            strength=[0.15, 0.4],
        )

    one, two = make(), make()
    assert [p.parameters["seed"] for p in one] == [1, 1, 2, 2]
    assert [p.parameters["second"]["strength"] for p in one] == [0.15, 0.4, 0.15, 0.4]
    assert one[0].image.size == (64, 64)
    for first, again in zip(one, two, strict=True):
        assert np.array_equal(np.asarray(first.image), np.asarray(again.image))


def test_pictures_are_written_where_an_output_is_named(tmp_path: Path) -> None:
    quick: dict[str, Any] = {"base": "lab.turbo", "steps": 1, "cfg": 1}
    (picture,) = mergetool.sample("a red circle", output=tmp_path / "one.png", **quick)
    with Image.open(tmp_path / "one.png") as stored:
        assert np.array_equal(np.asarray(stored), np.asarray(picture.image))
    (tmp_path / "prompts.txt").write_text("a red circle\na blue cross\n")
    mergetool.sample(prompts=tmp_path / "prompts.txt", seeds="1-2", size="64x64", output=tmp_path / "sheet", **quick)
    assert len(list((tmp_path / "sheet").glob("???-0.png"))) == 4
    with pytest.raises(OutputError, match="`overwrite`"):
        mergetool.sample("a red circle", output=tmp_path / "one.png", **quick)


def test_an_option_without_effect_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="`refine_steps` has no effect: there is no `refiner`") as told:
        mergetool.sample("a red circle", base="lab.turbo", steps=1, cfg=1, refine_steps=3)
    assert told[0].filename == __file__


def test_verify_tells_a_sound_merge_from_a_damaged_one(tmp_path: Path) -> None:
    out = mergetool.merge(BRIDGE, tmp_path / "out.safetensors").output
    assert mergetool.verify(out, images=False).passed
    raw = bytearray(out.read_bytes())
    raw[-1] ^= 1
    out.write_bytes(raw)
    checked = mergetool.verify(out, images=False)
    assert not checked.passed
    assert len(checked.weights.differing) == 1
    assert checked.left_out == "not asked for"
    whole = mergetool.verify(out, depth="bytes", images=False)
    assert (whole.passed, whole.replay is not None and whole.replay.same) == (False, False)


RECIPE = """
models: {alkahest: lab.alkahest, striped: lab.striped, base: lab.base}
variables: {m: 1}
outputs:
  carried:
    merge: alkahest + m * (striped - base)
    protect: refiner
    output: carried-{m}.safetensors
    verify: weights
  lora:
    diff: {base: base, variant: striped, rank: 4}
"""


def test_a_recipe_makes_what_is_not_there_and_says_what_it_made(tmp_path: Path) -> None:
    (tmp_path / "bridge.yaml").write_text(RECIPE)
    recipe = mergetool.Recipe(tmp_path / "bridge.yaml", m=1.5)
    assert recipe.outputs == ("carried", "lora")
    carried, lora = recipe.make(tmp_path)
    assert (carried.state, lora.state) == ("absent", "absent")
    assert carried.path.name == "carried-1.5.safetensors"
    assert carried.verification is not None
    assert carried.verification.passed
    assert lora.extraction is not None
    assert {layer.rank for layer in lora.extraction.layers} <= {0, 4}
    plain = mergetool.merge(BRIDGE, tmp_path / "plain.safetensors", protect=["refiner"])
    assert mergetool.replay(carried.path).same
    with safe_open(plain.output, "pt") as one, safe_open(carried.path, "pt") as other:
        assert all((one.get_tensor(name) == other.get_tensor(name)).all() for name in one.keys())  # noqa: SIM118
    again = recipe.make(tmp_path)
    assert [made.state for made in again] == ["current", "current"]
    assert again[0].merged is None


def test_models_that_do_not_belong_together_are_merged_with_force_only(tmp_path: Path) -> None:
    with pytest.raises(LineageError, match="`force`"):
        mergetool.merge("0.5*lab.base + 0.5*lab.turbo", tmp_path / "out.safetensors")
    done = mergetool.merge("0.5*lab.base + 0.5*lab.turbo", tmp_path / "out.safetensors", force=True)
    assert any("refiner" in warning for warning in done.warnings)


def test_compare_recommends_the_multiplier_of_the_reference(tmp_path: Path) -> None:
    mergetool.merge("lab.base + 0.25*(lab.striped - lab.base)", tmp_path / "weak.safetensors", dtype="fp32")
    found = mergetool.compare("lab.base", str(tmp_path / "weak.safetensors"), reference="lab.striped")
    assert found.recommended is not None
    assert float(found.recommended) == pytest.approx(4, rel=0.01)


def test_trigger_words_stand_in_the_metadata_of_a_difference(tmp_path: Path) -> None:
    out = tmp_path / "striped.safetensors"
    mergetool.diff("lab.base", "lab.striped", out, rank=1, include=["layers.0"], trigger="striped ground")
    with safe_open(out, "pt") as file:
        assert file.metadata()["modelspec.trigger_phrase"] == "striped ground"


@pytest.mark.parametrize("word", ["BF16", "fp8_e4m3", "FP8-E4M3"])
def test_words_of_options_are_taken_in_capitals_and_with_either_dash(word: str) -> None:
    assert MergeOptions(dtype=word).dtype == word.lower().replace("-", "_")
