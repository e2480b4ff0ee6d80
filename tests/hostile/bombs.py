"""Row 22: small or cheap files that want all of the memory or all of the time; each is refused or done within five minutes of CPU and 2 GiB.

``python -m tests.hostile.bombs READER PATH MEMORY`` reads one in a process of its own, and writes to MEMORY how many bytes it took.
"""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.hostile.tally import Tally
from tests.resident import resident

ROOT = Path(__file__).parents[2]
MOST_SECONDS = 300  # of CPU: it tells a reader that never ends from a slow machine
MOST_MEMORY = 2 << 30


@dataclass(frozen=True)
class Bomb:
    """What it is, how it is read, and what makes it: a function of the path that writes it."""

    name: str
    reader: str
    write: Callable[[Path], None]
    is_slow: bool = False


def _header(path: Path, text: bytes, data: int = 0) -> None:
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        file.truncate(8 + len(text) + data)


def _entries(count: int) -> Iterator[str]:
    return (f'"{i:x}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(count))


def _index(path: Path, text: bytes) -> None:
    path.mkdir()
    (path / "model.safetensors.index.json").write_bytes(text)


def _sparse(path: Path, start: bytes, size: int) -> None:
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)


def _peft(path: Path, config: bytes) -> None:
    path.mkdir()
    (path / "adapter_config.json").write_bytes(config)
    _header(path / "adapter_model.safetensors", b"{}")


def _gguf(path: Path, tensors: int, keys: int, body: bytes) -> None:
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + body)


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


ENTRY = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
FULL = 100_000_000

