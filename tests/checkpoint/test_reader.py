"""Opening models: one file, shards, cache folders, and everything that is not a safetensors file."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import load_file, save_file

from mergetool.checkpoint import reader
from mergetool.checkpoint.reader import SAMPLE, Checkpoint
from mergetool.errors import DataError, HeaderError, InputMissing, ShardIndexError, UsageError

Arrays = dict[str, numpy.ndarray[Any, Any]]


def arrays(*names: str, size: int = 6) -> Arrays:
    dice = numpy.random.default_rng(len(names))
    return {name: dice.standard_normal((2, size // 2)).astype(numpy.float32) for name in names}


def write_shards(folder: Path, parts: dict[str, Arrays], index: str = "model.safetensors.index.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in parts.items():
        save_file(tensors, folder / name, metadata={"format": "pt", "part": name})
    weight_map = {tensor: name for name, tensors in parts.items() for tensor in tensors}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file({**arrays("b", "a"), "c": numpy.arange(5, dtype=numpy.int8)}, tmp_path / "m.safetensors", {"k": "v"})
    return tmp_path / "m.safetensors"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "model", {"m-2.safetensors": arrays("a", "z"), "m-1.safetensors": arrays("q")})


# ---- reading


def test_every_tensor_reads_as_the_library_reads_it(single: Path) -> None:
    with Checkpoint.open(single) as checkpoint:
        expected = load_file(single)
        assert set(checkpoint.tensors) == set(expected)
        for name, array in expected.items():
            assert checkpoint.read(name) == array.tobytes()
            assert checkpoint.tensors[name].shape == array.shape
        assert checkpoint.metadata == {"k": "v"}
        assert checkpoint.container == "safetensors"
        assert checkpoint.source == str(single)
        assert checkpoint.config is None


def test_part_of_a_tensor(single: Path) -> None:
    with Checkpoint.open(str(single)) as checkpoint:
        whole = checkpoint.read("a")
        assert checkpoint.read("a", 4) == whole[4:]
        assert checkpoint.read("a", 4, 8) == whole[4:12]
        assert checkpoint.read("a", 24, 0) == b""
        for start, size in [(-1, 2), (0, 25), (24, 1), (25, None), (0, -1)]:
            with pytest.raises(ValueError, match='"a" has 24 bytes'):
                checkpoint.read("a", start, size)
        with pytest.raises(KeyError):
            checkpoint.read("unknown")


def test_locate_gives_the_absolute_offset(single: Path, sharded: Path) -> None:
    for path in (single, sharded):
        with Checkpoint.open(path) as checkpoint:
            for name in checkpoint.tensors:
                file, offset = checkpoint.locate(name)
                raw = file.path.read_bytes()
                assert raw[offset : offset + checkpoint.tensors[name].nbytes] == checkpoint.read(name)


def test_shards_read_as_one_model(sharded: Path) -> None:
    with Checkpoint.open(sharded) as checkpoint:
        assert list(checkpoint.tensors) == ["q", "a", "z"]  # shard after shard, by file name
        assert [file.path.name for file in checkpoint.files] == ["m-1.safetensors", "m-2.safetensors"]
        assert checkpoint.container == "sharded safetensors"
        for name, array in {**arrays("a", "z"), **arrays("q")}.items():
            assert checkpoint.read(name) == array.tobytes()
        assert checkpoint.metadata == {"format": "pt", "part": "m-1.safetensors"}


def test_an_index_can_be_named_itself(sharded: Path) -> None:
    with Checkpoint.open(sharded / "model.safetensors.index.json") as checkpoint:
        assert len(checkpoint.files) == 2


def test_a_file_of_no_tensors_opens(tmp_path: Path) -> None:
    save_file({}, tmp_path / "m.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert not checkpoint.tensors
        assert checkpoint.fingerprint().startswith("sample-sha256:")


def test_offsets_beyond_4_gib(tmp_path: Path) -> None:
    size = 2**32 + 8
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path = tmp_path / "m.safetensors"
    with open(path, "wb") as file:  # sparse: takes no room on the disk
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
        file.seek(8 + len(header) + size - 4)
        file.write(b"last")
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.read("a", size - 4) == b"last"
        assert checkpoint.read("a", size - 8, 4) == bytes(4)


# ---- Hugging Face cache


def as_cached(root: Path, folder: Path) -> Path:
    """The files of ``folder`` in the layout of the Hugging Face cache; returns the snapshot's folder."""
    repo = root / "models--org--repo"
    snapshot = repo / "snapshots" / ("0" * 40) / "transformer"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for file in folder.iterdir():
        blob = repo / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def test_a_cached_snapshot_opens_through_its_links(tmp_path: Path, sharded: Path) -> None:
    (sharded / "config.json").write_text('{"dim": 8}')
    with Checkpoint.open(as_cached(tmp_path, sharded)) as checkpoint:
        assert checkpoint.read("q") == arrays("q")["q"].tobytes()
        assert checkpoint.config == {"dim": 8}


