"""What a Header promises: messages that help, a canonical encoding, and limits that hold."""

from __future__ import annotations

import json
import struct
import tracemalloc
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from mergetool.checkpoint.dtypes import ALL, BF16, BY_CODE, F16, F32, F64
from mergetool.checkpoint.header import MAX_HEADER, Header, TensorInfo, header_length
from mergetool.checkpoint.names import quoted
from mergetool.errors import DataError, HeaderError

U8, I64 = BY_CODE["U8"], BY_CODE["I64"]


def raw(text: str | dict[str, Any]) -> bytes:
    body = (text if isinstance(text, str) else json.dumps(text)).encode()
    return struct.pack("<Q", len(body)) + body


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def parse(text: str | dict[str, Any], data_size: int) -> Header:
    encoded = raw(text)
    return Header.parse(encoded, file_size=len(encoded) + data_size, source="m.safetensors")


def refusal(text: str | dict[str, Any], data_size: int = 4) -> str:
    with pytest.raises(HeaderError) as caught:
        parse(text, data_size)
    message = str(caught.value)
    assert message.startswith('"m.safetensors"')
    assert message.endswith(".")
    assert "\n" not in message
    return message


def test_a_table_reads_as_facts() -> None:
    header = parse({"__metadata__": {"k": "v"}, "w": entry("BF16", [2, 3], 0, 12), "s": entry("F32", [], 12, 16)}, 16)
    assert dict(header.tensors) == {"w": TensorInfo(BF16, (2, 3), 0, 12), "s": TensorInfo(F32, (), 12, 16)}
    assert (header.tensors["w"].nbytes, header.tensors["w"].numel) == (12, 6)
    assert (header.tensors["s"].nbytes, header.tensors["s"].numel) == (4, 1)
    assert dict(header.metadata) == {"k": "v"}
    assert header.data_size == 16
    assert header.file_size == header.data_start + 16


def test_tensors_come_in_file_order_whatever_the_order_of_the_json() -> None:
    header = parse(
        {"late": entry("U8", [2], 2, 4), "empty": entry("U8", [0], 2, 2), "early": entry("U8", [2], 0, 2)}, 4
    )
    assert list(header.tensors) == ["early", "empty", "late"]


def test_a_header_cannot_be_changed() -> None:
    header = parse({"a": entry("F32", [1], 0, 4)}, 4)
    with pytest.raises(TypeError):
        header.tensors["a"] = TensorInfo(F32, (1,), 0, 4)  # type: ignore[index]
    with pytest.raises(FrozenInstanceError):
        header.data_start = 0  # type: ignore[misc]


def test_the_constructor_validates_too() -> None:
    with pytest.raises(HeaderError, match="hole after"):
        Header({"a": TensorInfo(F32, (1,), 0, 4), "b": TensorInfo(F32, (1,), 5, 9)}, {}, 64, 73)


@pytest.mark.parametrize(
    ("table", "data", "parts"),
    [
        ({"a": entry("F32", [1], 4, 8)}, 8, ['tensor "a"', "byte 4", "byte 0"]),
        ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 6, 10)}, 10, ['"b"', "byte 6", "hole", '"a"', "byte 4"]),
        ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 2, 6)}, 6, ['"b"', "byte 2", "overlaps", '"a"']),
        ({"a": entry("F32", [2, 3], 0, 20)}, 20, ['tensor "a"', "F32 of shape [2, 3]", "24 bytes", "hold 20"]),
        ({"a": entry("F32", [0], 4, 0)}, 4, ['tensor "a"', "byte 0", "byte 4"]),
        ({"a": entry("F4", [3], 0, 2)}, 2, ['tensor "a"', "F4 of shape [3]", "12 bits", "whole number of bytes"]),
        ({"a": entry("F64", [2**62], 0, 8)}, 8, ['tensor "a"', "2^64-1 bits", str(2**62)]),
        ({"a": entry("Q4_K", [1], 0, 4)}, 4, ['tensor "a"', 'unknown dtype "Q4_K"']),
        ({"a": entry("F32", [-3], 0, 4)}, 4, ['tensor "a"', '"-3"', "shape"]),
        ({"a": entry("F32", [True], 0, 4)}, 4, ['tensor "a"', '"True"', "shape"]),
        ({"a": entry("F32", [1], 0, 4) | {"stride": 1}}, 4, ['tensor "a"', 'unknown field "stride"']),
        ({"a": {"dtype": "F32", "shape": [1]}}, 4, ['tensor "a"', 'no "data_offsets"']),
        ({"a": 1}, 4, ['tensor "a"', "JSON object"]),
        ({"__metadata__": {"k": 1}}, 0, ["metadata", '"k"', "no string"]),
    ],
)  # fmt: skip
def test_a_refusal_names_the_tensor_and_both_numbers(table: dict[str, Any], data: int, parts: list[str]) -> None:
    message = refusal(table, data)
    assert [part for part in parts if part not in message] == []


