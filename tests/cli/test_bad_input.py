"""Bad input: one sentence, the exit code of its class, no output, and inputs as they were."""

from __future__ import annotations

import json
import pickle
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.run import Ran, mergetool
from tests.families import checkpoint

MERGE = "'alk.safetensors' + 20*('a.safetensors' - 'b.safetensors')"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    for seed, name in enumerate(["alk", "a", "b"]):
        checkpoint(folder / f"{name}.safetensors", variant=seed)
    return folder


@pytest.fixture
def family(originals: Path, tmp_path: Path) -> Path:
    for path in originals.iterdir():
        shutil.copy(path, tmp_path)
    return tmp_path


def header_of(path: Path) -> tuple[dict[str, dict[str, object]], bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(path: Path, header: dict[str, object] | str, data: bytes) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def truncated(folder: Path) -> None:
    path = folder / "a.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def overlapping(folder: Path) -> None:
    header, data = header_of(folder / "a.safetensors")
    names = [name for name in header if name != "__metadata__"]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    with_header(folder / "a.safetensors", header, data)


def duplicate_name(folder: Path) -> None:
    header, data = header_of(folder / "a.safetensors")
    text = json.dumps(header)
    name = next(name for name in header if name != "__metadata__")
    entry = json.dumps({name: header[name]})[1:-1]
    with_header(folder / "a.safetensors", text[:-1] + ", " + entry + "}", data)


def oversized_header(folder: Path) -> None:
    path = folder / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 200_000_000) + path.read_bytes()[8:])


def nan_carrying(folder: Path) -> None:
    tensors = load_file(folder / "a.safetensors")
    tensors["layers.0.feed_forward.w1.weight"][3, 4] = torch.nan
    save_file(tensors, folder / "a.safetensors")


def wrong_shape(folder: Path) -> None:
    tensors = load_file(folder / "a.safetensors")
    tensors["layers.0.feed_forward.w1.weight"] = torch.zeros(8, 64, dtype=torch.bfloat16)
    save_file(tensors, folder / "a.safetensors")


def pickle_renamed(folder: Path) -> None:
    (folder / "a.safetensors").write_bytes(pickle.dumps({"weight": [1.0]}))


def zip_pickle_renamed(folder: Path) -> None:
    torch.save({"weight": torch.ones(2)}, folder / "a.safetensors")


def index_pointing_outside(folder: Path) -> None:
    (folder / "a.safetensors").unlink()
    shards = folder / "a.safetensors"
    shards.mkdir()
    index = {"metadata": {}, "weight_map": {"x": "../alk.safetensors"}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))


def missing_file(folder: Path) -> None:
    (folder / "a.safetensors").unlink()


def empty_file(folder: Path) -> None:
    (folder / "a.safetensors").write_bytes(b"")


def trailing_bytes(folder: Path) -> None:
    with (folder / "a.safetensors").open("ab") as file:
        file.write(b"xyz")


def scaled_fp8(folder: Path) -> None:
    tensors = load_file(folder / "a.safetensors")
    tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    tensors["layers.0.feed_forward.w1.scale_weight"] = torch.ones(())
    save_file(tensors, folder / "a.safetensors")


def controlnet(folder: Path) -> None:
    save_file({"control_layers.0.attention.to_q.weight": torch.ones(4, 4)}, folder / "a.safetensors")


def lora_file(folder: Path) -> None:
    save_file({"diffusion_model.layers.0.attention.to_q.lora_A.weight": torch.ones(4, 4)}, folder / "a.safetensors")


