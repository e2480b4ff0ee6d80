"""The fault runs of a release, in parts that can be taken up again, and the table of their counts.

    python -m tests.faults --long [--only ROW]... [--results FILE]    run what is missing at this commit
    python -m tests.faults --table [--results FILE]                   write docs/explanation/faults.md from the file of counts

Every part appends a line of JSON to the results: row, what, tier, injected, fired, violations, kinds, commit, machine.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.faults import table
from tests.faults.rows import ROWS, Bench, Row, why_not_here
from tests.faults.tally import RESULTS, provenance


def main() -> int:
    """0 when nothing was violated and every count was reached."""
    options = _parser().parse_args()
    if options.long:
        reason = why_not_here()
        if reason is not None:
            print(f"the fault runs cannot be done here: {reason}", file=sys.stderr)
            return 2
        rows = [row for row in ROWS if not options.only or {row.number, row.name} & set(options.only)]
        sound = run(rows, options.results)
        print(table.summary(options.results))
        return 0 if sound else 1
    if options.table:
        table.write(options.results)
        return 0
    print(table.summary(options.results))
    return 0


def run(rows: list[Row], results: Path) -> bool:
    """Do what is missing of every row, a part at a time; whether nothing was violated."""
    sound = True
    commit = provenance()["commit"]
    with Bench() as bench:
        for row in rows:
            done = table.parts(results, row, commit)
            fired = sum(part["fired"] for part in done)
            seed = 1 + len(done)
            while fired < row.long:
                tally = row.harness(bench, min(row.part, row.long - fired), seed)
                tally.row = row.number
                tally.save("long", results)
                print(tally, flush=True)
                sound = sound and not tally.violations
                fired, seed = fired + tally.fired, seed + 1
                if not tally.fired:
                    break
    return sound


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--long", action="store_true", help="run the release's counts")
    parser.add_argument("--only", action="append", metavar="ROW", help="a row's number or name; repeatable")
    parser.add_argument("--table", action="store_true", help="write docs/explanation/faults.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
