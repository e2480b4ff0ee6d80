"""Hand-made safetensors files, one per rule and boundary: what each is, its bytes, and where we differ on purpose.

Nothing here imports the code under test: dtype widths are written out again.
"""

# ruff: noqa: UP031 - JSON is made of braces: "%" keeps the templates readable where str.format doubles each

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass

BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32,
    "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip

# The differences from the library that are meant; every other disagreement is a fault.
DUPLICATE_NAME = "duplicate names"
METADATA = "duplicate metadata"
UNKNOWN_FIELD = "unknown fields"


@dataclass(frozen=True)
class Case:
    name: str
    raw: bytes
    difference: str | None = None  # set: the library reads it, we refuse it


def file(header: str | bytes, data: bytes | int = 0) -> bytes:
    """A file of this JSON text and these data bytes (or so many zeros)."""
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text)) + text + (bytes(data) if isinstance(data, int) else data)


def entry(dtype: str = "F32", shape: object = (1,), begin: int = 0, end: int = 4) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def table(**tensors: dict[str, object]) -> str:
    return json.dumps(tensors)


A = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'  # one good entry, four bytes of data


def corpus() -> list[Case]:
    builders = (
        dtypes, sub_byte_sizes, numbers, shapes, offsets, lengths, blanks, structure, fields, names, metadata, utf8,
        escapes,
    )  # fmt: skip
    return [case for build in builders for case in build()]


