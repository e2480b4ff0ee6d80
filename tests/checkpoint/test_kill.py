"""kill -9 at any moment leaves the complete old output or the complete new one, and the next run clears up.

A real process writes while this one counts the steps it announces, and kills it after a drawn number of them; it
runs on meanwhile, so that the blow falls somewhere in or after that step.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint import kill_target
from tests.checkpoint.faults import Content, beside, content_of, violations

pytestmark = pytest.mark.loaded

ROOT = Path(__file__).parents[2]
OLD_FILE: Content = b"the old checkpoint"
OLD_FOLDER: Content = {"diffusion_pytorch_model.safetensors": b"the old checkpoint", "README.md": b"old"}


def start(target: Path, kind: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.checkpoint.kill_target", str(target), kind]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)


def steps_of(target: Path, kind: str) -> int:
    """How many steps an undisturbed run announces."""
    output, errors = start(target, kind).communicate()
    assert errors == b""
    return len(output)


def kill_after(target: Path, kind: str, steps: int) -> bool:
    """Run until ``steps`` steps were announced, then SIGKILL; False when the run ended by itself first."""
    with start(target, kind) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for _ in range(steps):
            if not process.stdout.read(1):
                break
        process.kill()
        process.wait()
        assert process.stderr.read() == b""
    assert process.returncode in (0, -signal.SIGKILL)
    return process.returncode != 0


def put(target: Path, content: Content) -> None:
    shutil.rmtree(target.parent)
    target.parent.mkdir()
    if isinstance(content, dict):
        target.mkdir()
        for name, data in content.items():
            (target / name).write_bytes(data)
    elif content is not None:
        target.write_bytes(content)


CASES = [
    ("file", "out.safetensors", None),
    ("file", "out.safetensors", OLD_FILE),
    ("shards", "out", None),
    ("shards", "out", OLD_FOLDER),
]


@pytest.mark.parametrize(("kind", "name", "old"), CASES, ids=["new file", "old file", "new folder", "old folder"])
def test_killed_run_leaves_old_or_new(tmp_path: Path, kind: str, name: str, old: Content) -> None:
    target = tmp_path / "place" / name
    target.parent.mkdir()
    put(target, old)
    steps = steps_of(target, kind)
    new = content_of(target)
    assert violations(target, old, new, succeeded=True) == []
    draw = random.Random(f"{kind} {old}")
    moments = [draw.randint(1, steps) for _ in range(5)] + [draw.randint(steps - 9, steps) for _ in range(3)]
    killed = 0
    for moment in moments:
        put(target, old)
        killed += kill_after(target, kind, moment)
        assert violations(target, old, new, killed=True) == [], f"killed at step {moment} of {steps}"
        kill_target.main(target, kind)
        assert violations(target, old, new, succeeded=True) == [], f"run after the kill at step {moment}"
    assert killed >= len(moments) // 2


def test_killed_run_leaves_its_temporary_and_lock_for_the_next(tmp_path: Path) -> None:
    """That the kills above strike a run that has something to leave behind."""
    target = tmp_path / "out.safetensors"
    assert kill_after(target, "file", 8)
    temporaries, locks = beside(target)
    assert (len(temporaries), len(locks)) == (1, 1)


def test_wrong_protocol_is_caught(tmp_path: Path) -> None:
    target = tmp_path / "place" / "out.safetensors"
    target.parent.mkdir()
    steps = steps_of(target, "broken")
    new = content_of(target)
    caught: list[str] = []
    for moment in range(1, steps + 1, 3):
        put(target, OLD_FILE)
        if kill_after(target, "broken", moment):
            caught += violations(target, OLD_FILE, new, killed=True)
    assert "out.safetensors is neither the old nor the new output" in caught