@pytest.mark.parametrize(
    ("spoil", "code", "words"),
    [
        (truncated, 65, ["a.safetensors"]),
        (overlapping, 65, ["a.safetensors"]),
        (duplicate_name, 65, ["a.safetensors"]),
        (oversized_header, 65, ["a.safetensors", "200000000"]),
        (nan_carrying, 65, ["a.safetensors", "layers.0.feed_forward.w1.weight", "NaN"]),
        (wrong_shape, 65, ["layers.0.feed_forward.w1.weight", "[8, 64]", "--exclude"]),
        (pickle_renamed, 65, ["a.safetensors", "pickle"]),
        (zip_pickle_renamed, 65, ["a.safetensors", "pickle"]),
        (index_pointing_outside, 65, ["../alk.safetensors"]),
        (missing_file, 66, ["a.safetensors"]),
        (empty_file, 65, ["a.safetensors"]),
        (trailing_bytes, 65, ["a.safetensors", "3"]),
        (scaled_fp8, 65, ["a.safetensors", "scale"]),
        (controlnet, 65, ["a.safetensors", "ControlNet"]),
        (lora_file, 65, ["a.safetensors", "LoRA"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_bad_input_is_refused(family: Path, spoil: Callable[[Path], None], code: int, words: list[str]) -> None:
    spoil(family)
    before = {path: path.read_bytes() for path in family.rglob("*") if path.is_file()}
    ran = mergetool("merge", MERGE, "-o", "out.safetensors", cwd=family)
    assert_refused(ran, code, words)
    assert {path: path.read_bytes() for path in family.rglob("*") if path.is_file()} == before


def assert_refused(ran: Ran, code: int, words: list[str]) -> None:
    assert ran.code == code, ran
    assert ran.err.startswith("mergetool: ")
    assert ran.err.count("\n") == 1
    assert all(word in ran.err for word in words), ran.err


def test_the_target_may_not_be_an_input(family: Path) -> None:
    before = (family / "alk.safetensors").read_bytes()
    ran = mergetool("merge", MERGE, "-o", "alk.safetensors", "--overwrite", cwd=family)
    assert_refused(ran, 73, ["alk.safetensors"])
    assert (family / "alk.safetensors").read_bytes() == before


def test_an_existing_target_needs_overwrite(family: Path) -> None:
    (family / "out.safetensors").write_bytes(b"precious")
    assert_refused(mergetool("merge", MERGE, "-o", "out.safetensors", cwd=family), 73, ["--overwrite"])
    assert (family / "out.safetensors").read_bytes() == b"precious"


def test_a_missing_output_folder_is_named(family: Path) -> None:
    assert_refused(mergetool("merge", MERGE, "-o", "nowhere/out.safetensors", cwd=family), 73, ["nowhere"])


def test_no_output_is_a_usage_error(family: Path) -> None:
    assert_refused(mergetool("merge", MERGE, cwd=family), 2, ["-o"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["'alk.safetensors' + 'a.safetensors'"], ["two whole models"]),
        ([MERGE, "--set", "layers"], ["GROUP=MULT"]),
        ([MERGE, "--set", "layers=nan"], ["finite"]),
        ([MERGE, "--protect", "nothing-like-this"], ["refiner"]),
        ([MERGE, "--dtype", "float32"], ["fp32"]),
        ([MERGE, "--reader", "psychic"], ["pread"]),
        ([MERGE, "--shard-size", "big"], ["300MB"]),
        ([MERGE, "--layout", "sideways"], ["diffusers"]),
        ([MERGE, "--rounding", "up"], ["nearest", "error-feedback"]),
        ([MERGE, "--seed", "3"], ["draws no random numbers"]),
    ],
)
def test_a_wrong_option_is_a_usage_error(family: Path, arguments: list[str], words: list[str]) -> None:
    assert_refused(mergetool("merge", *arguments, "-o", "out.safetensors", cwd=family), 2, words)
    assert not (family / "out.safetensors").exists()


def test_a_full_disk_is_one_sentence_and_leaves_nothing(family: Path) -> None:
    """A file size limit stands for the full disk: the same short write, then an error."""
    program = Path(sys.executable).with_name("mergetool")
    done = subprocess.run(
        [program, "merge", MERGE, "-o", "out.safetensors"],
        cwd=family,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)),
    )
    assert_refused(Ran(done.returncode, done.stdout, done.stderr), 73, ["out.safetensors"])
    assert not [path for path in family.iterdir() if "out" in path.name]


@pytest.mark.parametrize("spoil", [truncated, nan_carrying, wrong_shape, pickle_renamed, missing_file])
def test_diff_refuses_as_merge_does(family: Path, spoil: Callable[[Path], None]) -> None:
    spoil(family)
    ran = mergetool(
        "diff", "--base", "alk.safetensors", "--variant", "a.safetensors", "-o", "l.safetensors", cwd=family
    )
    assert_refused(ran, 66 if spoil is missing_file else 65, [])
    assert not (family / "l.safetensors").exists()


def test_names_from_files_cannot_steer_the_terminal(family: Path) -> None:
    save_file({"evil\x1b[2Jname\u202e.weight": torch.ones(4, 4)}, family / "a.safetensors")
    ran = mergetool("inspect", "a.safetensors", "-v", cwd=family)
    assert ran.code == 0
    assert "\x1b" not in ran.out
    assert "\u202e" not in ran.out
    assert "evil\\x1b[2Jname" in ran.out
