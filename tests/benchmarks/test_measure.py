"""`measure` against children whose cost is known: they allocate, map and fail by a stated amount."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from benchmarks.measure import INTERVAL, measure, process_tree

pytestmark = pytest.mark.loaded

MIB = 1 << 20
HOLD = f"import time; time.sleep({INTERVAL * 40})"  # a child must outlive a few samples, also late ones, for its peak to be seen


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def baseline() -> int:
    """Anonymous memory of an interpreter that does nothing."""
    return measure(python(HOLD)).peak_anon


def test_exit_code_and_output_are_reported() -> None:
    usage = measure(python("import sys; print('out', flush=True); print('err', file=sys.stderr); sys.exit(3)"))
    assert (usage.exit_code, usage.output) == (3, "out\nerr\n")


def test_a_signal_is_a_negative_exit_code() -> None:
    assert measure(python("import os; os.kill(os.getpid(), 9)")).exit_code == -9


def test_anonymous_memory_is_what_the_child_allocated() -> None:
    usage = measure(python(f"block = bytes(1) * {64 * MIB}; {HOLD}"))
    assert 64 * MIB <= usage.peak_anon - baseline() + MIB <= 66 * MIB
    assert usage.peak_rss >= usage.peak_anon


def test_memory_of_grandchildren_is_added() -> None:
    inner = f"block = bytes(1) * {48 * MIB}; {HOLD}"
    outer = f"import subprocess; block = bytes(1) * {32 * MIB}; subprocess.run({python(inner)!r}, check=True)"
    assert measure(python(outer)).peak_anon >= 80 * MIB


def test_pages_of_a_mapped_file_are_resident_but_not_anonymous(tmp_path: Path) -> None:
    path = tmp_path / "mapped"
    path.write_bytes(bytes(32 * MIB))
    code = f"import mmap; f = open({str(path)!r}, 'rb'); m = mmap.mmap(f.fileno(), 0, prot=1); m[::4096]; {HOLD}"
    usage = measure(python(code))
    assert usage.peak_rss - usage.peak_anon >= 32 * MIB
    assert usage.peak_anon <= baseline() + 2 * MIB


def test_the_end_is_noticed_at_once_and_seconds_are_positive() -> None:
    usage = measure(python("pass"))
    assert usage.samples >= 1
    assert usage.seconds > 0


def test_env_and_cwd_reach_the_child(tmp_path: Path) -> None:
    code = "import os; print(os.environ['CASE'], os.getcwd())"
    usage = measure(python(code), env={**os.environ, "CASE": "x"}, cwd=tmp_path)
    assert usage.output == f"x {tmp_path.resolve()}\n"


def test_a_missing_command_raises() -> None:
    with pytest.raises(FileNotFoundError):
        measure(["/nonexistent/command"])


def test_the_tree_of_a_dead_process_is_itself_only() -> None:
    assert process_tree(2**22 + 1) == [2**22 + 1]