BOMBS = [
    Bomb("200,000 empty tensors", "checkpoint", lambda p: _header(p, ("{" + ",".join(_entries(200_000)) + "}").encode())),
    Bomb("1.6 million empty tensors in 100 MB", "checkpoint", lambda p: _header(p, ("{" + ",".join(_entries(1_600_000)) + "}").encode()), is_slow=True),
    Bomb("100 MB of zeros for a header", "checkpoint", lambda p: _sparse(p, struct.pack("<Q", FULL), FULL + 8)),
    Bomb("100 MB of blanks", "checkpoint", lambda p: _header(p, b"{}".ljust(FULL))),
    Bomb("a length of 2^64-1", "checkpoint", lambda p: _sparse(p, struct.pack("<Q", 2**64 - 1) + b"{}", 1 << 40)),
    Bomb("a name of 10 million characters", "checkpoint", lambda p: _header(p, f'{{"{"a" * 10**7}":{ENTRY}}}'.encode())),
    Bomb("a bad name of 10 million escapes", "checkpoint", lambda p: _header(p, f'{{"{chr(92)}u0000'.encode() * 1 + b"\\u001b" * 10**6 + b'":1}')),
    Bomb("a million halves of surrogates", "checkpoint", lambda p: _header(p, b'{"' + b"\\ud83d\\ude00" * 10**6 + b'\\ud83d":1}')),
    Bomb("a million backslashes", "checkpoint", lambda p: _header(p, b'{"' + b"\\" * 10**7 + b'ud83d":1}')),
    Bomb("10 million nested arrays", "checkpoint", lambda p: _header(p, b"[" * 10**7)),
    Bomb("5 million nested objects", "checkpoint", lambda p: _header(p, b'{"":' * 5 * 10**6)),
    Bomb("a number of 50 million digits", "checkpoint", lambda p: _header(p, b'{"a":{"shape":[' + b"9" * 5 * 10**7 + b"]}}")),
    Bomb("a fraction of 50 million digits", "checkpoint", lambda p: _header(p, b'{"a":{"shape":[0.' + b"9" * 5 * 10**7 + b"]}}")),
    Bomb("a rank of 10 million", "checkpoint", lambda p: _header(p, b'{"a":{"dtype":"U8","shape":[' + b"1," * 10**7 + b'1],"data_offsets":[0,1]}}', 1)),
    Bomb("a rank of 10 million of 2^64-1", "checkpoint", lambda p: _header(p, b'{"a":{"dtype":"U8","shape":[' + b"18446744073709551615," * 10**6 + b'1],"data_offsets":[0,1]}}', 1)),
    Bomb("a million metadata keys", "checkpoint", lambda p: _header(p, ('{"__metadata__":{' + ",".join(f'"{i}":""' for i in range(10**6)) + "}}").encode())),
    Bomb("a million equal names", "checkpoint", lambda p: _header(p, ("{" + ",".join([f'"a":{ENTRY}'] * 10**6) + "}").encode()), is_slow=True),
    Bomb("a tensor of 1 TB that is not there", "checkpoint", lambda p: _header(p, b'{"a":{"dtype":"U8","shape":[1099511627776],"data_offsets":[0,1099511627776]}}', 1 << 40)),
    Bomb("an index of a million shards", "checkpoint", lambda p: _index(p, json.dumps({"weight_map": {str(i): f"{i}.safetensors" for i in range(10**6)}}).encode())),
    Bomb("an index of a million tensors in a missing shard", "checkpoint", lambda p: _index(p, json.dumps({"weight_map": dict.fromkeys(map(str, range(10**6)), "a.safetensors")}).encode())),
    Bomb("an index of 10 GB", "checkpoint", lambda p: (p.mkdir(), _sparse(p / "m.index.json", b"{", 10**10))[0]),
    Bomb("a deep index", "checkpoint", lambda p: _index(p, b'{"weight_map":' * 10**6)),
    Bomb("a config of 10 GB", "checkpoint", lambda p: (p.mkdir(), _header(p / "model.safetensors", b"{}"), _sparse(p / "config.json", b"{", 10**10))[0]),
    Bomb("a deep config", "checkpoint", lambda p: (p.mkdir(), _header(p / "model.safetensors", b"{}"), (p / "config.json").write_bytes(b"[" * 900_000))[0]),
    Bomb("a GGUF of 2^63 tensors", "checkpoint", lambda p: _gguf(p, 2**63, 0, bytes(100))),
    Bomb("a GGUF of an array of 12 million texts", "checkpoint", lambda p: _gguf(p, 0, 1, _string("a") + struct.pack("<IIQ", 9, 8, 12 * 10**6) + bytes(96 * 10**6)), is_slow=True),
    Bomb("a GGUF of a million empty names", "checkpoint", lambda p: _gguf(p, 10**6, 0, (_string("") + struct.pack("<IIQ", 0, 0, 0)) * 10**6), is_slow=True),
    Bomb("a GGUF of dimensions of 2^40", "checkpoint", lambda p: _gguf(p, 1, 0, _string("a") + struct.pack("<I8QIQ", 8, *[2**40] * 8, 0, 0))),
    Bomb("100,000 LoRA modules", "lora", lambda p: _header(p, ("{" + ",".join(f'"transformer.layers.{i}.x.lora_{c}.weight":{{"dtype":"U8","shape":[0,0],"data_offsets":[0,0]}}' for i in range(50_000) for c in "AB") + "}").encode()), is_slow=True),
    Bomb("a LoRA with a deep config", "lora", lambda p: _peft(p, b"[" * 900_000)),
    Bomb("a LoRA with a deep software text", "lora", lambda p: _header(p, json.dumps({"__metadata__": {"software": "[" * 9_999}, "a.lora_A.weight": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}).encode())),
    Bomb("quantisation metadata of 80 MB", "quant", lambda p: _header(p, json.dumps({"__metadata__": {"_quantization_metadata": json.dumps({"layers": {str(i): "nvfp4" for i in range(3 * 10**6)}})}}).encode()), is_slow=True),
    Bomb("an expression of 100,000 signs", "expression", lambda p: p.write_text("-" * 99_990 + "a")),
    Bomb("an expression of 100,000 brackets", "expression", lambda p: p.write_text("(" * 49_990 + "a" + ")" * 49_990)),
    Bomb("an expression of 30,000 terms", "expression", lambda p: p.write_text("a" + "+b-b" * 15_000)),
    Bomb("an expression with a power of a power", "expression", lambda p: p.write_text("9**9**9**9*a")),
    Bomb("an expression with a tiny factor", "expression", lambda p: p.write_text("a + 1e-999999999*(b-a) + 1e-99999999999999*(b-a)")),
    Bomb("a record with a tiny multiplier", "record", lambda p: p.write_text(json.dumps({"expression": "a", "set": ["x=1e-999999999"]}))),
    Bomb("a record with deep lists", "record", lambda p: p.write_text("[" * 10**6)),
    Bomb("a pattern that backtracks", "pattern", lambda p: p.write_text("re:(a+)+(a|aa)*(.*a){30}$")),
    Bomb("a pattern of nested repeats", "pattern", lambda p: p.write_text("re:((a{1,500}){1,500}){1,500}x")),
    Bomb("a pattern of brackets", "pattern", lambda p: p.write_text("re:" + "(" * 240 + "a" + ")" * 240)),
    Bomb("a glob of 200 stars", "pattern", lambda p: p.write_text("*a" * 200)),
]  # fmt: skip


