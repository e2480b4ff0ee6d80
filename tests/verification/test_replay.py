"""A replay compares every byte of every file with what the recorded recipe makes, and says why where one is another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest

from mergetool.checkpoint import dtypes
from mergetool.engine import job
from mergetool.errors import DataError, UsageError
from mergetool.options.merging import MergeOptions
from mergetool.verification.replay import Replay, replay
from tests.families import checkpoint

EXPRESSION = "'alk.safetensors' + 20 * ('a.safetensors' - 'b.safetensors')"


def merged(target: Path, options: MergeOptions | None = None, shard_size: int | None = None) -> Path:
    with job.open_merge(EXPRESSION, options or MergeOptions(protect=("refiner",))) as plan:
        job.run_merge(plan, f"{target}/" if target.suffix == "" else target, shard_size=shard_size)
    return target


def again(target: Path) -> Replay:
    return replay(str(target))


@pytest.mark.parametrize(
    "options",
    [
        MergeOptions(),
        MergeOptions(protect=("refiner",), keep_from="b.safetensors"),
        MergeOptions(layout="diffusers", multipliers=(("attention", Fraction(1, 3)),)),
        MergeOptions(rounding="stochastic", seed=5, dtype=dtypes.F8_E4M3),
        MergeOptions(quant="fp8-scaled", scale_search=True),
    ],
)
def test_a_fresh_merge_is_the_same_bytes(family: Path, options: MergeOptions) -> None:
    found = again(merged(family / "out.safetensors", options))
    assert (found.same, found.files, found.size) == (True, 1, (family / "out.safetensors").stat().st_size)


@pytest.mark.parametrize("shard_size", [1, 100_000, 150_001, 300_000, 10**9, None])
def test_a_folder_is_the_same_in_every_file(family: Path, shard_size: int | None) -> None:
    target = merged(family / "out", shard_size=shard_size)
    found = again(target)
    assert (found.same, found.files) == (True, len(list(target.iterdir())))


def flipped(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def with_metadata(path: Path, change: Callable[[dict[str, str]], None]) -> None:
    """The file with other metadata and the same tensors, its header of the length that it needs."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header["__metadata__"])
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-(8 + len(text)) // 64) * 64 - 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def test_every_single_flipped_bit_of_the_tensors_is_found(family: Path) -> None:
    out = merged(family / "out.safetensors")
    good = out.read_bytes()
    start = 8 + int.from_bytes(good[:8], "little")
    for place in (start, start + 12_345, len(good) - 1):
        flipped(out, place)
        found = again(out)
        assert (found.same, len(found.differing), found.reasons) == (False, 1, [])
        out.write_bytes(good)


def test_a_blank_of_the_header_is_a_byte_too(family: Path) -> None:
    out = merged(family / "out.safetensors")
    data = bytearray(out.read_bytes())
    length = int.from_bytes(data[:8], "little")
    assert data[8 + length - 1 : 8 + length] == b" "
    data[8 + length - 1] = ord("\n")
    out.write_bytes(data)
    found = again(out)
    assert (found.same, found.reasons, found.differing) == (False, [], {})
    assert found.difference == f'"out.safetensors" differs at byte {8 + length - 1}, before its tensors'


def test_a_changed_input_is_named(family: Path) -> None:
    out = merged(family / "out.safetensors")
    (family / "b.safetensors").unlink()
    checkpoint(family / "b.safetensors", variant=9)
    found = again(out)
    assert (found.same, found.reasons) == (False, ['the input "b" has changed'])


def test_another_version_is_named(family: Path) -> None:
    out = merged(family / "out.safetensors")
    with_metadata(out, lambda metadata: metadata.update({"mergetool.version": "0.0.7"}))
    found = again(out)
    assert not found.same
    assert found.reasons[0].startswith("it was made by mergetool 0.0.7, and this is ")
    assert found.differing == {}


def test_an_edited_recipe_is_not_what_is_in_the_file(family: Path) -> None:
    out = merged(family / "out.safetensors")
    with_metadata(
        out, lambda metadata: metadata.update({"mergetool.recipe": metadata["mergetool.recipe"].replace("20*", "21*")})
    )
    found = again(out)
    assert not found.same
    assert found.differing
    assert found.reasons == []


def test_a_recipe_written_in_another_way_is_named(family: Path) -> None:
    out = merged(family / "out.safetensors")
    with_metadata(
        out, lambda metadata: metadata.update({"mergetool.recipe": metadata["mergetool.recipe"].replace('": ', '":')})
    )
    found = again(out)
    assert (found.same, found.reasons) == (False, ["its recipe is written in another way"])


def test_additional_metadata_is_named(family: Path) -> None:
    out = merged(family / "out.safetensors")
    with_metadata(out, lambda metadata: metadata.update({"author": "somebody"}))
    assert again(out).reasons == ['its metadata has an additional "author"']


def test_a_damaged_index_and_a_file_too_many_are_found(family: Path) -> None:
    target = merged(family / "out", shard_size=100_000)
    (target / "README.md").write_text("mine")
    assert again(target).difference == '"README.md" is not part of it'
    (target / "README.md").unlink()
    index = target / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(index.read_text().replace("\n", "\n "))
    assert again(target).difference.startswith('"diffusion_pytorch_model.safetensors.index.json" differs at byte ')


def test_what_comes_out_can_be_kept(family: Path) -> None:
    out = merged(family / "out.safetensors")
    good = out.read_bytes()
    flipped(out, len(good) - 1)
    found = replay(str(out), write_to=family / "again.safetensors")
    assert not found.same
    assert (family / "again.safetensors").read_bytes() == good


def test_a_folder_is_kept_as_a_folder(family: Path) -> None:
    target = merged(family / "out", shard_size=100_000)
    assert replay(str(target), write_to=family / "again").same
    for path in target.iterdir():
        assert (family / "again" / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(UsageError, match="folder"):
        replay(str(target), write_to=family / "again.safetensors")


def test_a_copy_elsewhere_needs_to_be_told_where_its_inputs_are(family: Path) -> None:
    merged(family / "out.safetensors")
    (family / "far").mkdir()
    for name in ("alk", "a", "b", "out"):
        shutil.move(family / f"{name}.safetensors", family / "far" / f"{name}.safetensors")
    assert again(family / "far" / "out.safetensors").same  # they lie beside it
    (family / "far" / "a.safetensors").rename(family / "z.safetensors")
    assert replay("far/out.safetensors", inputs={"a": "z.safetensors"}).same


def test_a_file_without_recipe_says_so(family: Path) -> None:
    with pytest.raises(DataError, match="carries no recipe"):
        replay("alk.safetensors")
