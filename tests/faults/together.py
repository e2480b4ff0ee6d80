"""Row 11: several runs on one output at the same time."""

from __future__ import annotations

import random
import time

from tests.checkpoint.faults import content_of, violations
from tests.faults.kills import start
from tests.faults.tally import Tally
from tests.faults.world import EXPRESSION, Case, World

BUSY, REFUSED = 75, 73


def rivals(world: World) -> list[Case]:
    """Merges of other recipes onto the same file."""
    cases = [world.cases["merge"]]
    for factor in (2, 3):
        arguments = ["merge", EXPRESSION.replace("20*", f"{factor}*"), "--threads", "1"]
        made = world.scratch / f"rival-{factor}.safetensors"
        ended = world.program.run([*arguments, "-o", made, "--overwrite"], cwd=world.family)
        assert ended.code == 0, ended.err
        cases.append(Case(f"merge {factor}", "out.safetensors", arguments, content_of(made)))
    return cases


def compete(world: World, *, count: int, most: int = 8, seed: int = 11, broken: str = "") -> Tally:
    """Rounds of 2 to ``most`` runs: whoever ends well wrote all of it, one of them is at the target, the others say why not."""
    tally = Tally("11", "runs on one output at the same time")
    draw = random.Random(seed)
    cases = rivals(world)
    while tally.injected < count and not (broken and tally.violations):
        locks = "no flock" if not broken and draw.random() < 0.3 else broken
        runners = [draw.choice(cases) for _ in range(draw.randint(2, most))]
        if draw.random() < 0.3:
            runners = [runners[0]] * len(runners)
        old = draw.choice((None, cases[0].old))
        target = world.fresh(cases[0], old)
        runs = [start(world, case, target, broken=locks) for case in runners]
        for run in runs:
            run.go()
            if draw.random() < 0.5:
                time.sleep(draw.uniform(0, 0.01))
        endings = [run.wait() for run in runs]
        winners = [case.new for case, ended in zip(runners, endings, strict=True) if ended.code == 0]
        violated = [
            f"exit code {ended.code}: {ended.err}"
            for ended in endings
            if ended.code not in ((0, REFUSED) if locks == "no flock" else (0, BUSY))
        ]
        if not winners:
            violated.append("nobody won")
        if content_of(target) not in winners:
            violated.append("what is there is no winner's")
        violated += violations(target, None, content_of(target), inputs=world.inputs)
        violated += [f"said {e.err!r}" for e in endings if e.code and (e.err.count("\n") != 1 or "Traceback" in e.err)]
        kind = f"{'no flock' if locks == 'no flock' else 'locked'}, {'several' if len(winners) > 1 else 'one'} won"
        tally.note(kind, True, violated, f"{len(runs)} runs, {locks or 'locks'}, round {tally.injected} of seed {seed}")
    return tally
