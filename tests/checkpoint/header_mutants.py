"""Mutants of the header corpus, judged by the safetensors library and by us; the library (Rust) shares no code with ours."""

from __future__ import annotations

import json
import random
import struct
from collections import Counter
from typing import Any

import safetensors

from mergetool.checkpoint.header import Header, header_length
from mergetool.errors import HeaderError
from tests.checkpoint.header_corpus import corpus

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


def meant(raw: bytes) -> bool:
    """Whether this file shows one of the differences: a repeated name or an unknown field."""
    found = False

    def look(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal found
        names = {name for name, _ in pairs}
        fields = {"dtype", "shape", "data_offsets"}
        found |= len(names) != len(pairs) or (fields < names and fields != names)
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


def verdicts_on_mutants(count: int, seed: int = 20) -> tuple[Counter[str], list[bytes]]:
    """How often the two readers agreed on a mutant, and the mutants on which they disagreed without a reason."""
    dice = random.Random(seed)
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