def read(reader: str, path: Path) -> None:
    """What the program does with such a file before it computes anything; "trusting" is a reader that believes a length."""
    match reader:
        case "trusting":
            with path.open("rb") as file:
                length = struct.unpack("<Q", file.read(8))[0]
                json.loads(bytearray(length)[:2] or b"{}")
        case "checkpoint":
            from mergetool.checkpoint.reader import Checkpoint

            Checkpoint.open(path).close()
        case "lora":
            from mergetool.adapters.lora_file import open_lora

            with open_lora(path):
                pass
        case "quant":
            from mergetool.checkpoint.reader import Checkpoint
            from mergetool.quant.weights import quantised

            with Checkpoint.open(path) as checkpoint:
                quantised(checkpoint, "f")
        case "expression":
            from mergetool.recipe.expression import parse

            parse(path.read_text())
        case "record":
            from mergetool.recipe import provenance

            provenance.read({"mergetool.recipe": path.read_text(), "mergetool.inputs": "[]"}, "out")
        case "pattern":
            from mergetool.arch import patterns, recognise
            from mergetool.checkpoint.dtypes import F32
            from mergetool.checkpoint.header import TensorInfo

            names = ["a" * length + end for length in (100, 500) for end in ("", "b")]
            anatomy = recognise({name: TensorInfo(F32, (1,), 0, 4) for name in names}, source="x", encodings={})
            patterns.select([path.read_text()], anatomy)


def run(folder: Path, bombs: Sequence[Bomb]) -> Tally:
    """Every bomb read in a process of its own: ended in time and memory, with a refusal in one sentence or without any trouble."""
    tally = Tally("22", "header, index, GGUF, LoRA and expression bombs")
    for number, bomb in enumerate(bombs):
        path = folder / f"bomb-{number}"
        bomb.write(path)
        tally.injected += 1
        fault, _, _ = explode(bomb, path)
        tally.judge(None if fault is None else f"{bomb.name}: {fault}")
        subprocess.run(["rm", "-rf", path], check=True)
    return tally


def explode(bomb: Bomb, path: Path) -> tuple[str | None, float, int]:
    """What is wrong with how the reader ended, its seconds of CPU and its bytes."""
    told = path.with_name("memory")
    told.unlink(missing_ok=True)
    reading = subprocess.Popen(
        [sys.executable, "-m", "tests.hostile.bombs", bomb.reader, str(path), str(told)],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, errors="replace", preexec_fn=_limit,
    )  # fmt: skip
    assert reading.stderr is not None
    said = reading.stderr.read()
    _, status, used = os.wait4(reading.pid, 0)
    reading.returncode = os.waitstatus_to_exitcode(status)
    reading.stderr.close()
    seconds, memory = used.ru_utime + used.ru_stime, int(told.read_text()) if told.exists() else 0
    fault = None
    if reading.returncode not in (0, 65) or said.count("\n") > 1:
        fault = f"exit {reading.returncode}: {said[-300:]}"
    elif seconds > MOST_SECONDS or memory > MOST_MEMORY:
        fault = f"takes {seconds:.1f} s and {memory >> 20} MiB"
    return fault, seconds, memory


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (MOST_SECONDS + 5, MOST_SECONDS + 5))


def main() -> None:
    from mergetool.errors import MergetoolError

    try:
        read(sys.argv[1], Path(sys.argv[2]))
    except MergetoolError as error:
        print(str(error)[:4000], file=sys.stderr)
        sys.exit(65)
    finally:
        Path(sys.argv[3]).write_text(str(resident("VmHWM")))


if __name__ == "__main__":
    main()
