"""``mergetool verify`` as a user runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.run import mergetool
from tests.families import checkpoint


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    for seed, name in enumerate(["alk", "a", "b"]):
        checkpoint(tmp_path / f"{name}.safetensors", variant=seed)
        assert mergetool("models", "add", name, f"{name}.safetensors", cwd=tmp_path).code == 0
    ran = mergetool("merge", "alk + 20 * (a - b)", "--protect", "refiner", "-o", "out.safetensors", cwd=tmp_path)
    assert ran.code == 0, ran.err
    return tmp_path / "out.safetensors"


def test_a_sound_merge_passes(merged: Path) -> None:
    ran = mergetool("verify", merged.name, cwd=merged.parent)
    assert (ran.code, ran.err) == (0, "")
    assert "recipe  alk + 20*(a - b)" in ran.out
    assert "\nsound   " in ran.out


def test_a_damaged_merge_fails_with_code_one_and_names_the_tensor(merged: Path) -> None:
    data = bytearray(merged.read_bytes())
    data[-1] ^= 64
    merged.write_bytes(data)
    ran = mergetool("verify", merged.name, "--json", cwd=merged.parent)
    assert ran.code == 1
    assert (ran.json["sound"], len(ran.json["differing"])) == (False, 1)
    assert ran.err == "mergetool: out.safetensors is not what its recipe says.\n"


def test_an_input_that_moved_is_named_and_can_be_given(merged: Path) -> None:
    folder = merged.parent
    mergetool("models", "remove", "a", cwd=folder)
    (folder / "a.safetensors").rename(folder / "z.safetensors")
    assert mergetool("verify", merged.name, cwd=folder).code == 66
    assert mergetool("verify", merged.name, "--input", "a=z.safetensors", cwd=folder).code == 0


def test_inputs_are_pairs(merged: Path) -> None:
    ran = mergetool("verify", merged.name, "--input", "a", cwd=merged.parent)
    assert (ran.code, "NAME=MODEL" in ran.err) == (2, True)


def test_a_merge_without_text_encoder_says_that_no_pictures_were_made(merged: Path) -> None:
    ran = mergetool("verify", merged.name, cwd=merged.parent)
    assert ran.code == 0
    assert "no pictures: the text encoder is missing" in ran.out
    asked = mergetool("verify", merged.name, "--images", cwd=merged.parent)
    assert (asked.code, "--text-encoder" in asked.err) == (66, True)


@pytest.fixture
def random_merge(pipelines: Path, tmp_path: Path) -> Path:
    """A merge whose parents have random weights: sound, and without any picture."""
    for name in ("base", "turbo"):
        mergetool("models", "add", name, pipelines / name, cwd=tmp_path)
    ran = mergetool("merge", "0.5*base + 0.5*turbo", "--force", "-o", "out.safetensors", cwd=tmp_path)
    assert ran.code == 0, ran.err
    return tmp_path / "out.safetensors"


def test_a_merge_that_makes_no_pictures_fails_though_its_weights_are_sound(random_merge: Path) -> None:
    prompts = random_merge.with_name("prompts.txt")
    prompts.write_text("a red circle on a white background\na blue square on a gold background\n")
    # fmt: off
    ran = mergetool(
        "verify", random_merge.name, "--pipeline", "base", "--refiner", "turbo", "--steps", 2, "--refine-steps", 1,
        "--prompts", prompts.name, "--seeds", "1,2", "--report", "page.html", cwd=random_merge.parent,
    )
    # fmt: on
    assert ran.code == 1, ran.err
    assert "\nsound   " in ran.out
    assert "4 pictures of each model, 2 steps at guidance 3" in ran.out
    assert "then turbo: 1 evaluation from sigma" in ran.out
    assert "\nNO      adherence: 0" in ran.out
    assert "adherence" in ran.err
    page = random_merge.with_name("page.html").read_text()
    assert page.count("<svg") == 2
    assert "failed" in page


def test_weights_alone_are_checked_on_request(random_merge: Path) -> None:
    ran = mergetool("verify", random_merge.name, "--no-images", "--json", cwd=random_merge.parent)
    assert ran.code == 0
    assert (ran.json["sound"], ran.json["pictures"], ran.json["left_out"]) == (True, None, "not asked for")
    assert 0 < ran.json["distances"]["base"] < 1


def test_a_report_is_not_overwritten_unasked(merged: Path) -> None:
    merged.with_name("page.html").write_text("mine")
    ran = mergetool("verify", merged.name, "--report", "page.html", cwd=merged.parent)
    assert (ran.code, merged.with_name("page.html").read_text()) == (73, "mine")
    assert mergetool("verify", merged.name, "--report", "page.html", "--overwrite", cwd=merged.parent).code == 0
    assert "passed" in merged.with_name("page.html").read_text()


def test_a_file_without_recipe_is_measured_against_named_parents(merged: Path) -> None:
    ran = mergetool("verify", "b.safetensors", "--parents", "alk", "--parents", "a", cwd=merged.parent)
    assert (ran.code, ran.err) == (0, "")
    assert "weights no recipe, not derived; 65 tensors looked through for NaN and infinity" in ran.out
    assert len([line for line in ran.out.splitlines() if " % from a" in line]) == 2
    assert "sound" not in ran.out


def test_a_file_without_recipe_and_without_pictures_is_not_judged(merged: Path) -> None:
    ran = mergetool("verify", "b.safetensors", "--json", cwd=merged.parent)
    assert (ran.code, ran.json["passed"], ran.json["derived"], ran.json["sound"]) == (0, None, False, False)


def test_nan_in_a_file_without_recipe_fails(merged: Path) -> None:
    data = bytearray((merged.parent / "b.safetensors").read_bytes())
    data[-2:] = b"\xc0\x7f"
    (merged.parent / "bad.safetensors").write_bytes(data)
    ran = mergetool("verify", "bad.safetensors", "--parents", "a", cwd=merged.parent)
    assert ran.code == 1
    assert ran.err == "mergetool: bad.safetensors holds NaN or infinity.\n"


def test_a_merge_knows_its_parents(merged: Path) -> None:
    ran = mergetool("verify", merged.name, "--parents", "a", cwd=merged.parent)
    assert (ran.code, "records its own parents" in ran.err) == (2, True)


def test_to_the_depth_of_bytes_the_whole_file_is_compared(merged: Path) -> None:
    ran = mergetool("verify", merged.name, "--depth", "bytes", "--json", cwd=merged.parent)
    assert (ran.code, ran.json["passed"], ran.json["replay"]["same"]) == (0, True, True)
    stored = merged.read_bytes()
    merged.write_bytes(stored.replace(b'"mergetool.version":"0', b'"mergetool.version":"9', 1))
    assert mergetool("verify", merged.name, cwd=merged.parent).code == 0  # its tensors are right
    ran = mergetool("verify", merged.name, "--depth", "bytes", cwd=merged.parent)
    assert (ran.code, ran.err) == (1, "mergetool: out.safetensors differs from the file that its recipe makes now.\n")
    assert "OTHER   it was made by mergetool 9" in ran.out


def test_what_was_made_again_is_kept_on_request(merged: Path) -> None:
    asked = ("verify", merged.name, "--output", "again.safetensors")
    refused = mergetool(*asked, cwd=merged.parent)
    assert (refused.code, "add --depth bytes" in refused.err) == (2, True)
    assert mergetool(*asked, "--depth", "bytes", cwd=merged.parent).code == 0
    assert merged.with_name("again.safetensors").read_bytes() == merged.read_bytes()


def test_replay_is_a_name_that_help_does_not_list(merged: Path) -> None:
    ran = mergetool("replay", merged.name, cwd=merged.parent)
    assert (ran.code, "same    every byte of 1 file" in ran.out) == (0, True)
    assert "replay" not in mergetool("--help", cwd=merged.parent).out
    assert "--no-images" in mergetool("verify", "--help", cwd=merged.parent).out
