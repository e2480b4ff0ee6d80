"""GGUF: what the ``gguf`` package wrote is read as it reads it, from headers that are checked first."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergetool import packages
from mergetool.checkpoint.gguf import _BLOCKS as BLOCKS
from mergetool.checkpoint.gguf import GgufHeader
from mergetool.checkpoint.reader import Checkpoint
from mergetool.errors import DataError, HeaderError
from tests import absent
from tests.quant.files import encodings, values
from tests.quant.ggml import Q, packed, write

BLOCKED = [Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q4_K, Q.TQ1_0, Q.TQ2_0, Q.MXFP4]
PLAIN = [Q.F32, Q.F16, Q.BF16]


def dequantised(kind: Q) -> bool:
    """Whether the package turns a type back into floats."""
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


RANDOM = [kind for kind in Q if dequantised(kind) and kind not in (*PLAIN, *BLOCKED)]
ABSENT = [Q.Q8_1, Q.Q8_K, Q.Q1_0]


def matrix(rows: int = 5, columns: int = 512) -> np.ndarray:
    return (np.random.default_rng(3).standard_normal((rows, columns)) * 0.02).astype(np.float32)


@pytest.mark.parametrize("kind", BLOCKED, ids=lambda kind: kind.name)
def test_blocks_are_read_as_the_package_reads_them(tmp_path: Path, kind: Q) -> None:
    path = write(tmp_path / "f.gguf", {"a.weight": (matrix(), kind), "a.bias": (matrix(1)[0], Q.F32)})
    np.testing.assert_array_equal(values(path), gguf.quants.dequantize(packed(matrix(), kind), kind))


@pytest.mark.parametrize("kind", RANDOM, ids=lambda kind: kind.name)
def test_types_the_package_only_reads_are_read_too(tmp_path: Path, kind: Q) -> None:
    """Bytes are random but for the half-precision scales, so that nothing overflows."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(1).integers(0, 60, (5, 512 // block * size)).astype(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "f.gguf", "lumina2")
    writer.add_tensor("a.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    np.testing.assert_array_equal(values(tmp_path / "f.gguf"), gguf.quants.dequantize(raw, kind))


def test_q4_k_of_the_tests_is_close_to_the_weights() -> None:
    back = gguf.quants.dequantize(packed(matrix(), Q.Q4_K), Q.Q4_K)
    assert np.linalg.norm(back - matrix()) < 0.08 * np.linalg.norm(matrix())


def test_no_type_of_the_package_is_unknown_here() -> None:
    """A type that a newer package brings has to be in the table, read or refused by name."""
    whole = {Q.I8, Q.I16, Q.I32, Q.I64, Q.F64}
    assert set(Q) == {*PLAIN, *BLOCKED, *RANDOM, *ABSENT, *whole}
    assert {kind.value: (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in set(Q) - whole - set(PLAIN)} == {
        number: (one.name, one.block, one.nbytes) for number, one in BLOCKS.items()
    }


@pytest.mark.parametrize("kind", [Q.F32, Q.BF16, Q.Q8_0, Q.Q5_1], ids=lambda kind: kind.name)
@pytest.mark.parametrize("noted", [False, True])
def test_five_dimensions_are_read_as_such_or_flattened_with_a_note(tmp_path: Path, kind: Q, noted: bool) -> None:
    """ggml has four; converters write a fifth all the same, or fold the kernel and note the shape for ComfyUI."""
    shape, values_ = (6, 4, 2, 4, 64), matrix(6 * 4 * 2 * 4, 64)
    stored = packed(values_, kind)
    held = (6 * 4 * 2, 4) if noted else shape[:-1]
    writer = gguf.GGUFWriter(tmp_path / "f.gguf", "wan")
    if noted:
        writer.add_array("comfy.gguf.orig_shape.patch_embedding.weight", list(shape))
    writer.add_tensor("patch_embedding.weight", stored.reshape(*held, -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = gguf.quants.dequantize(stored, kind)
    with Checkpoint.open(tmp_path / "f.gguf") as checkpoint:
        found = encodings(checkpoint)
        if kind in PLAIN:
            assert checkpoint.tensors["patch_embedding.weight"].shape == shape
            assert checkpoint.read("patch_embedding.weight") == stored.tobytes()
        else:
            assert found["patch_embedding.weight"].shape == shape
            np.testing.assert_array_equal(
                found["patch_embedding.weight"].values(checkpoint.read).reshape(shape), expected.reshape(shape)
            )


@pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.name)
def test_plain_floats_are_plain_tensors_with_their_dimensions_the_usual_way_round(tmp_path: Path, kind: Q) -> None:
    with Checkpoint.open(write(tmp_path / "f.gguf", {"a.weight": (matrix(3, 7), kind)})) as checkpoint:
        info = checkpoint.tensors["a.weight"]
        assert (info.dtype.code, info.shape) == (kind.name, (3, 7))
        assert checkpoint.read("a.weight") == packed(matrix(3, 7), kind).tobytes()
        assert encodings(checkpoint) == {}
        assert checkpoint.container == "GGUF"
        assert checkpoint.metadata["general.architecture"] == "lumina2"


def test_without_the_package_one_line_says_how_to_get_it(tmp_path: Path) -> None:
    write(tmp_path / "f.gguf", {"a.weight": (matrix(), Q.Q8_0)})
    line = ["convert", "f.gguf", "-o", "out.safetensors"]
    (ended,), _ = absent.commands([line], tmp_path, absent.environment(tmp_path, absent=["gguf"]))
    assert ended.code == 69
    assert ended.err == (
        "mergetool: the package gguf is not installed, which GGUF files need; "
        f"install it: {packages.install(packages.named('gguf'))}\n"
    )


@pytest.mark.parametrize("kind", ABSENT, ids=lambda kind: kind.name)
def test_a_type_the_package_cannot_dequantise_is_refused_by_name(tmp_path: Path, kind: Q) -> None:
    raw = bytearray(write(tmp_path / "f.gguf", {"a.weight": (matrix(), Q.Q8_0)}).read_bytes())
    at = raw.index(struct.pack("<IQ", Q.Q8_0, 0))
    raw[at : at + 4] = struct.pack("<I", kind.value)
    (tmp_path / "g.gguf").write_bytes(raw + bytes(10_000))
    with (
        Checkpoint.open(tmp_path / "g.gguf") as checkpoint,
        pytest.raises(DataError, match=f"of GGUF type {kind.name}"),
    ):
        encodings(checkpoint)


@pytest.mark.parametrize(
    ("says", "old", "new"),
    [
        ("big-endian", b"GGUF\x03\x00\x00\x00", b"GGUF\x00\x00\x00\x03"),
        ("version 1", b"GGUF\x03\x00\x00\x00", b"GGUF\x01\x00\x00\x00"),
        ("unknown type 77", struct.pack("<IQ", Q.Q8_0, 0), struct.pack("<IQ", 77, 0)),
        ("cut short", struct.pack("<IQ", Q.Q8_0, 0), struct.pack("<IQ", Q.Q8_0, 1 << 30)),
        ("rows of whole blocks of 32", struct.pack("<QQ", 512, 5), struct.pack("<QQ", 511, 5)),
        ("fits no disk", struct.pack("<QQ", 512, 5), struct.pack("<QQ", 1 << 60, 5)),
        ("goes beyond", struct.pack("<Q", 8) + b"a.weight", struct.pack("<Q", 1 << 62) + b"a.weight"),
        ("not UTF-8", b"a.weight", b"a.wei\xff\xfft"),
    ],
)
def test_a_broken_header_is_refused_in_one_sentence(tmp_path: Path, says: str, old: bytes, new: bytes) -> None:
    raw = write(tmp_path / "f.gguf", {"a.weight": (matrix(), Q.Q8_0)}).read_bytes()
    assert raw.count(old) == 1
    (tmp_path / "g.gguf").write_bytes(raw.replace(old, new))
    with pytest.raises(HeaderError, match=says):
        Checkpoint.open(tmp_path / "g.gguf")


def test_every_cut_of_a_header_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "f.gguf", {"a.weight": (matrix(), Q.Q8_0)})
    raw = path.read_bytes()
    for size in range(4, len(raw), 7):
        with pytest.raises(HeaderError):
            GgufHeader.read(lambda at, count, size=size: raw[:size][at : at + count], file_size=size, source="f")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_mutated_header_is_read_or_refused_but_never_anything_else(data: st.DataObject) -> None:
    raw = bytearray(MUTATED)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(4, 250))] = data.draw(st.integers(0, 255))
    raw = bytes(raw)
    try:
        header = GgufHeader.read(lambda at, count: raw[at : at + count], file_size=len(raw), source="f")
    except HeaderError:
        return
    assert all(header.data_start + info.end <= len(raw) for info in header.tensors.values())


def _mutated_file() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        tensors = {"a.weight": (matrix(), Q.Q8_0), "b.weight": (matrix(2, 256), Q.Q4_K)}
        return write(Path(folder) / "f.gguf", tensors).read_bytes()


MUTATED = _mutated_file()
