"""Row 31: a merge that was changed afterwards in any way is refused or found unsound by `verify`."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mergetool.engine import job
from mergetool.errors import MergetoolError
from mergetool.options.merging import MergeOptions
from mergetool.verification.replay import replay
from mergetool.verification.weights import check_weights
from tests.hostile.models import family
from tests.hostile.tally import Tally

EXPRESSION = "'small-alk.safetensors' + {} * ('small-a.safetensors' - 'small-b.safetensors')"
PAGE = 512  # of a file of 50 kB
SEED = 5  # of the stochastic rounding; a recipe with another is another recipe


class Output:
    """One merge in memory: its header as a table, its data, and the ways to damage them. Every way returns the whole file."""

    def __init__(self, raw: bytes, other: bytes) -> None:
        self.raw = raw
        self.other = other
        self.start = 8 + struct.unpack("<Q", raw[:8])[0]
        self.table: dict[str, Any] = json.loads(raw[8 : self.start])
        self.names = [name for name in self.table if name != "__metadata__"]

    def with_table(self, table: dict[str, Any], data: bytes) -> bytes:
        text = json.dumps(table).encode()
        return struct.pack("<Q", len(text)) + text + data

    def flipped_bit(self, dice: random.Random) -> bytes:
        """One bit of the data."""
        at = dice.randrange(self.start, len(self.raw))
        return self._with(at, bytes([self.raw[at] ^ 1 << dice.randrange(8)]))

    def flipped_header_bit(self, dice: random.Random) -> bytes:
        """One bit of the length, a tensor's entry, the recipe or the inputs; what "format" and the version say is no damage."""
        while True:
            at = dice.randrange(self.start)
            text = self.raw[: self.start]
            free = [(text.find(key), len(key)) for key in (b'"format":"pt"', b'"mergetool.version":"0.1.0"')]
            if not any(begin <= at < begin + size for begin, size in free):
                return self._with(at, bytes([self.raw[at] ^ 1 << dice.randrange(8)]))

    def zeroed_page(self, dice: random.Random) -> bytes:
        """A page that a disk lost."""
        at = dice.randrange(self.start, len(self.raw) - PAGE)
        return self._with(at, bytes(PAGE))

    def copied_page(self, dice: random.Random) -> bytes:
        """A page with the content of another one."""
        at, other = (dice.randrange(self.start, len(self.raw) - PAGE) for _ in range(2))
        return self._with(at, self.raw[other : other + PAGE])

    def stale_page(self, dice: random.Random) -> bytes:
        """A page of an older merge."""
        at = dice.randrange(self.start, len(self.raw) - PAGE)
        return self._with(at, self.other[at : at + PAGE])

    def truncated(self, dice: random.Random) -> bytes:
        return self.raw[: dice.randrange(len(self.raw))]

    def extended(self, dice: random.Random) -> bytes:
        return self.raw + dice.randbytes(dice.randint(1, 64))

    def swapped(self, dice: random.Random) -> bytes:
        """Two tensors of one shape under each other's name."""
        table = dict(self.table)
        one, other = dice.sample([name for name in self.names if table[name]["shape"] == [64, 96]], 2)
        table[one], table[other] = table[other], table[one]
        return self.with_table(table, self.raw[self.start :])

    def dropped(self, dice: random.Random) -> bytes:
        """One tensor gone, and the others moved up."""
        gone = dice.choice(self.names)
        return self._moved({name: name for name in self.names if name != gone})

    def renamed(self, dice: random.Random) -> bytes:
        gone = dice.choice(self.names)
        return self._moved({name: f"{name}.{dice.randrange(9)}" if name == gone else name for name in self.names})

    def reshaped(self, dice: random.Random) -> bytes:
        table = json.loads(json.dumps(self.table))
        table[dice.choice([n for n in self.names if len(table[n]["shape"]) == 2])]["shape"].reverse()
        return self.with_table(table, self.raw[self.start :])

    def retyped(self, dice: random.Random) -> bytes:
        table = json.loads(json.dumps(self.table))
        table[dice.choice(self.names)]["dtype"] = dice.choice(["F16", "I16", "U16"])
        return self.with_table(table, self.raw[self.start :])

    def other_recipe(self, dice: random.Random) -> bytes:
        """Another multiplier, other inputs, protected tensors, another rounding."""
        table = json.loads(json.dumps(self.table))
        recipe = json.loads(table["__metadata__"]["mergetool.recipe"])
        changes: list[dict[str, Any]] = [
            {"expression": f"small-alk + {dice.randint(21, 900)}*(small-a - small-b)"},
            {"expression": "'small-alk' + 20*('small-b' - 'small-a')"}, {"expression": "'small-a' + 20*('small-alk' - 'small-b')"},
            {"protect": [f"*layers.{dice.randrange(4)}*"]}, {"set": [f"*layers.{dice.randrange(4)}*=1/{dice.randint(2, 9)}"]},
            {"rounding": "stochastic", "seed": dice.randrange(SEED + 1, 99)}, {"exclude": [f"*layers.{dice.randrange(4)}*"]}, {"dtype": "fp16"},
        ]  # fmt: skip
        table["__metadata__"]["mergetool.recipe"] = json.dumps(recipe | dice.choice(changes))
        return self.with_table(table, self.raw[self.start :])

    def other_inputs(self, dice: random.Random) -> bytes:
        table = json.loads(json.dumps(self.table))
        inputs = json.loads(table["__metadata__"]["mergetool.inputs"])
        entry = dice.choice(inputs)
        digits = list(entry["fingerprint"])
        at = dice.randrange(len("sample-sha256:"), len(digits))
        digits[at] = dice.choice([digit for digit in "0123456789abcdef" if digit != digits[at]])
        entry["fingerprint"] = "".join(digits)
        table["__metadata__"]["mergetool.inputs"] = json.dumps(inputs)
        return self.with_table(table, self.raw[self.start :])

    def _with(self, at: int, content: bytes) -> bytes:
        return self.raw[:at] + content + self.raw[at + len(content) :]

    def _moved(self, kept: dict[str, str]) -> bytes:
        table: dict[str, Any] = {"__metadata__": self.table["__metadata__"]}
        data = b""
        for name, new in kept.items():
            begin, end = self.table[name]["data_offsets"]
            table[new] = self.table[name] | {"data_offsets": [len(data), len(data) + end - begin]}
            data += self.raw[self.start + begin : self.start + end]
        return self.with_table(table, data)


