"""Row 23: pickles of every kind under every name, each of which would make a folder if it were loaded."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tests.hostile.lines import lines, verdict, warmed
from tests.hostile.models import family
from tests.hostile.tally import Tally
from tests.hostile.warm import Warm

NAMES = (
    "m.safetensors",
    "m.ckpt",
    "m.pt",
    "m.pth",
    "m.bin",
    "m.gguf",
    "m",
    "adapter_model.bin",
    "pytorch_lora_weights.safetensors",
)


class Canary:
    """Makes a folder when its pickle is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def contents(canary: Path) -> dict[str, bytes]:
    """The kinds of files that some program would unpickle."""
    plain = {f"pickle, protocol {number}": pickle.dumps(Canary(canary), protocol=number) for number in range(6)}
    body = plain["pickle, protocol 2"]
    header = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
    return plain | {
        "torch zip": _zip({"archive/data.pkl": body, "archive/version": b"3\n"}),
        "torch zip, compressed": _zip({"archive/data.pkl": body}, zipfile.ZIP_DEFLATED),
        "torch zip of no tensor": _zip({"x/data.pkl": body, "x/byteorder": b"little", "x/.data/serialization_id": b"1"}),
        "TorchScript": _zip({"m/constants.pkl": body, "m/data.pkl": body, "m/code/__torch__.py": b"import os\n"}),
        "zip behind a blob": bytes(512) + _zip({"archive/data.pkl": body}),
        "torch as it saved before 1.6": _legacy(canary),
        "tar": _tar({"pickle": body, "tensors": body, "storages": body}),
        "numpy objects": _numpy(canary),
        "numpy archive": _zip({"a.npy": _numpy(canary)}),
        "gzip": gzip.compress(body),
        "bzip2": bz2.compress(body),
        "xz": lzma.compress(body),
        "header, then a pickle": struct.pack("<Q", len(body)) + body,
        "header with a pickle for data": struct.pack("<Q", len(header)) + header + body[:4],
        "header with a pickle behind": struct.pack("<Q", len(header)) + header + bytes(4) + body,
        "GGUF with a pickle behind": b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(12) + body,
        "GGUF of a pickle": b"GGUF" + body,
        "a script": b"#!/bin/sh\nmkdir " + str(canary).encode() + b"\n",
        "a module": f"import os\nos.mkdir({str(canary)!r})\n".encode(),
        "YAML": f"!!python/object/apply:os.mkdir [{canary!s}]\n".encode(),
        "text pickle": b"cos\nmkdir\n(S'" + str(canary).encode() + b"'\ntR.",
        "a comma before the pickle": b"," + body,
        "two pickles": body + body,
        "pickle with a length that fits": b"\x80\x02" + bytes(6) + b"{" + body.ljust(700, b" "),
        "an empty zip": b"PK\x05\x06" + bytes(18),
    }  # fmt: skip


def _zip(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def _legacy(canary: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2), "b": Canary(canary)}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def _numpy(canary: Path) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Canary(canary)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def run(warm: Warm, folder: Path, *, step: int = 1, patched: str | None = None) -> Tally:
    """Every ``step``-th kind under one of the names, through every command: nothing is loaded, and what is refused is refused in a sentence."""
    tally = Tally("23", "pickles under every name, through every command")
    family(folder)
    canary = folder / "canary"
    warmed(warm, folder)
    for number, (kind, content) in enumerate(list(contents(canary).items())[::step]):
        name = NAMES[number % len(NAMES)]
        (folder / name).write_bytes(content)
        before = {path: path.read_bytes() for path in folder.glob("small-*")}
        more = {"patched": patched} if patched else {}
        asked = lines(name)
        tally.injected += len(asked)
        for line, ran in zip(asked, warm.run_each(asked, folder, watched=True, **more), strict=True):
            fault = "loaded the pickle" if canary.exists() else verdict(ran.code, ran.out, ran.err)
            fault = fault or (f"did {ran.events[0]}" if ran.events else None)
            tally.judge(None if fault is None else f"{kind} as {name}, {' '.join(line)[:80]}: {fault}")
            shutil.rmtree(canary, ignore_errors=True)
        assert {path: path.read_bytes() for path in folder.glob("small-*")} == before
        (folder / name).unlink()
    return tally
