"""The runs against hostile inputs, and the table of their counts.

    python -m tests.hostile [--only ROW]...                       as often as CI does
    python -m tests.hostile --long [--only ROW]... [--save]       as often as before a release

``--save`` appends a line of JSON a row to docs/explanation/faults.json, of which `python -m tests.faults --table` makes docs/explanation/faults.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.checkpoint.header_mutants import CORPUS, by_library, by_us, verdicts_on_mutants
from tests.hostile import (
    bombs,
    damage,
    determinism,
    escapes,
    injections,
    links,
    memory,
    names,
    offsets,
    pickles,
    pipelines,
    terminal,
    values,
)
from tests.hostile.fuzzing import CI_RUNS, ROOT, fuzz
from tests.hostile.tally import Tally
from tests.hostile.warm import Warm

LONG_FUZZ = 50
"""How many times the runs of CI a long run makes of every target."""
MUTANTS = {False: 50_000, True: 2_000_000}


@dataclass
class Place:
    """Where a harness works, and the warm program, which is started when the first harness asks for it."""

    folder: Path
    is_long: bool

    @cached_property
    def warm(self) -> Warm:
        return Warm(environment={"HF_HUB_OFFLINE": "0"}).__enter__()

    def close(self) -> None:
        """End the warm program, if it was started."""
        if "warm" in vars(self):
            self.warm.__exit__(None, None, None)


def corpus(place: Place) -> Tally:
    """The hand-made headers: the library's verdict but for the differences that are meant."""
    tally = Tally("header corpus", "hand-made headers against the safetensors library", injected=len(CORPUS))
    for case in CORPUS:
        expected = None if case.difference else by_library(case.raw)
        tally.judge(None if by_us(case.raw) == expected else case.name)
    return tally


def mutants(place: Place) -> Tally:
    """Changed headers in parts of 50,000, each from a seed of its own."""
    part = MUTANTS[False]
    tally = Tally("header mutants", "mutated headers against the safetensors library")
    for seed in range(MUTANTS[place.is_long] // part):
        verdicts, unexplained = verdicts_on_mutants(part, 20 + seed)
        tally.injected += part
        tally.judged += verdicts.total() + len(unexplained)
        tally.violations += [repr(raw[:200]) for raw in unexplained]
    return tally


def fuzzed(target: str) -> Callable[[Place], Tally]:
    """The harness of one target of the coverage-guided fuzzer."""
    return lambda place: fuzz(target, CI_RUNS[target] * (LONG_FUZZ if place.is_long else 1), place.folder)


def recipes(place: Place) -> Tally:
    """Damaged recipe files, read in a process under an audit hook, which stays in a process for good."""
    count = 200_000 if place.is_long else 20_000
    tally = Tally("26", "damaged recipes: no crash, no import, no file touched", injected=count)
    command = [sys.executable, "-m", "tests.recipe.fuzz", str(count), "1"]
    found = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    tally.judged = found["read"] + found["refused"] + len(found["crashes"])
    tally.violations += [*found["crashes"], *found["events"]]
    return tally


def exploded(place: Place) -> Tally:
    """Every bomb, in a long run the slow ones too."""
    return bombs.run(place.folder, [bomb for bomb in bombs.BOMBS if place.is_long or not bomb.is_slow])


ROWS: dict[str, Callable[[Place], Tally]] = {
    "header corpus": corpus,
    "header mutants": mutants,
    **{f"fuzz {target}": fuzzed(target) for target in CI_RUNS},
    "12": lambda place: determinism.matrix(place.folder),
    "15": lambda place: offsets.run(place.warm, place.folder, list(offsets.COMMANDS) if place.is_long else ["merge"]),
    "16": lambda place: memory.every(place.warm, place.folder, is_long=place.is_long),
    "18": lambda place: values.plant(place.folder),
    "19": lambda place: values.blend(place.folder),
    "20": lambda place: escapes.run(place.folder / "cases"),
    "20, random": lambda place: names.run(2_000_000 if place.is_long else 20_000),
    "21": lambda place: links.run(place.folder),
    "22": exploded,
    "23": lambda place: pickles.run(place.warm, place.folder),
    "26": recipes,
    "28": lambda place: terminal.run(place.warm, place.folder),
    "29": lambda place: pipelines.run(place.warm, place.folder),
    "31": lambda place: damage.run(place.folder, 20_000 if place.is_long else 2000),
    "31, replay": lambda place: damage.run(place.folder, 5000 if place.is_long else 300, look=damage.replayed),
    "audit": lambda place: injections.run(place.warm, place.folder, thin=1 if place.is_long else 5),
}


def chosen(only: list[str] | None) -> Iterator[tuple[str, Callable[[Place], Tally]]]:
    """The harnesses that are asked for."""
    unknown = set(only or ()) - ROWS.keys()
    if unknown:
        raise SystemExit(f"there is no row {unknown.pop()!r}; the rows are {', '.join(ROWS)}")
    return ((row, harness) for row, harness in ROWS.items() if not only or row in only)


def main() -> int:
    """0 when nothing was violated and everything that was injected was judged."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--long", action="store_true", help="run the release's counts")
    parser.add_argument("--only", action="append", metavar="ROW", help="repeatable")
    parser.add_argument("--save", action="store_true", help="append the counts to docs/explanation/faults.json")
    parser.add_argument(
        "--folder", type=Path, help="where to work; memory files are several GB [default: a temporary folder]"
    )
    options = parser.parse_args()
    is_sound = True
    for row, harness in chosen(options.only):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            place = Place(Path(folder), options.long)
            try:
                tally = harness(place)
            finally:
                place.close()
        tally.row = row
        print(tally, flush=True)
        if options.save:
            tally.save("long" if options.long else "CI")
        is_sound = is_sound and not tally.violations and tally.injected == tally.judged
    return 0 if is_sound else 1


if __name__ == "__main__":
    raise SystemExit(main())
