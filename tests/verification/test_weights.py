"""A merge is checked against its own recipe: what is right passes, every kind of damage is found and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergetool.checkpoint import dtypes
from mergetool.checkpoint.reader import Checkpoint
from mergetool.engine import job
from mergetool.errors import DataError, InputMissing, MergetoolError
from mergetool.options.merging import MergeOptions
from mergetool.verification.weights import Comparer, check_weights
from tests.families import checkpoint

PROTECTED = MergeOptions(protect=("refiner",))


def merge(output: Path, options: MergeOptions = PROTECTED) -> Path:
    with job.open_merge("'alk.safetensors' + 20 * ('a.safetensors' - 'b.safetensors')", options) as plan:
        job.run_merge(plan, output)
    return output


def rewritten(path: Path, change: Callable[[dict[str, object]], None], **metadata: str) -> None:
    """The file again with other tensors or metadata, as another program would save it."""
    with safe_open(path, "pt") as file:
        kept = dict(file.metadata())
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {**kept, **metadata})


@pytest.mark.parametrize(
    "options",
    [
        MergeOptions(),
        PROTECTED,
        MergeOptions(layout="diffusers"),
        MergeOptions(multipliers=(("attention", Fraction(1, 2)),), exclude=("layers.0",)),
        MergeOptions(rounding="stochastic", seed=77, dtype=dtypes.F8_E4M3),
        MergeOptions(rounding="error-feedback", layout="diffusers"),
    ],
)
def test_a_fresh_merge_is_sound(family: Path, options: MergeOptions) -> None:
    found = check_weights(str(merge(family / "out.safetensors", options)))
    assert found.sound
    assert found.merged > 0
    with safe_open(family / "out.safetensors", "pt") as file:
        assert found.merged + found.kept == len(list(file.keys()))


def test_a_file_that_records_no_anchor_took_kept_tensors_from_its_first_input(family: Path) -> None:
    """As mergetool 0.1.0 wrote it at first: the text is in normal form, and its leftmost model is another one."""
    text = "ties('alk.safetensors', 'a.safetensors', base='b.safetensors', density=0.5)"
    out = family / "out.safetensors"
    with job.open_merge(text, MergeOptions(exclude=("pad",), keep_from="alk.safetensors")) as plan:
        job.run_merge(plan, out)
    with safe_open(out, "pt") as file:
        recipe, inputs = (json.loads(file.metadata()[f"mergetool.{key}"]) for key in ("recipe", "inputs"))
    assert recipe["expression"].startswith("b ")
    old = {key: value for key, value in recipe.items() if key not in ("anchor", "from")}
    inputs.sort(key=lambda entry: entry["name"] != "alk")
    rewritten(
        out, lambda tensors: None, **{"mergetool.recipe": json.dumps(old), "mergetool.inputs": json.dumps(inputs)}
    )
    assert check_weights(str(out)).sound


def with_seed(out: Path, seed: str) -> Path:
    """A stochastically rounded merge whose recipe says another seed than it was made with."""
    merge(out, MergeOptions(rounding="stochastic", seed=3))
    with safe_open(out, "pt") as file:
        recipe = file.metadata()["mergetool.recipe"]
    assert '"seed": 3' in recipe
    rewritten(out, lambda tensors: None, **{"mergetool.recipe": recipe.replace('"seed": 3', f'"seed": {seed}')})
    return out


def test_the_recorded_seed_is_part_of_what_the_bytes_should_be(family: Path) -> None:
    assert check_weights(str(with_seed(family / "3.safetensors", "3"))).sound
    assert check_weights(str(with_seed(family / "4.safetensors", "4"))).differing


@pytest.mark.parametrize("seed", ['"3"', "-3", "true", "3.0"])
def test_a_damaged_seed_is_named(family: Path, seed: str) -> None:
    with pytest.raises(DataError, match="seed"):
        check_weights(str(with_seed(family / "out.safetensors", seed)))


def test_every_byte_is_compared(family: Path) -> None:
    out = merge(family / "out.safetensors")
    tensors = load_file(out)
    assert check_weights(str(out)).bytes_compared == sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize("place", [0.0, 0.31, 0.77, 0.999])
def test_one_flipped_bit_is_found(family: Path, place: float) -> None:
    out = merge(family / "out.safetensors")
    data = bytearray(out.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + int(place * (len(data) - start - 1))] ^= 1
    out.write_bytes(data)
    found = check_weights(str(out))
    assert not found.sound
    assert len(found.differing) == 1


def test_differing_tensors_stand_in_the_file_s_order_whichever_was_compared_first(family: Path) -> None:
    with Checkpoint.open(family / "a.safetensors") as opened:
        first, second = list(opened.tensors)[:2]
        comparer = Comparer(opened)
        for name in (second, first):
            comparer.write(name, 0, memoryview(bytes([opened.read(name, 0, 1)[0] ^ 1])))
    assert list(comparer.differing.items()) == [(first, 0), (second, 0)]


def test_two_swapped_tensors_are_both_named(family: Path) -> None:
    out = merge(family / "out.safetensors")
    one, other = "layers.0.feed_forward.w1.weight", "layers.1.feed_forward.w1.weight"

    def swap(tensors: dict[str, object]) -> None:
        tensors[one], tensors[other] = tensors[other], tensors[one]

    rewritten(out, swap)
    assert check_weights(str(out)).differing.keys() == {one, other}


def test_a_dropped_and_an_added_tensor_are_named(family: Path) -> None:
    out = merge(family / "out.safetensors")

    def change(tensors: dict[str, object]) -> None:
        tensors["norm_final.weight"] = tensors.pop("layers.0.attention_norm1.weight")

    rewritten(out, change)
    found = check_weights(str(out))
    assert (found.missing, found.extra, found.sound) == (
        ["layers.0.attention_norm1.weight"],
        ["norm_final.weight"],
        False,
    )


def test_an_input_that_was_replaced_is_named(family: Path) -> None:
    out = merge(family / "out.safetensors")
    (family / "b.safetensors").unlink()
    checkpoint(family / "b.safetensors", variant=9)
    found = check_weights(str(out))
    assert found.changed == ["b"]
    assert not found.sound


def test_inputs_that_moved_are_found_where_the_user_says(family: Path) -> None:
    out = merge(family / "out.safetensors")
    (family / "elsewhere").mkdir()
    (family / "a.safetensors").rename(family / "elsewhere" / "renamed.safetensors")
    with pytest.raises(InputMissing, match='"a" of the recipe'):
        check_weights(str(out))
    assert check_weights(str(out), inputs={"a": "elsewhere/renamed.safetensors"}).sound


def test_a_file_without_a_recipe_says_so(family: Path) -> None:
    with pytest.raises(DataError, match="carries no recipe"):
        check_weights("alk.safetensors")


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"expression": 1}', '{"expression": "alk +"}', "{" * 5000])
def test_a_damaged_recipe_is_an_error_not_a_crash(family: Path, damage: str) -> None:
    out = merge(family / "out.safetensors")
    rewritten(out, lambda tensors: None, **{"mergetool.recipe": damage})
    with pytest.raises(MergetoolError):
        check_weights(str(out))


def test_a_recipe_that_says_what_nobody_knows_is_not_verified(family: Path) -> None:
    """Its tensors may be those of what is known, as with "ancjor" for "anchor"; what else was done is not known."""
    out = merge(family / "out.safetensors")
    with Checkpoint.open(out) as checkpoint:
        recipe = checkpoint.metadata["mergetool.recipe"]
    rewritten(out, lambda tensors: None, **{"mergetool.recipe": recipe.replace("anchor", "ancjor")})
    with pytest.raises(DataError, match='"ancjor", which this mergetool does not know'):
        check_weights(str(out))


def test_nan_that_was_kept_is_named_and_does_not_stop_the_check(family: Path) -> None:
    name = "layers.0.attention.qkv.weight"
    tensors = load_file(family / "a.safetensors")
    tensors[name][0, 0] = float("nan")
    save_file(tensors, family / "a.safetensors")
    out = family / "out.safetensors"
    with job.open_merge("'alk.safetensors' + 20 * ('a.safetensors' - 'b.safetensors')", PROTECTED) as plan:
        job.run_merge(plan, out, non_finite="keep")
    found = check_weights(str(out))
    assert not found.sound
    assert found.non_finite == {name: 1}
    assert not found.differing
