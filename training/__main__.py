"""Train the new family, piece by piece: ``python -m training --all`` goes on from where it stopped. See PLAN.md.

vae, ancestor, base, teacher, turbo, deturbo, striped, hollow, alkahest
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from training import batched
from training.recipes import RECIPES
from training.run import Attempt, Clock, Round

ROOT = Path(__file__).parents[1]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--member", choices=RECIPES, help="train this one")
    what.add_argument(
        "--shelve", choices=RECIPES, help="keep an unfinished one's weights beside the members, to be committed"
    )
    what.add_argument("--all", action="store_true", help="train all that are not finished, in order")
    parser.add_argument("--attempt", type=int, default=1, choices=(1, 2, 3))
    parser.add_argument(
        "--minutes", type=float, default=50, help="stop after so many, with the state saved (default: 50)"
    )
    parser.add_argument("--state", type=Path, default=ROOT / ".lab-state", help="folder of states and data")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
    parser.add_argument(
        "--eager", action="store_true", help="do not compile the blocks (needed without a C++ compiler)"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if not options.eager:
        batched.compile_blocks()
    clock = Clock(time.monotonic() + 60 * options.minutes)
    clock.listen()
    members = Path(__file__).parent / "members" / str(options.attempt)
    state = options.state / str(options.attempt)
    attempt = Attempt(options.attempt, members, state, torch.device(options.device), clock)
    if options.shelve:
        Round(attempt, RECIPES[options.shelve]).shelve()
        return 0
    for name in RECIPES if options.all else (options.member,):
        if not attempt.train(name):
            return 0
        if not attempt.record()[name]["passed"] and name != "alkahest":
            print(f"attempt {options.attempt} ends with {name}, which missed its gate twice; see PLAN.md.")
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
