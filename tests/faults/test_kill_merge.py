"""``kill -9`` of the real program at random moments: the target is absent or complete, and the next run clears up.

The delays are drawn over the whole run, from before Python is up to after the rename, with half of them in the last
part, where the file is staged, written and published.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.generate import SIZES
from tests.checkpoint.faults import violations
from tests.families import checkpoint

MERGE = "'alk.safetensors' + 20*('a.safetensors' - 'b.safetensors')"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    for seed, name in enumerate(["alk", "a", "b"]):
        checkpoint(folder / f"{name}.safetensors", variant=seed, config=dict(SIZES["small"]))
    return folder


def start(family: Path, target: Path) -> subprocess.Popen[bytes]:
    program = Path(sys.executable).with_name("mergetool")
    command = [program, "merge", MERGE, "-o", target, "--overwrite", "--threads", "1"]
    return subprocess.Popen(command, cwd=family, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def run_whole(family: Path, target: Path) -> float:
    """Seconds of a run that nobody disturbs."""
    begin = time.monotonic()
    with start(family, target) as process:
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    return time.monotonic() - begin


def kill_at_random_moments(family: Path, folder: Path, count: int, seed: int) -> int:
    """How many of ``count`` runs were killed before their end; asserts the invariants after each."""
    inputs = {path: path.read_bytes() for path in family.iterdir()}
    target = folder / "out.safetensors"
    length = run_whole(family, target)
    new = target.read_bytes()
    target.unlink()
    draw = random.Random(seed)
    killed = 0
    for number in range(count):
        old = None if number % 2 else b"the old checkpoint"
        if old is not None:
            target.write_bytes(old)
        delay = draw.uniform(0, length) if number % 4 < 2 else draw.uniform(0.7 * length, 1.05 * length)
        with start(family, target) as process:
            try:
                process.wait(timeout=delay)
            except subprocess.TimeoutExpired:
                process.kill()
        assert process.returncode in (0, -signal.SIGKILL)
        killed += process.returncode != 0
        assert not violations(target, old, new, killed=True), f"killed after {delay:.3f} s"
        target.unlink(missing_ok=True)
    assert {path: path.read_bytes() for path in family.iterdir()} == inputs
    run_whole(family, target)
    assert not violations(target, None, new, succeeded=True)
    return killed


def test_ten_kills(family: Path, tmp_path: Path) -> None:
    assert kill_at_random_moments(family, tmp_path, 10, seed=1) >= 5


@pytest.mark.long
def test_a_hundred_kills(family: Path, tmp_path: Path) -> None:
    assert kill_at_random_moments(family, tmp_path, 100, seed=2) >= 60


def test_a_protocol_that_writes_in_place_is_caught(tmp_path: Path) -> None:
    """The checker is worth something: half a file at the target is a violation."""
    target = tmp_path / "out.safetensors"
    target.write_bytes(b"half of it")
    assert violations(target, None, b"half of it and the rest", killed=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_polite_signal_leaves_nothing_behind(family: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Sent as soon as the temporary file is there, so that it falls into the work."""
    target = tmp_path / "out.safetensors"
    with start(family, target) as process:
        while process.poll() is None and not list(tmp_path.glob(".out.safetensors.mergetool-*")):
            time.sleep(0.001)
        process.send_signal(number)
        _, errors = process.communicate()
    if process.returncode == 0:
        pytest.fail("the run ended before the signal; the files are too small")
    assert process.returncode == 128 + number
    assert errors.count(b"\n") == 1
    assert list(tmp_path.iterdir()) == []
    shutil.rmtree(tmp_path)