KINDS: list[Callable[[Output, random.Random], bytes]] = [
    Output.flipped_bit, Output.flipped_bit, Output.flipped_header_bit, Output.zeroed_page, Output.copied_page, Output.stale_page,
    Output.truncated, Output.extended, Output.swapped, Output.dropped, Output.renamed, Output.reshaped, Output.retyped,
    Output.other_recipe, Output.other_inputs,
]  # fmt: skip


def merged(output: Path, factor: int, options: MergeOptions, shard_size: int | None = None) -> Path:
    with job.open_merge(EXPRESSION.format(factor), options) as plan:
        job.run_merge(plan, output, threads=1, shard_size=shard_size)
    return output


def found(path: str) -> bool:
    """Whether the damage is seen."""
    try:
        return not check_weights(path, threads=1).sound
    except MergetoolError:
        return True


def run(folder: Path, count: int, *, look: Callable[[str], bool] = found, seed: int = 31) -> Tally:
    """``count`` damaged outputs of single files and a tenth as many of shards; ``look`` says whether a file's damage is seen."""
    tally = Tally("31", "damaged outputs that verify finds")
    family(folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        dice = random.Random(seed)
        outputs = []
        for number, options in enumerate((MergeOptions(), MergeOptions(rounding="stochastic", seed=SEED))):
            raw, other = (
                merged(Path(f"{number}-{factor}.safetensors"), factor, options).read_bytes() for factor in (20, 21)
            )
            outputs.append(Output(raw, other))
            if look(f"{number}-20.safetensors"):
                tally.violations.append("an output that is as it was made is called damaged")
        for number in range(count):
            output, kind = outputs[number % 2], KINDS[number // 2 % len(KINDS)]
            damaged = kind(output, dice)
            while damaged == output.raw:
                damaged = kind(output, dice)
            Path("damaged.safetensors").write_bytes(damaged)
            tally.injected += 1
            tally.judge(None if look("damaged.safetensors") else f"{kind.__name__} {number} is not found")
        for fault in _shards(count // 10, dice, look):
            tally.injected += 1
            tally.judge(fault)
    finally:
        os.chdir(before)
    return tally


def _shards(count: int, dice: random.Random, look: Callable[[str], bool]) -> Iterator[str | None]:
    """Indices and shards that do not belong together, or not to the recipe."""
    for factor in (20, 21):
        merged(Path(f"folder-{factor}"), factor, MergeOptions(), shard_size=20_000)
    names = sorted(path.name for path in Path("folder-20").glob("*.safetensors"))
    index = next(Path("folder-20").glob("*.index.json")).name
    if look("folder-20"):
        yield "shards that are as they were made are called damaged"
    for number in range(count):
        shutil.rmtree("damaged", ignore_errors=True)
        shutil.copytree("folder-20", "damaged")
        one, other = dice.sample(names, 2)
        table = json.loads(Path("damaged", index).read_text())
        kind = number % 6
        if kind == 0:
            shutil.copy(Path("folder-21", one), Path("damaged", one))
        elif kind == 1:
            Path("damaged", one).unlink()
        elif kind == 2:
            Path("damaged", one).rename("damaged/x"), Path("damaged", other).rename(Path("damaged", one))
            Path("damaged/x").rename(Path("damaged", other))
        elif kind == 3:
            table["weight_map"][dice.choice(list(table["weight_map"]))] = f"{dice.randrange(99)}.safetensors"
        elif kind == 4:
            del table["weight_map"][dice.choice(list(table["weight_map"]))]
        else:
            raw = bytearray(Path("damaged", one).read_bytes())
            raw[dice.randrange(8 + struct.unpack("<Q", raw[:8])[0], len(raw))] ^= 1 << dice.randrange(8)
            Path("damaged", one).write_bytes(raw)
        Path("damaged", index).write_text(json.dumps(table))
        yield None if look("damaged") else f"damage of kind {kind} to shards is not found"


def replayed(path: str) -> bool:
    """The same by `replay`, which compares every byte of every file."""
    try:
        return not replay(path, threads=1).same
    except MergetoolError:
        return True
