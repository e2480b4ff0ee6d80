"""The law: our verdict on a file is the safetensors library's, except where the corpus names a difference.

The library (Rust) shares no code with ours. When both accept, names, dtypes, shapes and bytes must be equal too.
"""

from __future__ import annotations

import json
import random
import struct
from collections import Counter
from typing import Any

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from mergetool.checkpoint.dtypes import ALL, DType
from mergetool.checkpoint.header import MAX_HEADER, Header, header_length
from mergetool.errors import HeaderError
from tests.checkpoint.header_corpus import DUPLICATE_NAME, METADATA, UNKNOWN_FIELD, corpus, file

Contents = dict[str, tuple[str, list[int], bytes]]
CORPUS = corpus()


def by_library(raw: bytes) -> Contents | None:
    try:
        tensors = safetensors.deserialize(raw)
    except safetensors.SafetensorError:
        return None
    return {name: (view["dtype"], view["shape"], bytes(view["data"])) for name, view in tensors}


def by_us(raw: bytes) -> Contents | None:
    try:
        size = header_length(raw[:8], file_size=len(raw), source="x")
        header = Header.parse(raw[: 8 + size], file_size=len(raw), source="x")
    except HeaderError:
        return None
    data = raw[header.data_start :]
    return {n: (t.dtype.code, list(t.shape), data[t.begin : t.end]) for n, t in header.tensors.items()}


@pytest.mark.parametrize("case", CORPUS, ids=[case.name for case in CORPUS])
def test_verdict_is_the_library_s_except_where_meant(case: Any) -> None:
    expected = by_library(case.raw)
    if case.difference:
        assert expected is not None, "not a difference: the library refuses it too"
        expected = None
    assert by_us(case.raw) == expected


def test_the_corpus_covers_both_verdicts_and_all_differences() -> None:
    verdicts = Counter(by_library(case.raw) is not None for case in CORPUS)
    assert len(CORPUS) >= 300
    assert len({case.raw for case in CORPUS}) >= 300
    assert verdicts[True] >= 100
    assert verdicts[False] >= 200
    assert {case.difference for case in CORPUS} == {None, DUPLICATE_NAME, METADATA, UNKNOWN_FIELD}


def test_the_size_cap_is_the_library_s() -> None:
    largest = file(b"{}".ljust(MAX_HEADER))
    assert by_library(largest) == by_us(largest) == {}
    larger = file(b"{}".ljust(MAX_HEADER + 1))
    assert by_library(larger) is by_us(larger) is None


def meant(raw: bytes) -> bool:
    """Whether this file shows one of the differences: a repeated name, an unknown field or null metadata."""
    found = False

    def look(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal found
        names = {name for name, _ in pairs}
        fields = {"dtype", "shape", "data_offsets"}
        found |= len(names) != len(pairs) or (fields < names and fields != names)
        found |= any(name == "__metadata__" and value is None for name, value in pairs)
        return dict(pairs)

    size = struct.unpack("<Q", raw[:8])[0]
    json.loads(raw[8 : 8 + size], object_pairs_hook=look)
    return found


TOKENS = [
    b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"0", b"-0", b"1", b"4", b"8", b"-1", b"1.0", b"1e0",
    b"true", b"null", b"NaN", b" ", b"\n", b"\0", b"\xff", b"\xc3\xa9", b"\\ud800",
    b"\\ud83d\\ude00", b'"x":1', b'"dtype"', b'"shape"',
    b'"data_offsets"', b'"__metadata__"', b'"F32"', b'"F4"', b"18446744073709551616", b'"a"', b',"a":{"dtype":"U8"',
]  # fmt: skip


def mutated(raw: bytes, dice: random.Random) -> bytes:
    """One to three edits of the header; the length field follows, except when it is what is edited."""
    size = struct.unpack("<Q", raw[:8])[0]
    text, data = bytearray(raw[8 : 8 + size]), raw[8 + size :]
    for _ in range(dice.choice([1, 1, 2, 3])):
        at = dice.randrange(len(text) + 1)
        match dice.randrange(7):
            case 0 if text:
                text[at % len(text)] = dice.randrange(256)
            case 1:
                del text[at : at + dice.randint(1, 8)]
            case 2:
                text[at:at] = dice.choice(TOKENS)
            case 3:
                text[at : at + dice.randint(1, 6)] = dice.choice(TOKENS)
            case 4:
                other = dice.randrange(len(text) + 1)
                text[at:at] = text[other : other + dice.randint(1, 60)]
            case 5:
                text = text.replace(dice.choice(TOKENS), dice.choice(TOKENS), 1)
            case _:
                data = data[: dice.randint(0, len(data))] + bytes(dice.randint(0, 2))
    length = len(text) if dice.random() < 0.97 else dice.choice([0, 1, len(text) - 1, len(text) + 1, 2**64 - 1])
    return struct.pack("<Q", max(length, 0)) + bytes(text) + data


def verdicts_on_mutants(count: int) -> tuple[Counter[str], list[bytes]]:
    """How often the two readers agreed on a mutant, and the mutants on which they disagreed without a reason."""
    dice = random.Random(20)
    small = [case.raw for case in CORPUS if 10 <= len(case.raw) < 500]
    good = [raw for raw in small if by_library(raw) is not None and struct.unpack("<Q", raw[:8])[0] > 2]
    verdicts: Counter[str] = Counter()
    unexplained: list[bytes] = []
    for number in range(count):
        raw = mutated(dice.choice(small if number % 10 == 0 else good), dice)
        ours, theirs = by_us(raw), by_library(raw)
        if ours == theirs:
            verdicts["refused" if ours is None else "accepted"] += 1
        elif ours is None and meant(raw):
            verdicts["meant"] += 1
        else:
            unexplained.append(raw)
    return verdicts, unexplained


def test_50000_mutated_headers_are_judged_as_the_library_does() -> None:
    verdicts, unexplained = verdicts_on_mutants(50_000)
    assert not unexplained
    assert verdicts.total() == 50_000
    assert min(verdicts[kind] for kind in ("accepted", "refused", "meant")) > 100, verdicts


def test_the_mutants_would_expose_a_laxer_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proof that the test above can fail: reading -0 as Python does is seen."""
    monkeypatch.setattr("mergetool.checkpoint.strict_json._integer", int)
    _, unexplained = verdicts_on_mutants(50_000)
    assert unexplained


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
entries = st.dictionaries(
    names, st.tuples(st.sampled_from(ALL), st.lists(st.integers(0, 5), max_size=3).map(tuple)), max_size=8
).map(
    lambda tensors: [
        (name, dtype, shape if dtype.bits % 8 == 0 else (*shape, 4)) for name, (dtype, shape) in tensors.items()
    ]
)
metadata = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"]))
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(entries, metadata)
def test_what_we_encode_both_read_back(
    planned: list[tuple[str, DType, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    header = Header.plan(planned, metadata)
    raw = header.encode()
    data = random.Random(0).randbytes(header.data_size)
    assert Header.parse(raw, file_size=header.file_size, source="x") == header
    assert dict(header.metadata) == metadata
    assert {(name, info.dtype, info.shape) for name, info in header.tensors.items()} == set(planned)
    assert by_library(raw + data) == by_us(raw + data)
    assert len(raw) == header.data_start
    assert len(raw) % 64 == 0
    for info in header.tensors.values():
        assert info.begin % max(info.dtype.bits // 8, 1) == 0
