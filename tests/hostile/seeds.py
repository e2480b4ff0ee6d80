"""What the coverage-guided fuzzer starts from: one or more good inputs of every target."""

from __future__ import annotations

import json
import struct

from tests.checkpoint.header_mutants import CORPUS, by_library


def _headers() -> list[bytes]:
    """Files that the library reads, spelled as the header target takes them: text, a mark, data."""
    good = [case.raw for case in CORPUS if len(case.raw) < 300 and by_library(case.raw) is not None]
    texts = []
    for raw in good:
        end = 8 + struct.unpack("<Q", raw[:8])[0]
        texts.append(raw[8:end] + (b"\xff\xff" + raw[end:] if raw[end:] else b""))
    two = json.dumps(
        {
            "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
            "b": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]},
        }
    )
    return [*sorted(texts)[::4], two.encode() + b"\xff\xff" + bytes(8)]


def _gguf(version: int = 3) -> bytes:
    """A file of two keys and two tensors, after its magic."""
    string = lambda text: struct.pack("<Q", len(text)) + text.encode()  # noqa: E731
    keys = string("general.architecture") + struct.pack("<I", 8) + string("lumina2")
    keys += string("general.alignment") + struct.pack("<II", 4, 32)
    entries = string("a") + struct.pack("<IQQIQ", 2, 4, 2, 0, 0) + string("b") + struct.pack("<IQIQ", 1, 32, 8, 32)
    head = struct.pack("<IQQ", version, 2, 2) + keys + entries
    return head + bytes(-(len(head) + 4) % 32) + bytes(32 + 34)


SEEDS: dict[str, list[bytes]] = {
    "header": _headers(),
    "index": [
        json.dumps(
            {"metadata": {"total_size": 8}, "weight_map": {"a": "a.safetensors", "b": "b-1.safetensors"}}
        ).encode(),
        b'{"weight_map":{"w":"x.safetensors"}}',
    ],
    "expression": [
        text.encode()
        for text in (
            "a + 20 * (b - c)",
            "0.5*a + 0.5*'z-image'",
            "a/3 + b/3 + c/3",
            "a - 0.2*lora('x.safetensors')",
            "slerp(a, b, t=0.3)",
            "a + task_arithmetic(b - a, c - a, weights=[1, 0.5])",
            "linear(a, b, weights=[1, 2], normalize=True)",
        )
    ],
    "gguf": [_gguf(), _gguf(2)],
    "provenance": [
        b'{"expression": "a + (b - c)", "protect": ["refiner"], "set": ["layers=1/2"], "dtype": "bf16", "rounding": "stochastic", "seed": 3}'
        b'\x1e[{"name": "a", "fingerprint": "sample-sha256:00"}]'
    ],
    "names file": [b'[models]\na = "x.safetensors"\n"b.c" = "hf://org/repo"\n'],
    "config": [
        b'{"_class_name": "ZImageTransformer2DModel", "dim": 64, "axes_dims": [8, 12], "norm_eps": 1e-5, "x": null}'
    ],
}