@pytest.mark.parametrize("linked", ["m-1.safetensors", "model.safetensors.index.json", "config.json"])
def test_files_that_are_linked_into_a_folder_are_read(tmp_path: Path, sharded: Path, linked: str) -> None:
    (sharded / "config.json").write_text('{"model_type": "flux"}')
    (sharded / linked).rename(tmp_path / "elsewhere")
    (sharded / linked).symlink_to(tmp_path / "elsewhere")
    with Checkpoint.open(sharded) as checkpoint:
        assert (len(checkpoint.tensors), checkpoint.config) == (3, {"model_type": "flux"})


def test_a_linked_config_that_is_no_models_is_refused(tmp_path: Path, sharded: Path) -> None:
    (tmp_path / "settings.json").write_text('{"token": "secret"}')
    (sharded / "config.json").symlink_to(tmp_path / "settings.json")
    with pytest.raises(DataError, match="no model's config; remove the link"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("beside", ["m.safetensors.aria2", "m.safetensors.part", "m.safetensors.crdownload"])
def test_a_download_that_did_not_end_is_told_by_what_lies_beside_it(tmp_path: Path, sharded: Path, beside: str) -> None:
    whole = (sharded / "m-1.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(whole[:-4])
    (tmp_path / beside).touch()
    with pytest.raises(HeaderError, match=f'"{beside}" beside it is of a download that did not end'):
        Checkpoint.open(tmp_path / "m.safetensors")
    (tmp_path / "m.safetensors").write_bytes(whole)
    Checkpoint.open(tmp_path / "m.safetensors").close()


def test_a_part_of_a_download_is_told_by_its_name(tmp_path: Path, sharded: Path) -> None:
    (tmp_path / "m.safetensors.part").write_bytes((sharded / "m-1.safetensors").read_bytes()[:-4])
    with pytest.raises(HeaderError, match="a download that did not end"):
        Checkpoint.open(tmp_path / "m.safetensors.part")


# ---- config.json


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[]", "not a JSON object"),
        ("{", "syntax error"),
        ('{"a":1,"a":2}', '"a" twice'),
        ('{"a":NaN}', "NaN"),
        ("[" * 100_000, "nested too deeply"),
        (" " * 1_000_001, "1000001 bytes, but the limit"),
    ],
    ids=lambda text: text[:20],
)
def test_a_bad_config_is_refused(sharded: Path, text: str, part: str) -> None:
    (sharded / "config.json").write_text(text)
    with pytest.raises(DataError) as caught:
        Checkpoint.open(sharded)
    assert part in str(caught.value)
    assert 'config.json"' in str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.safetensors", {"dim": 8}),
        ("diffusion_pytorch_model.fp16.safetensors", {"dim": 8}),
        ("z.safetensors", None),
    ],
)
def test_a_config_belongs_to_a_file_with_a_diffusers_name(
    tmp_path: Path, name: str, expected: dict[str, int] | None
) -> None:
    (tmp_path / "config.json").write_text('{"dim": 8}')
    save_file(arrays("a"), tmp_path / name)
    with Checkpoint.open(tmp_path / name) as checkpoint:
        assert checkpoint.config == expected


