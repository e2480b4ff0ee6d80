"""Merges of the same models are one pass; what uses an output comes after it; nothing is begun that could be known to fail."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import mergetool
from mergetool.engine import job
from mergetool.errors import MergetoolError, OutputError, PatternError
from mergetool.making import survey
from mergetool.making.passes import passes
from mergetool.recipe import file
from mergetool.recipe.file import RecipeFile
from tests.families import checkpoint

MODELS = "models: {alk: alk.safetensors, a: a.safetensors, b: b.safetensors}\n"


def read(text: str) -> RecipeFile:
    return file.read(text.encode(), Path("r.yaml"))


def grouped(text: str) -> list[list[str]]:
    found = passes(read(text).outputs, lambda output: frozenset(output.uses))
    return [[output.label for output in one] for one in found]


def test_a_sweep_is_one_pass() -> None:
    assert grouped(MODELS + "sweep: {m: [1, 2, 3]}\nmerge: alk + m*(a - b)\n") == [["r (m=1)", "r (m=2)", "r (m=3)"]]


def test_an_output_is_in_a_pass_after_those_that_it_uses() -> None:
    text = MODELS + "outputs:\n  x: {merge: a}\n  y: {merge: 0.5*x + 0.5*b}\n  z: {merge: 0.5*y + 0.5*x}\n"
    assert grouped(text) == [["x"], ["y"], ["z"]]


def test_merges_without_a_model_in_common_are_passes_of_their_own() -> None:
    text = "outputs:\n  x: {merge: lab.base}\n  y: {merge: lab.turbo}\n  z: {merge: 0.5*lab.hollow + 0.5*lab.deturbo}\n"
    assert grouped(text) == [["x"], ["y"], ["z"]]


def test_a_merge_joins_what_it_has_a_model_in_common_with() -> None:
    text = "outputs:\n  x: {merge: lab.base}\n  y: {merge: lab.turbo}\n  z: {merge: 0.5*lab.base + 0.5*lab.turbo}\n"
    assert [sorted(one) for one in grouped(text)] == [["x", "y", "z"]]


def test_files_and_folders_of_shards_are_passes_of_their_own() -> None:
    text = "outputs:\n  x: {merge: lab.base}\n  y: {merge: lab.base, shard_size: 1MB}\n"
    assert grouped(text) == [["x"], ["y"]]


def states(text: str, target: Path | None = None) -> list[tuple[str, str, str]]:
    places = survey.places_for(read(text), target)
    with survey.opened(places) as surveyed:
        return [(task.output.label, task.state.kind, task.state.why) for task in surveyed.tasks]


CHAIN = (
    MODELS
    + "variables: {m: 2}\noutputs:\n  one: {merge: alk + m*(a - b)}\n  two: {merge: 0.5*one + 0.5*alk, shard_size: 100kB}\n"
)


def make(text: str) -> None:
    places = survey.places_for(read(text), None)
    with survey.opened(places) as surveyed:
        for tasks in surveyed.passes:
            plans = [plan for _, plan in surveyed.planned(tasks)]
            size = survey.shard_size(tasks[0].output)
            job.run_merges(plans, [task.target for task in tasks], overwrite=True, shard_size=size)


def kinds(text: str) -> list[str]:
    return [kind for _, kind, _ in states(text)]


def test_what_was_made_is_up_to_date(family: Path) -> None:
    assert kinds(CHAIN) == ["absent", "absent"]
    make(CHAIN)
    assert kinds(CHAIN) == ["current", "current"]


def test_another_variable_makes_an_output_and_what_uses_it_out_of_date(family: Path) -> None:
    make(CHAIN)
    (_, first, why), (_, second, after) = states(CHAIN.replace("m: 2", "m: 3"))
    assert (first, why) == ("outdated", "its recipe is another (expression)")
    assert (second, after) == ("outdated", "an output that it uses is made first")


def test_a_changed_input_is_named(family: Path) -> None:
    make(CHAIN)
    (family / "b.safetensors").unlink()
    checkpoint(family / "b.safetensors", variant=9)
    assert states(CHAIN)[0][1:] == ("outdated", 'the input "b" has changed')


def test_another_shard_size_is_noticed(family: Path) -> None:
    make(CHAIN)
    (_, kind, why) = states(CHAIN.replace("100kB", "150kB"))[1]
    assert kind == "outdated"
    assert "safetensors" in why


def test_a_file_that_is_cut_short_is_out_of_date(family: Path) -> None:
    make(CHAIN)
    with (family / "one.safetensors").open("rb+") as cut:
        cut.truncate(5000)
    assert states(CHAIN)[0][1] == "outdated"


def test_something_else_at_the_place_is_not_replaced(family: Path) -> None:
    (family / "one.safetensors").write_bytes(b"mine")
    places = survey.places_for(read(CHAIN), None)
    with (
        survey.opened(places) as surveyed,
        pytest.raises(OutputError, match=r"r\.yaml:4:8: .*one\.safetensors.*`overwrite`"),
    ):
        survey.refuse_outdated(surveyed.tasks)
    assert (family / "one.safetensors").read_bytes() == b"mine"


def test_a_lora_is_up_to_date_by_its_recipe_and_inputs(family: Path) -> None:
    from mergetool.difference.extract import extract

    text = MODELS + "diff: {base: a, variant: b, rank: 4}\n"
    places = survey.places_for(read(text), None)
    with survey.opened(places) as surveyed:
        (task,) = surveyed.tasks
        pairing, options = surveyed.paired(task)
        extract(pairing, task.path, options, threads=1)
    assert kinds(text) == ["current"]
    assert states(text.replace("rank: 4", "rank: 5"))[0][1:] == ("outdated", "its recipe is another (rank)")


BESIDE = MODELS + "diff: {base: a, variant: b, rank: 4, full: whole, spectra: found, checkpoint: baked}\n"


def test_files_beside_a_lora_lie_in_its_folder_and_count_in_its_state(family: Path) -> None:
    path = family / "r.yaml"
    path.write_text(BESIDE)
    mergetool.Recipe(path).make()
    names = ("r", "whole", "found", "baked")
    assert all((family / f"{name}.safetensors").is_file() for name in names)
    assert kinds(BESIDE) == ["current"]
    (family / "found.safetensors").unlink()
    assert kinds(BESIDE) == ["current"]
    for name in ("whole", "baked"):
        (family / f"{name}.safetensors").rename(family / "away")
        assert states(BESIDE)[0][1:] == ("outdated", f'"{name}.safetensors" is missing')
        (family / "away").rename(family / f"{name}.safetensors")


def test_a_lora_of_which_nothing_is_stored_whole_is_up_to_date(family: Path) -> None:
    tensors = load_file(family / "a.safetensors")
    tensors["layers.0.attention.qkv.weight"] += 1
    save_file(tensors, family / "matrix.safetensors")
    path = family / "r.yaml"
    text = BESIDE.replace("variant: b", "variant: matrix").replace("}\ndiff", ", matrix: matrix.safetensors}\ndiff")
    path.write_text(text)
    mergetool.Recipe(path).make()
    assert not (family / "whole.safetensors").exists()
    assert kinds(text) == ["current"]


def test_a_baked_checkpoint_of_another_lora_is_out_of_date(family: Path) -> None:
    path = family / "r.yaml"
    path.write_text(BESIDE)
    mergetool.Recipe(path).make()
    mergetool.diff(
        "a.safetensors", "b.safetensors", "o.safetensors", rank=2, checkpoint="baked.safetensors", overwrite=True
    )
    assert kinds(BESIDE) == ["outdated"]


def test_a_file_beside_a_lora_that_may_not_be_replaced_is_refused_before_any_work(family: Path) -> None:
    (family / "baked.safetensors").write_bytes(b"mine")
    path = family / "r.yaml"
    path.write_text(BESIDE)
    with pytest.raises(OutputError, match=r"r\.yaml:2:7: .*baked"):
        mergetool.Recipe(path).make()
    assert not (family / "r.safetensors").exists()


@pytest.mark.parametrize("name", ["../whole", "sub/whole", "/tmp/whole"])
def test_a_file_beside_a_lora_has_a_plain_name(family: Path, name: str) -> None:
    with pytest.raises(MergetoolError, match=r"r\.yaml:2:.*it goes into the folder of the output"):
        states(MODELS + f"diff: {{base: a, variant: b, full: {name}}}\n")


def test_two_outputs_of_one_name_are_refused_also_beside_a_lora(family: Path) -> None:
    two = "  x: {diff: {base: a, variant: b, full: w}}\n  y: {diff: {base: b, variant: a, full: w}}\n"
    with pytest.raises(MergetoolError, match=r"(x and y|y and x) would both be written"):
        states(MODELS + "outputs:\n" + two)
    states(MODELS + "outputs:\n" + two.replace("full: w", "spectra: w"))


@pytest.mark.parametrize(
    ("text", "place", "words", "kind"),
    [
        (MODELS + "merge: alk + 2*(a - b)\nprotect: [refiner, refinr]\n", "3:20", "refinr", PatternError),
        (MODELS + "merge: alk + 2*(a - b)\nset: {refiner: 0, nothing: 1}\n", "3:19", "nothing", PatternError),
        (MODELS.replace("b.saf", "gone.saf") + "merge: alk + 2*(a - b)\n", "1:53", "does not exist", MergetoolError),
        ("models: {a: alpha}\nmerge: a\n", "1:13", "no model or file", MergetoolError),
        ("merge: lab.bas\n", "1:8", "lab.base", MergetoolError),
        (MODELS + "merge: alk + 2*(a - b)\nscale_search: true\n", "2:8", "quant: nvfp4", MergetoolError),
        (MODELS + "diff: {base: a, variant: b, exclude: what}\n", "2:38", "what", PatternError),
        (MODELS + "diff: {base: a, variant: b, union: true}\n", "2:36", "variant2", MergetoolError),
        (MODELS + "diff: {base: a, variant: b, rule: ratio}\n", "2:35", "rank_thresh", MergetoolError),
    ],
)
def test_what_planning_refuses_has_its_place_in_the_recipe(
    text: str, place: str, words: str, kind: type[MergetoolError], family: Path
) -> None:
    with pytest.raises(kind) as caught:
        states(text)
    assert str(caught.value).startswith(f"r.yaml:{place}: ")
    assert words in str(caught.value)


def test_of_several_outputs_the_one_that_is_wrong_is_named(family: Path) -> None:
    text = MODELS + "outputs:\n  x: {merge: a}\n  y: {merge: 0.5*a + 0.5*b, exclude: nothing}\n"
    with pytest.raises(PatternError, match=r"^r\.yaml:4:38: "):
        states(text)


def test_relative_paths_count_from_the_recipe(family: Path) -> None:
    recipe = file.read((MODELS + "merge: alk + 2*(a - b)").encode(), Path("elsewhere/r.yaml"))
    places = survey.places_for(recipe, None)
    names: Sequence[str] = sorted(places.names(recipe.outputs[0]).values())
    assert names == ["elsewhere/a.safetensors", "elsewhere/alk.safetensors", "elsewhere/b.safetensors"]
