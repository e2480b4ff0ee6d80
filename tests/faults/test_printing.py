"""What a command prints may go nowhere: its work is done all the same."""

from __future__ import annotations

import os
from pathlib import Path

from tests.checkpoint.faults import content_of
from tests.faults.rows import Bench


def test_report_on_a_full_disk(bench: Bench) -> None:
    case = bench.world.cases["merge"]
    target = bench.world.fresh(case, None)
    ended = bench.world.run(case, target, out=Path("/dev/full"))
    assert ended.code == 74
    assert ended.err == (
        "mergetool: the work is finished, but its report could not be printed (No space left on device); "
        "check where stdout goes.\n"
    )
    assert content_of(target) == case.new


def test_reader_that_leaves_early_stops_nothing(bench: Bench) -> None:
    case = bench.world.cases["folder"]
    target = bench.world.fresh(case, None)
    pipe = bench.world.scratch / "early"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    run = bench.world.program.start(case.command(target, "--verbose"), cwd=bench.world.family, out=pipe, gated=True)
    run.at_gate()
    os.close(reader)
    run.go()
    ended = run.wait()
    assert (ended.code, ended.err) == (0, "")
    assert content_of(target) == case.new