# ---- files that are something else


class Canary:
    """A pickle of this makes the folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def torch_zip(payload: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3")
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["m.safetensors", "m.ckpt", "m.pt", "m.bin", "m"])
@pytest.mark.parametrize("kind", ["2", "3", "4", "5", "zip", "empty zip"])
def test_a_pickle_is_never_loaded_whatever_its_name(tmp_path: Path, kind: str, name: str) -> None:
    canary = tmp_path / "loaded"
    if kind == "empty zip":
        content = b"PK\x05\x06" + bytes(18)
    elif kind == "zip":
        content = torch_zip(pickle.dumps(Canary(canary)))
    else:
        content = pickle.dumps(Canary(canary), protocol=int(kind))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match="never loaded; convert it to safetensors"):
        Checkpoint.open(tmp_path / name)
    assert not canary.exists()
    if content.startswith(b"\x80"):  # proof that the canary works
        pickle.loads(content)
        assert canary.exists()


@pytest.mark.parametrize("protocol", [0, 1])
def test_an_ancient_pickle_is_no_header_either(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "m.safetensors").write_bytes(pickle.dumps(Canary(tmp_path / "loaded"), protocol=protocol))
    with pytest.raises(HeaderError, match="damaged or not a safetensors file"):
        Checkpoint.open(tmp_path / "m.safetensors")
    assert not (tmp_path / "loaded").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_a_header_whose_length_looks_like_a_pickle_opens(tmp_path: Path, protocol: int) -> None:
    length = 0x80 + 0x100 * protocol
    (tmp_path / "m").write_bytes(struct.pack("<Q", length) + b"{}".ljust(length))
    assert (tmp_path / "m").read_bytes()[:2] == bytes([0x80, protocol])
    with Checkpoint.open(tmp_path / "m") as checkpoint:
        assert checkpoint.files[0].size == 8 + length


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>" + bytes(50), "web page"),
        (b"", "has 0 bytes"),
        (b"\x02\0\0\0\0\0\0", "has 7 bytes"),
        (b"\x03\0\0\0\0\0\0\0{}", "only 2 follow"),
        (b"\x02\0\0\0\0\0\0\0{}x", "1 extra bytes at its end"),
        (b"\n\n<html>" + bytes(50), "web page"),
        (b'{"error":"Unauthorized"}', "JSON text"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "picture"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(50), "archive"),
        (bytes(1000), "begins with zeros"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_other_content_is_refused_by_name(tmp_path: Path, content: bytes, part: str) -> None:
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(DataError) as caught:
        Checkpoint.open(tmp_path)
    assert part in str(caught.value)
    assert str(caught.value).startswith(f'"{tmp_path}/m.safetensors"')


def test_what_is_not_there_is_missing(tmp_path: Path, sharded: Path) -> None:
    with pytest.raises(InputMissing, match="does not exist"):
        Checkpoint.open(tmp_path / "none.safetensors")
    (sharded / "m-2.safetensors").unlink()
    with pytest.raises(InputMissing, match=r"m-2\.safetensors"):
        Checkpoint.open(sharded)


def test_odd_files_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.safetensors")
    with pytest.raises(DataError, match="FIFO"):
        Checkpoint.open(tmp_path)


def test_a_folder_of_several_models_is_refused(single: Path) -> None:
    save_file(arrays("x"), single.parent / "other.safetensors")
    with pytest.raises(UsageError, match="name one of them"):
        Checkpoint.open(single.parent)


# ---- shards that lie


opened_paths: list[str] = []
watching = False


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if watching and event == "open":
        opened_paths.append(str(arguments[0]))


sys.addaudithook(_watch)


@pytest.fixture
def opens() -> Iterator[list[str]]:
    """Every path the interpreter opens during the test."""
    global watching
    opened_paths.clear()
    watching = True
    yield opened_paths
    watching = False


@pytest.mark.parametrize("name", ["../secret.safetensors", "sub/../../secret.safetensors", "{}", "sub/x.safetensors"])
def test_a_shard_name_cannot_lead_out_of_the_folder(sharded: Path, opens: list[str], name: str) -> None:
    secret = sharded.parent / "secret.safetensors"
    save_file(arrays("s"), secret)
    (sharded / "sub").mkdir()
    index = {"weight_map": {"q": "m-1.safetensors", "s": name.format(secret)}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    opens.clear()
    with pytest.raises(ShardIndexError):
        Checkpoint.open(sharded)
    assert [Path(path).name for path in opens] == ["model.safetensors.index.json"]


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    save_file(arrays("q", "a"), sharded / "m-1.safetensors")
    with pytest.raises(ShardIndexError, match=r'tensor "a" is in "m-1\.safetensors", but the index says'):
        Checkpoint.open(sharded)


def test_a_shard_of_another_model_is_refused(sharded: Path) -> None:
    save_file(arrays("other"), sharded / "m-1.safetensors")
    with pytest.raises(ShardIndexError, match=r'"q" is in "m-1\.safetensors", but it is not'):
        Checkpoint.open(sharded)


def test_a_pickled_shard_is_refused(sharded: Path) -> None:
    (sharded / "m-2.safetensors").write_bytes(torch_zip(b""))
    with pytest.raises(DataError, match="never loaded"):
        Checkpoint.open(sharded)


def test_the_headers_of_all_shards_are_limited_together(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_HEADER", 200)
    with pytest.raises(ShardIndexError, match="exceed 200 bytes together"):
        Checkpoint.open(sharded)


def test_a_failed_opening_leaves_no_file_open(sharded: Path) -> None:
    before = os.listdir("/proc/self/fd")
    save_file(arrays("other"), sharded / "m-2.safetensors")
    with pytest.raises(ShardIndexError):
        Checkpoint.open(sharded)
    assert os.listdir("/proc/self/fd") == before


def test_a_change_of_any_shard_is_noticed(sharded: Path) -> None:
    with Checkpoint.open(sharded) as checkpoint:
        checkpoint.check_unchanged()
        os.utime(sharded / "m-2.safetensors", (0, 0))
        with pytest.raises(DataError, match="changed while it was read"):
            checkpoint.check_unchanged()


# ---- fingerprints


def fingerprint(path: Path) -> str:
    with Checkpoint.open(path) as checkpoint:
        return checkpoint.fingerprint()


def test_the_fingerprint_does_not_depend_on_place_order_or_sharding(tmp_path: Path) -> None:
    tensors = arrays("a", "b", "c", size=200_000)
    metadata = {"format": "pt"}
    save_file(tensors, tmp_path / "one.safetensors", metadata)
    (tmp_path / "far").mkdir()
    save_file(dict(reversed(tensors.items())), tmp_path / "far" / "two.safetensors", metadata)
    folder = tmp_path / "sharded"
    folder.mkdir()
    for number, name in enumerate("bac"):
        save_file({name: tensors[name]}, folder / f"{number}.safetensors", metadata)
    weight_map = {name: f"{number}.safetensors" for number, name in enumerate("bac")}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    prints = {fingerprint(path) for path in (tmp_path / "one.safetensors", tmp_path / "far", folder)}
    assert len(prints) == 1
    assert prints.pop().startswith("sample-sha256:")


def test_the_fingerprint_is_fixed_for_all_versions(tmp_path: Path) -> None:
    """Written out once: outputs carry fingerprints, and a later version must still know its inputs."""
    save_file({"a": numpy.arange(4, dtype=numpy.float32)}, tmp_path / "m.safetensors", {"k": "v"})
    sample = hashlib.sha256(numpy.arange(4, dtype=numpy.float32).tobytes()).hexdigest()
    table = f'[[["a","F32",[4],"{sample}"]],[["k","v"]]]'
    assert fingerprint(tmp_path) == f"sample-sha256:{hashlib.sha256(table.encode()).hexdigest()}"


@pytest.mark.parametrize("where", ["start", "middle", "end"])
def test_the_fingerprint_sees_an_edit_in_every_sample(tmp_path: Path, where: str) -> None:
    size = 10 * SAMPLE
    data = numpy.zeros(size, dtype=numpy.uint8)
    save_file({"a": data}, tmp_path / "m.safetensors")
    before = fingerprint(tmp_path)
    data[{"start": 0, "middle": size // 2, "end": size - 1}[where]] = 1
    save_file({"a": data}, tmp_path / "m.safetensors")
    assert fingerprint(tmp_path) != before


def test_the_fingerprint_sees_every_byte_of_a_small_tensor(tmp_path: Path) -> None:
    data = numpy.zeros(3 * SAMPLE, dtype=numpy.uint8)
    prints = set()
    for position in (0, SAMPLE - 1, SAMPLE, SAMPLE + SAMPLE // 2, 2 * SAMPLE - 1, 2 * SAMPLE, 3 * SAMPLE - 1):
        data[:] = 0
        data[position] = 1
        save_file({"a": data}, tmp_path / "m.safetensors")
        prints.add(fingerprint(tmp_path))
    assert len(prints) == 7


def test_the_fingerprint_sees_names_shapes_dtypes_and_metadata(tmp_path: Path) -> None:
    ones = numpy.ones(4, dtype=numpy.float32)
    variants: list[tuple[Arrays, dict[str, str] | None]] = [
        ({"a": ones}, None),
        ({"b": ones}, None),
        ({"a": ones.reshape(2, 2)}, None),
        ({"a": ones.view(numpy.int32)}, None),
        ({"a": ones}, {"k": "v"}),
        ({"a": ones}, {"kv": ""}),
        ({"a": ones[:2], "b": ones[2:]}, None),
        ({"a": ones[:3], "b": ones[3:]}, None),
    ]
    prints = set()
    for tensors, metadata in variants:
        save_file(tensors, tmp_path / "m.safetensors", metadata)
        prints.add(fingerprint(tmp_path))
    assert len(prints) == len(variants)


def test_the_fingerprint_reads_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": numpy.zeros(4_000_000, dtype=numpy.uint8)}, tmp_path / "m.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        read = 0

        def counted(name: str, start: int, size: int) -> bytes:
            nonlocal read
            read += size
            return Checkpoint.read(checkpoint, name, start, size)

        monkeypatch.setattr(checkpoint, "read", counted)
        checkpoint.fingerprint()
    assert read == 3 * SAMPLE


# ---- whole-file hashes


def test_sha256_is_that_of_the_file_and_reports_progress(tmp_path: Path) -> None:
    save_file(
        {"a": numpy.random.default_rng(0).integers(0, 255, 20_000_000, dtype=numpy.uint8)}, tmp_path / "m.safetensors"
    )
    steps: list[int] = []
    with Checkpoint.open(tmp_path) as checkpoint:
        digests = checkpoint.sha256(steps.append)
    raw = (tmp_path / "m.safetensors").read_bytes()
    assert digests == {"m.safetensors": hashlib.sha256(raw).hexdigest()}
    assert sum(steps) == len(raw)
    assert len(steps) == 3


def test_sha256_of_shards_is_one_for_each(sharded: Path) -> None:
    with Checkpoint.open(sharded) as checkpoint:
        assert checkpoint.sha256() == {
            name: hashlib.sha256((sharded / name).read_bytes()).hexdigest()
            for name in ("m-1.safetensors", "m-2.safetensors")
        }


@pytest.mark.parametrize("named", ["folder", "m-1.safetensors"])
def test_a_link_that_the_user_names_is_followed_anywhere(tmp_path: Path, sharded: Path, named: str) -> None:
    meant = sharded if named == "folder" else sharded / named
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to(meant)
    with Checkpoint.open(tmp_path / "elsewhere" / "link") as checkpoint, Checkpoint.open(meant) as direct:
        assert list(checkpoint.tensors) == list(direct.tensors)
