"""Row 20, seen from outside: with hostile names in an index, the process opens nothing outside the index's folder.

``python -m tests.hostile.escapes FOLDER [HOLE]`` opens every case below FOLDER; `run` lets strace watch it do so.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors.torch import save_file

from tests.checkpoint.test_shards import NAMES
from tests.hostile.tally import Tally

ROOT = Path(__file__).parents[2]
SECRET = "secret.safetensors"
MARK = "/nonexistent/begin"


def cases(folder: Path) -> list[Path]:
    """A folder for every hostile name, with an index that names it beside a good shard; what it leads to is there where it can be."""
    import torch

    tensors = {"v": torch.ones(2)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / SECRET)
    found = []
    ways = [
        "../secret.safetensors",
        "./../secret.safetensors",
        str(folder / SECRET),
        "sub/../../secret.safetensors",
        "sub/inner.safetensors",
    ]
    for number, name in enumerate([*ways, *NAMES]):
        place = folder / f"case-{number}"
        (place / "sub").mkdir(parents=True)
        save_file({"w": torch.ones(2)}, place / "good.safetensors")
        save_file(tensors, place / "sub" / "inner.safetensors")
        index = {"weight_map": {"w": "good.safetensors", "v": name}}
        (place / "model.safetensors.index.json").write_text(json.dumps(index))
        found.append(place)
    return found


def run(folder: Path, *, hole: str = "") -> Tally:
    """Every case opened by one process under strace: each is refused, and no path outside its folder is touched."""
    tally = Tally("20", "shard names that lead out, by strace")
    places = cases(folder)
    tally.injected = len(places)
    log = folder / "strace.log"
    command = ["strace", "-f", "-qq", "-e", "trace=%file", "-s", "4096", "-o", str(log)]
    done = subprocess.run(
        [*command, sys.executable, "-m", "tests.hostile.escapes", str(folder), hole],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    verdicts = json.loads(done.stdout) if done.returncode == 0 else {}
    touched = dict.fromkeys((str(place) for place in places), "")
    current = None
    for path in _paths(log.read_text(errors="replace")):
        if path.startswith(MARK):
            current = path.removeprefix(MARK)
        elif current and not Path(os.path.normpath(path)).is_relative_to(current) and path not in ("", "."):
            touched[current] = touched[current] or path
    for place in places:
        fault = f"touches {touched[str(place)]}" if touched[str(place)] else None
        if verdicts.get(str(place)) != "refused":
            fault = fault or f"is {verdicts.get(str(place), 'not judged')}"
        tally.judge(None if fault is None else f"{place.name}: {fault}")
    return tally


def _paths(log: str) -> Iterator[str]:
    """Every path that a call names, in order."""
    for line in log.splitlines():
        found = re.search(r'\b[a-z0-9_]+\((?:AT_FDCWD, |\d+, )?"((?:[^"\\]|\\.)*)"', line)
        if found:
            yield found[1].encode().decode("unicode_escape")


def _open_all(folder: Path, hole: str) -> dict[str, str]:
    from mergetool.checkpoint import shards
    from mergetool.checkpoint.reader import Checkpoint
    from mergetool.errors import MergetoolError

    if hole == "only slashes at the start":
        shards.why_not_plain = lambda name, suffix: "absolute" if name.startswith("/") else None
    "\x1b".encode("unicode_escape")  # a codec is imported, which opens files, when it is first used
    verdicts = {}
    for place in sorted(folder.glob("case-*")):
        Path(MARK + str(place)).exists()
        try:
            with Checkpoint.open(place):
                verdicts[str(place)] = "opened"
        except MergetoolError:
            verdicts[str(place)] = "refused"
    return verdicts


def main(arguments: Sequence[str]) -> None:
    folder, hole = arguments
    json.dump(_open_all(Path(folder), hole), sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