def dtypes() -> Iterator[Case]:
    for code, bits in BITS.items():
        size = 8 * bits // 8
        yield Case(f"{code} of 8 elements", file(table(a=entry(code, [8], 0, size)), size))
        yield Case(f"{code} one byte short", file(table(a=entry(code, [8], 0, size - 1)), size - 1))
        yield Case(f"{code} one byte long", file(table(a=entry(code, [8], 0, size + 1)), size + 1))
        yield Case(f"{code} of rank 0", file(table(a=entry(code, [], 0, bits // 8)), bits // 8))
        yield Case(f"{code} of no element", file(table(a=entry(code, [0], 0, 0))))
        yield Case(f"{code} in lower case", file(table(a=entry(code.lower(), [8], 0, size)), size))
    for code in ("", "F8", "FP32", "BF16 ", "float32", "F32\\u0000", "F6", "I4", "U4", "F8_E3M4", "torch.float32"):
        yield Case(f"dtype {code!r}", file('{"a":{"dtype":"%s","shape":[1],"data_offsets":[0,4]}}' % code, 4))
    for value in ("null", "1", "[]", '["F32"]', "{}", '{"F32":null}', '{"F32":1}', '{"F32":[]}', '{"F33":null}'):
        yield Case(f"dtype spelled {value}", file('{"a":{"dtype":%s,"shape":[1],"data_offsets":[0,4]}}' % value, 4))
    two = '{"a":{"dtype":{"F32":null,"F16":null},"shape":[1],"data_offsets":[0,4]}}'
    yield Case("dtype spelled as two", file(two, 4))


def sub_byte_sizes() -> Iterator[Case]:
    for code in ("F4", "F6_E2M3", "F6_E3M2"):
        for count in range(1, 10):
            size = -(-count * BITS[code] // 8)
            yield Case(f"{code} of {count}, rounded up", file(table(a=entry(code, [count], 0, size)), size))


def numbers() -> Iterator[Case]:
    """Every spelling of a number, in each place where one may stand; only plain unsigned integers pass."""
    spellings = (
        "-1", "-0", "1.0", "0.0", "1e0", "1E+2", "true", "false", "null", '"1"', "[1]", "{}", "NaN", "Infinity",
        "-Infinity", "nan", "1e400", "01", "00", "+1", "0x1", "1_0", ".5", "1.", "-", "1 1", "", "9" * 400, "9" * 5000,
        "18446744073709551615", "18446744073709551616", "9223372036854775807", "9223372036854775808", "４", "4",
    )  # fmt: skip
    for spelling in spellings:
        shown = spelling[:24]
        template = '{"a":{"dtype":"U8","shape":[%s],"data_offsets":[%s,%s]}}'
        yield Case(f"size {shown}", file(template % (spelling, 0, 4), 4))
        yield Case(f"begin {shown}", file(template % (4, spelling, 4), 4))
        yield Case(f"end {shown}", file(template % (4, 0, spelling), 4))
        yield Case(f"size {shown} beside a zero", file(template % (f"0,{spelling}", 0, 0)))


def shapes() -> Iterator[Case]:
    for dims in ([1] * 64, [2, 0, 3], [0, 2**63, 2**63], [2**63, 2**63, 0], [2**32, 2**32, 0], [2**32, 2**31, 0]):
        for code in ("U8", "F64", "F4"):
            size = BITS[code] // 8 if 0 not in dims else 0
            yield Case(f"{code} {str(dims)[:40]}", file(table(a=entry(code, dims, 0, size)), size))
    for dims in ([2**61], [2**61 - 1], [2**60, 8], [2**64 - 1], [2**64], [2**60, 2]):
        for code in ("U8", "F64", "F4"):
            end = min(dims[0] * BITS[code] // 8, 2**64 - 1)
            yield Case(f"{code} {dims} without its data", file(table(a=entry(code, dims, 0, end))))
    for value in ("null", "{}", '""', "1", "[[1]]", "[1", "[1,]", "[,1]", '{"0":1}'):
        yield Case(f"shape spelled {value}", file('{"a":{"dtype":"F32","shape":%s,"data_offsets":[0,4]}}' % value, 4))


def offsets() -> Iterator[Case]:
    def pair(first: tuple[int, int], second: tuple[int, int], data: int) -> bytes:
        sizes = [max(end - begin, 0) for begin, end in (first, second)]
        return file(table(a=entry("U8", [sizes[0]], *first), b=entry("U8", [sizes[1]], *second)), data)

    for first in ((0, 4), (1, 4), (0, 3), (4, 0), (4, 8)):
        for second in ((4, 8), (3, 8), (5, 8), (4, 4), (0, 4), (0, 0), (8, 4), (2, 3), (8, 12)):
            for data in (7, 8, 9):
                yield Case(f"offsets {first} {second} over {data} bytes", pair(first, second, data))
    yield Case("an empty tensor in the middle of another", pair((0, 8), (4, 4), 8))
    yield Case("an empty tensor after the end", pair((0, 8), (8, 8), 8))
    yield Case("an empty tensor far away", pair((0, 8), (99, 99), 8))
    yield Case("an empty tensor listed before its neighbour", pair((4, 4), (0, 4), 4))
    yield Case("misaligned data", file(table(a=entry("U8", [1], 0, 1), b=entry("F64", [1], 1, 9)), 9))
    yield Case(
        "narrow before wide, listed backwards", file(table(b=entry("F64", [1], 1, 9), a=entry("U8", [1], 0, 1)), 9)
    )
    for value in ("null", "{}", '""', "0", "[]", "[0]", "[0,4,4]", "[4]", '{"0":0,"1":4}', "[[0,4]]"):
        yield Case(f"data_offsets {value}", file('{"a":{"dtype":"F32","shape":[1],"data_offsets":%s}}' % value, 4))


def lengths() -> Iterator[Case]:
    good = file("{%s}" % A, 4)
    for size in (*range(12), len(good) - 4, len(good) - 1):
        yield Case(f"cut to {size} bytes", good[:size])
    for extra in (1, 7, 64):
        yield Case(f"{extra} trailing bytes", good + bytes(extra))
    body = good[8:]
    for length in (
        0,
        1,
        len(body) - 4,
        len(body) - 3,
        len(body),
        len(body) + 1,
        10**8,
        10**8 + 1,
        2**31,
        2**63,
        2**64 - 1,
    ):
        yield Case(f"length field {length}", struct.pack("<Q", length) + body)
    yield Case("big-endian length", struct.pack(">Q", len(body) - 4) + body)
    yield Case("no tensor", file("{}"))
    yield Case("no tensor but data", file("{}", 1))


def blanks() -> Iterator[Case]:
    for blank in (" ", "\t", "\n", "\r", "\0", "\f", "\v", "\u00a0", "\ufeff", "\u2028", "\x1a", "//", "#"):
        yield Case(f"{blank!r} before the object", file(f"{blank}{{{A}}}", 4))
        yield Case(f"{blank!r} after the object", file(f"{{{A}}}{blank}", 4))
        yield Case(f"{blank!r} inside the object", file(f"{{{blank}{A}}}", 4))
    yield Case("padded to 64", file(f"{{{A}}}".ljust(64), 4))
    yield Case("nothing but blanks", file(" " * 8))


def structure() -> Iterator[Case]:
    wholes = (
        "", "[]", "null", "1", '"a"', "true", "{", "}", "{}{}", "{} {}", "{},", "[{}]", "{%s,}" % A, "{,%s}" % A,
        "{%s" % A, "{%s}}" % A,
        "{{%s}}" % A, "{%s}" % A.replace('"', "'"), "{a:1}", '{"a"}', '{"a":}', '{"a" "b"}', "{1:{}}",
        "{%s}/*x*/" % A, "[%s]" % A, '{"a":null}', '{"a":1}', '{"a":"F32"}', '{"a":[]}', '{"a":{}}', '{"a":true}',
        '{"a":["F32",[1],[0,4]]}', '{"a":["F32",[1]]}', '{"a":["F32",[1],[0,4],0]}', '{"a":[[1],"F32",[0,4]]}',
        '{"a":[{"F32":null},[1],[0,4]]}', '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}',
        '["F32",[1],[0,4]]', '{"dtype":%s,"shape":{"dtype":"U8","shape":[0],"data_offsets":[4,4]}}' % A[4:],
    )  # fmt: skip
    for whole in wholes:
        yield Case(f"header {whole[:60]}", file(whole, 4))
    for depth in (127, 128, 129, 2_000, 200_000):
        yield Case(f"arrays nested {depth} deep", file("[" * depth + "]" * depth))
        yield Case(f"shape nested {depth} deep", file('{"a":{"shape":%s' % ("[" * depth)))
        yield Case(f"objects nested {depth} deep", file('{"a":' * depth + "{}" + "}" * depth))
    backwards = '{"a":{"data_offsets":[0,4],"shape":[1],"dtype":"F32"}}'
    yield Case("fields in another order", file(backwards, 4))


def fields() -> Iterator[Case]:
    inside = A[5:-1]
    for field in ("dtype", "shape", "data_offsets"):
        lacking = {key: value for key, value in entry().items() if key != field}
        yield Case(f"no {field}", file(table(a=lacking), 4))
        yield Case(f"{field} misspelled", file(table(a=lacking | {field.upper(): entry()[field]}), 4))
        twice = '{"a":{%s,"%s":%s}}' % (inside, field, json.dumps(entry()[field]))
        yield Case(f"{field} twice", file(twice, 4))
    for extra in ('"strides":[1]', '"":0', '"x":{"y":[1,{"z":null}]}', '"Dtype":"F32"', '"x":1e-400', '"x":"\\u0000"'):
        yield Case(f"unknown field {extra}", file('{"a":{%s,%s}}' % (inside, extra), 4), UNKNOWN_FIELD)
    yield Case("unknown field twice", file('{"a":{%s,"x":1,"x":2}}' % inside, 4), UNKNOWN_FIELD)
    deep = "[" * 100 + "]" * 100
    yield Case("unknown field 100 deep", file('{"a":{%s,"x":%s}}' % (inside, deep), 4), UNKNOWN_FIELD)
    for broken in ('"x":1e400', '"x":"\\ud800"', '"x":NaN', '"x":' + "[" * 200 + "]" * 200, '"x":01', "x:1"):
        yield Case(f"broken unknown field {broken[:20]}", file('{"a":{%s,%s}}' % (inside, broken), 4))
    yield Case("a tensor twice", file("{%s,%s}" % (A, A), 4), DUPLICATE_NAME)
    yield Case("a tensor twice with two dtypes", file("{%s,%s}" % (A, A.replace("F32", "I32")), 4), DUPLICATE_NAME)
    yield Case("a tensor twice by an escape", file("{%s,%s}" % (A, A.replace('"a"', '"\\u0061"')), 4), DUPLICATE_NAME)
    second = A.replace("[1]", "[2]").replace("[0,4]", "[4,12]")
    yield Case("a tensor twice, of which the last leaves a hole", file("{%s,%s}" % (A, second), 12))
    yield Case("a tensor twice, first null", file('{"a":null,%s}' % A, 4))


def names() -> Iterator[Case]:
    odd = (
        "", " ", ".", "..", "../../etc/passwd", "/", "\\", "C:\\x", "a b", "a.b.c", "\0", "\x1b[2J", "\u202e", "\u200b",
        "é", "e\u0301", "日本", "😀", "\uffff", "\ue000", '"', "a" * 100_000, "__metadata", "__METADATA__",
        "_metadata__", "dtype", "data_offsets", "null", "-0", "\r\n", "\x7f", "\u2028", "NaN", "Infinity",
    )  # fmt: skip
    for name in odd:
        yield Case(f"named {ascii(name)[:40]}", file(json.dumps({name: entry()}), 4))
        yield Case(f"named {ascii(name)[:40]} unescaped", file(json.dumps({name: entry()}, ensure_ascii=False), 4))
    for control in range(0x20):
        yield Case(f"control {control:#x} unescaped", file(b'{"%c%s' % (control, A[1:].encode() + b"}"), 4))


def metadata() -> Iterator[Case]:
    def with_metadata(value: str, end: str = "") -> bytes:
        return file('{"__metadata__":%s,%s%s}' % (value, A, end), 4)

    for value in (
        "{}", '{"k":"v"}', '{"":""}', '{"__metadata__":"x"}', '{"k":"\\u0000"}', '{"k":"😀"}', '{"a":"v"}',
        '{"dtype":"F32","shape":"x","data_offsets":"y"}', '{"%s":"v"}' % ("k" * 70_000),
        "1", '""', "[]", "true", '{"k":1}', '{"k":null}', '{"k":{}}', '{"k":["v"]}', '{"k":true}', '{"k":NaN}',
        '{"k":"v",}',
        '{"k":-0}', '{"k":"\\ud800"}', '{"\\udc00":"v"}', '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}',
        '["F32",[1],[0,4]]', '[["k","v"]]', '{k:"v"}',
    ):  # fmt: skip
        yield Case(f"metadata {value[:40]}", with_metadata(value))
    yield Case("metadata last", file('{%s,"__metadata__":{"k":"v"}}' % A, 4))
    yield Case("metadata and nothing else", file('{"__metadata__":{"k":"v"}}'))
    yield Case("metadata null", with_metadata("null"))
    yield Case("metadata null and nothing else", file('{"__metadata__":null}'))
    yield Case("metadata key twice", with_metadata('{"k":"v","k":"w"}'), METADATA)
    yield Case("metadata key twice with one value", with_metadata('{"k":"v","j":"","k":"v"}'), METADATA)
    yield Case("metadata key twice by an escape", with_metadata('{"k":"v","\\u006b":"v"}'), METADATA)
    yield Case("metadata twice", with_metadata('{"k":"v"}', ',"__metadata__":{"j":"w"}'))
    yield Case("metadata null, then not", with_metadata("null", ',"__metadata__":{"j":"w"}'))
    yield Case("metadata by an escape", file('{"__m\\u0065tadata__":{"k":"v"},%s}' % A, 4))


def utf8() -> Iterator[Case]:
    sequences = {
        "two bytes": b"\xc3\xa9", "three bytes": b"\xe2\x82\xac", "four bytes": b"\xf0\x9f\x98\x80",
        "last code point": b"\xf4\x8f\xbf\xbf", "over the last": b"\xf4\x90\x80\x80", "overlong slash": b"\xc0\xaf",
        "overlong NUL": b"\xc0\x80", "overlong in three": b"\xe0\x80\xaf", "overlong in four": b"\xf0\x80\x80\xaf",
        "high surrogate": b"\xed\xa0\x80", "low surrogate": b"\xed\xb0\x80", "CESU pair": b"\xed\xa0\xbd\xed\xb8\x80",
        "lone continuation": b"\x80", "lone start": b"\xc3", "cut": b"\xe2\x82", "latin-1": b"\xe9", "FE": b"\xfe",
        "FF": b"\xff",
        "five bytes": b"\xf8\x88\x80\x80\x80", "noncharacter": b"\xef\xbf\xbe",
        "last before surrogates": b"\xed\x9f\xbf",
    }  # fmt: skip
    for what, sequence in sequences.items():
        yield Case(f"{what} in a name", file(b'{"' + sequence + A[2:].encode() + b"}", 4))
        yield Case(f"{what} in metadata", file(b'{"__metadata__":{"k":"' + sequence + b'"},' + A.encode() + b"}", 4))
    text = f"{{{A}}}"
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32-le", "utf-8-sig"):
        yield Case(f"a whole header in {encoding}", file(text.encode(encoding), 4))


def escapes() -> Iterator[Case]:
    spelled = (
        r"\"", r"\\", r"\/", r"\b", r"\f", r"\n", r"\r", r"\t", r"\u0000", r"\u00e9", r"\uD83D\uDE00", r"\ud83d\ude00",
        r"\ud83d", r"\ude00", r"\ud83dx", r"\ud83d\u0041", r"\ud83d\ud83d\ude00", r"\ud83d\ude00\ude00",
        r"\ude00\ud83d",
        r"\\ud83d", r"\\\ud83d", r"\\\\ud83d", r"\"\ud83d", r"\ud83d\\ude00", r"\ud83d\n", r"\uDBFF\uDFFF",
        r"\ud7ff", r"\ue000",
        r"\u", r"\u1", r"\u123", r"\u12g4", r"\u+123", r"\u 123", r"\U0041", r"\x41", r"\a", r"\'",
        r"\0", "\\\n", "\\", r"\uFFFF",
    )  # fmt: skip
    for escape in spelled:
        yield Case(f"escape {escape!r} in a name", file('{"' + escape + A[2:] + "}", 4))
        yield Case(f"escape {escape!r} in metadata", file('{"__metadata__":{"k":"' + escape + '"},' + A + "}", 4))
