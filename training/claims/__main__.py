"""Measure what the new family shows, a piece at a time: ``nice -n 19 .venv/bin/python -m training.claims --minutes 50`` goes on from where it stopped.

What has been read is kept in claims.json beside the members and is not drawn again unless they, its prompts or its settings change. Every
table whose drawings have all been read is written, to claims.md beside it, or with --page between its markers in a page of docs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import provenance
from training import batched
from training.claims import sheets, tables
from training.claims.bench import Bench
from training.claims.drawings import CARRIERS, PLAIN, SHARES, Drawing
from training.recipes import SHIPPED
from training.run import Clock

ROOT = Path(__file__).parents[2]
COUNT, QUICK = 200, 20
TABLES = (*PLAIN, "both", "verify")
"""In the order they are measured: the claim first that the family was made for."""

LATER = {"both": len(CARRIERS) * len(SHARES), "verify": 12}
"""Drawings of 30 steps in the tables whose drawings are known once others are read, about."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.claims", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--attempt", type=int, default=1, choices=(1, 2, 3))
    parser.add_argument("--members", type=Path, help="folder of the members (default: that of the attempt)")
    parser.add_argument("--state", type=Path, default=ROOT / ".lab-state" / "claims", help="folder of drawn pictures")
    parser.add_argument("--only", default=",".join(TABLES), help="tables to measure, with commas")
    parser.add_argument("--minutes", type=float, default=50, help="begin no drawing after so many (default: 50)")
    parser.add_argument("--quick", action="store_true", help="20 pictures, kept in the state folder: to try it")
    parser.add_argument("--dry-run", action="store_true", help="list what is to be drawn, and the minutes it takes")
    parser.add_argument(
        "--page", type=Path, help="put the tables in this page, and the sheets in pictures beside its folder"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.device == "cpu":
        batched.compile_blocks()
    provenance.commit()
    members = options.members or ROOT / "training" / "members" / str(options.attempt)
    if missing := [name for name in SHIPPED if not (members / name / "transformer").exists()]:
        raise SystemExit(f"{members} has no {' and no '.join(missing)} yet; train with python -m training --all.")
    results = options.state / "quick.json" if options.quick else members / "claims.json"
    bench = Bench(members, results, options.state, count=QUICK if options.quick else COUNT, device=options.device)
    made, asked = tables.Tables(bench), options.only.split(",")
    if unknown := set(asked) - set(TABLES):
        raise SystemExit(f"there is no table {' or '.join(sorted(unknown))}; they are {', '.join(TABLES)}.")
    estimate(made, asked, listed=options.dry_run)
    if not options.dry_run:
        measure(made, asked, options.minutes)
    write(made, options.page or results.with_suffix(".md"), fresh=options.page is None)
    return 0


def unread(made: tables.Tables, name: str) -> list[Drawing] | None:
    """What a table lacks; None where that depends on another table."""
    try:
        wanted = dict.fromkeys(made.drawings(name))
    except tables.Unread:
        return None
    return [drawing for drawing in wanted if made.bench.readings(drawing) is None]


def estimate(made: tables.Tables, asked: Sequence[str], *, listed: bool) -> None:
    """Print the drawings that are left and their minutes, by table."""
    total, seen = 0.0, set[Drawing]()
    for name in asked:
        rows = unread(made, name)
        left = [drawing for drawing in rows or () if drawing not in seen]
        seen |= set(left)
        usual = made.bench.seconds(PLAIN["naive"][0])
        minutes = (LATER[name] * usual if rows is None else sum(map(made.bench.seconds, left))) / 60
        total += minutes
        about = f"about {LATER[name]} drawings, by what other tables show" if rows is None else f"{len(left)} drawings"
        print(f"{name}: {about}, {minutes:.0f} minutes of one core", flush=True)
        if listed:
            print("".join(f"  {drawing.name}\n" for drawing in left), end="")
    print(f"{total:.0f} minutes of one core are left, at {made.bench.count} pictures each", flush=True)


def measure(made: tables.Tables, asked: Sequence[str], minutes: float) -> None:
    """Draw and read what is left, until the clock stops it."""
    clock = Clock(time.monotonic() + 60 * minutes)
    clock.listen()
    for name in asked:
        for drawing in unread(made, name) or ():
            if clock.paused():
                print("paused; the next call goes on", flush=True)
                return
            began = time.monotonic()
            made.bench.measure(drawing)
            right = made.right(drawing).mean()
            print(f"{name}: {drawing.name}: {100 * right:.1f} %, {time.monotonic() - began:.0f} s", flush=True)


def write(made: tables.Tables, page: Path, *, fresh: bool) -> None:
    """Write every table that is complete; others keep what the page had."""
    texts = {}
    for name in ("claims", *TABLES):
        try:
            texts[name] = f"{made.text(name)}\n\n<sub>{_source(made.bench)}</sub>"
        except tables.Unread:
            print(f"{name}: not complete yet", flush=True)
    if not texts:
        return
    if fresh:
        parts = [f"<!-- table: {name} -->\n{text}\n<!-- end -->\n" for name, text in texts.items()]
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text("\n".join(parts))
    else:
        for name, text in texts.items():
            tables.fill(page, name, text)
        if len(texts) > len(TABLES):
            sheets.write(made, page.parents[1] / "pictures")
    print(f"{', '.join(texts)}: written to {page}", flush=True)


def _source(bench: Bench) -> str:
    """How many pictures, and where and with what they were made."""
    keys = ("commit", "machine", "device", "versions")
    said = [" and ".join(sorted({entry[key] for entry in bench.stored.values()})) for key in keys]
    return f"{bench.count} pictures each, 95 % bootstrap intervals over pictures · {' · '.join(said)}"


if __name__ == "__main__":
    raise SystemExit(main())