def test_trailing_bytes_are_counted() -> None:
    size = len(raw({"a": entry("F32", [1], 0, 4)})) + 4
    message = refusal({"a": entry("F32", [1], 0, 4)}, 4 + 36)
    assert "has 36 extra bytes at its end" in message
    assert f"cut it to {size} bytes" in message


def test_a_truncated_file_says_how_much_there_should_be() -> None:
    size = len(raw({"a": entry("F32", [1], 0, 4)}))
    assert f"describes {size + 4} bytes and the file has {size + 1}" in refusal({"a": entry("F32", [1], 0, 4)}, 1)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"a":{"shape":NaN}}', "NaN, which is not a JSON value"),
        ('{"a":"\\ud800"}', "half of a surrogate pair"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("{" + "9" * 5000 + "}", "syntax error at character 1"),
        ('{"a":[' + "9" * 5000 + "]}", "number of 5000 digits"),
        ('{"a":1e999}', "number out of range"),
        ('{"a":}', "syntax error at character 5"),
        ("[]", "not a JSON object"),
        ('{"__metadata__":{"k":"v","k":"w"}}', 'metadata has "k" twice'),
        ('{"__metadata__":[]}', "not a JSON object of strings"),
        ('{"__metadata__":{},"__metadata__":{}}', '"__metadata__" twice'),
        ('{"a":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}}', '"a" has the field "shape" twice'),
        ('{"a":["U8",[0],[0,0]],"a":["U8",[0],[0,0]]}', 'lists tensor "a" twice'),
    ],
)  # fmt: skip
def test_a_refusal_says_what_is_wrong_with_the_json(text: str, part: str) -> None:
    assert part in refusal(text)


def test_null_metadata_is_none() -> None:
    text = b'{"__metadata__":null}'
    header = Header.parse(struct.pack("<Q", len(text)) + text, file_size=8 + len(text), source="m")
    assert (dict(header.metadata), dict(header.tensors)) == ({}, {})


def test_a_byte_that_is_not_utf8_is_located() -> None:
    with pytest.raises(HeaderError, match="not UTF-8 at position 2"):
        Header.parse(struct.pack("<Q", 4) + b'{"\xff"', file_size=12, source="m")


def test_names_in_messages_cannot_drive_a_terminal_or_flood_it() -> None:
    message = refusal({"\x1b[2J\n\u202e" + "x" * 10_000_000: 1})
    assert message.isprintable()
    assert len(message) < 600
    assert '"\\x1b[2J\\n\\u202exxx' in message
    assert "(10000006 characters)" in message


@pytest.mark.parametrize(
    "code", [*range(0x20), 0x22, 0x5C, *range(0x7F, 0xA1), 0xAD, 0x200B, 0x200E, 0x2028, 0x202A, 0x202E]
)
def test_quoting_escapes_what_is_not_printable(code: int) -> None:
    shown = quoted(f"a{chr(code)}b")
    assert shown.isprintable()
    assert shown.startswith('"a\\')
    assert shown != quoted("ab")


def test_quoting_keeps_what_is_printable() -> None:
    assert quoted("layers.0 日本 é") == '"layers.0 日本 é"'


