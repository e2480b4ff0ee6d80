"""The program that `test_kill` kills: writes one checkpoint, and one byte to its output at every step.

``python kill_target.py TARGET KIND`` writes the new checkpoint; KIND is ``file``, ``shards``, or ``broken`` for
a writer that does what the commit protocol forbids.
"""

from __future__ import annotations

import functools
import os
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mergetool.checkpoint import system
from mergetool.checkpoint.dtypes import F32
from mergetool.checkpoint.header import Header
from mergetool.checkpoint.writer import CheckpointWriter
from tests.checkpoint.faults import CALLS

HEADER = Header.plan([("x", F32, (40_000,)), ("y", F32, (60_000,))], {"format": "pt"})
STEP = 20_000


def data_of(name: str) -> bytes:
    return random.Random(name).randbytes(HEADER.tensors[name].nbytes)


def report_steps() -> None:
    """Write a byte to the standard output before every system call."""

    def announced(call: Callable[..., Any], *arguments: Any) -> Any:
        os.write(1, b".")
        return call(*arguments)

    for name in CALLS:
        setattr(system, name, functools.partial(announced, getattr(system, name)))


def write(target: Path, shard_size: int | None) -> None:
    pieces = [(name, start) for name, info in HEADER.tensors.items() for start in range(0, info.nbytes, STEP)]
    with CheckpointWriter.stage(target, HEADER, overwrite=True, shard_size=shard_size) as out:

        def work(part: int) -> None:
            for name, start in pieces[part::2]:
                out.write(name, start, memoryview(data_of(name))[start : start + STEP])

        threads = [threading.Thread(target=work, args=(part,)) for part in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        out.commit()


def write_wrongly(target: Path) -> None:
    """Header first, and at the final path: what many savers do."""
    with target.open("wb", buffering=0) as file:
        for block in [HEADER.encode(), *map(data_of, HEADER.tensors)]:
            for start in range(0, len(block), STEP):
                os.write(1, b".")
                file.write(block[start : start + STEP])


def main(target: Path, kind: str) -> None:
    if kind == "broken":
        write_wrongly(target)
    else:
        write(target, 200_000 if kind == "shards" else None)


if __name__ == "__main__":
    report_steps()
    main(Path(sys.argv[1]), sys.argv[2])