def test_the_length_is_checked_before_anything_is_read() -> None:
    assert header_length(struct.pack("<Q", 2), file_size=10, source="m") == 2
    assert header_length(struct.pack("<Q", MAX_HEADER), file_size=MAX_HEADER + 8, source="m") == MAX_HEADER
    for length, file_size, part in [
        (0, 7, "has 7 bytes"),
        (3, 10, "only 2 follow"),
        (MAX_HEADER + 1, 2**40, "limit is 100000000"),
        (2**64 - 1, 2**40, "limit is 100000000"),
    ]:
        with pytest.raises(HeaderError, match=part):
            header_length(struct.pack("<Q", length), file_size=file_size, source="m")


def test_too_few_bytes_for_the_header_are_refused() -> None:
    encoded = raw({})
    with pytest.raises(HeaderError, match="1 were read"):
        Header.parse(encoded[:-1], file_size=len(encoded), source="m")


def test_a_plan_puts_wide_elements_first_and_keeps_the_order_among_equals() -> None:
    header = Header.plan([("b", BF16, (3,)), ("u", U8, (5,)), ("a", BF16, (1,)), ("f", F64, (1,)), ("i", I64, (2,))])
    assert list(header.tensors) == ["f", "i", "b", "a", "u"]
    assert [info.begin for info in header.tensors.values()] == [0, 8, 24, 30, 32]
    assert header.data_size == 37


def test_a_plan_with_every_dtype_reads_back() -> None:
    header = Header.plan([(dtype.code, dtype, (8,)) for dtype in ALL])
    assert Header.parse(header.encode(), file_size=header.file_size, source="m") == header


def test_the_encoding_is_canonical() -> None:
    plans = [
        Header.plan([("w", F16, (2,))], dict(order)) for order in ([("b", "1"), ("a", "2")], [("a", "2"), ("b", "1")])
    ]
    assert plans[0].encode() == plans[1].encode()
    body = b'{"__metadata__":{"a":"2","b":"1"},"w":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}'
    assert plans[0].encode() == struct.pack("<Q", 120) + body.ljust(120)


def test_the_encoding_has_no_metadata_when_there_is_none() -> None:
    assert Header.plan([]).encode() == struct.pack("<Q", 56) + b"{}".ljust(56)


def test_a_parsed_header_remembers_where_its_data_starts() -> None:
    header = parse({"a": entry("F32", [1], 0, 4)}, 4)
    assert header.data_start % 64 != 0
    assert len(header.encode()) % 64 == 0


@pytest.mark.parametrize(
    "entries",
    [
        [("a", F32, (1,)), ("a", F32, (1,))],
        [("__metadata__", F32, (1,))],
        [("a", F32, (-1,))],
        [("a", F32, (2**62,))],
        [("a", BY_CODE["F4"], (3,))],
        [("\ud800", F32, (1,))],
        [("x" * (MAX_HEADER + 1), F32, (1,))],
    ],
)
def test_a_plan_the_format_cannot_hold_is_refused(entries: list[Any]) -> None:
    with pytest.raises(HeaderError):
        Header.plan(entries)


@pytest.mark.parametrize("metadata", [{"k": 1}, {1: "v"}, {"k": None}, {"k": "\udc00"}])
def test_metadata_the_format_cannot_hold_is_refused(metadata: Any) -> None:
    with pytest.raises(HeaderError):
        Header.plan([], metadata)


def test_offsets_beyond_4_gib_are_exact() -> None:
    shape = (2**32 + 1,)
    header = Header.plan([("a", U8, shape), ("b", U8, (7,))])
    assert header.tensors["b"].begin == 2**32 + 1
    assert Header.parse(header.encode(), file_size=header.file_size, source="m") == header


def test_a_long_header_of_many_tensors_stays_small_in_memory() -> None:
    count = 100_000
    encoded = raw({f"{number:x}": entry("U8", [0], 0, 0) for number in range(count)})
    tracemalloc.start()
    header = Header.parse(encoded, file_size=len(encoded), source="m")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(header.tensors) == count
    assert peak < 600 * count  # 1.7 million tensors, all that 100 MB can hold, stay near 1 GB


def test_errors_are_data_errors() -> None:
    assert issubclass(HeaderError, DataError)
    assert HeaderError.exit_code == 65
