"""Run a command and measure what it costs: wall seconds, peak memory of its process tree, bytes of storage traffic.

Linux only: the numbers come from /proc.

    usage = measure(["mergetool", "merge", ...])
    usage.seconds, usage.peak_anon
"""

from __future__ import annotations

import os
import select
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

INTERVAL = 0.05  # seconds between samples; a sample of a process tree takes under 1 ms


@dataclass(frozen=True, slots=True)
class Usage:
    """What one run cost. Sizes are bytes.

    ``peak_anon`` is the largest sampled sum of RssAnon (memory that is the processes' own: no mapped file) over
    the process tree; a peak shorter than INTERVAL can slip through. ``peak_rss`` is the larger of the sampled sum
    of VmRSS and the kernel's own high-water mark VmHWM of any single process; pages of mapped files count in it.
    ``read_bytes`` and ``write_bytes`` are storage traffic, page-ins through mappings included: what the page
    cache already held is not in them.
    """

    seconds: float = 0.0
    exit_code: int = 0
    peak_anon: int = 0
    peak_rss: int = 0
    read_bytes: int = 0
    write_bytes: int = 0
    samples: int = 0
    output: str = ""


def measure(command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Usage:
    """Run `command` to its end and return its cost; `output` holds stdout and stderr, mixed as they came.

    Seconds run from just before the process is started to the moment it ended. A failing command is no error
    here: look at exit_code (negative for a signal). Raises FileNotFoundError when the command does not exist.
    """
    with tempfile.TemporaryFile() as log:
        begin = time.perf_counter()
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=None if env is None else dict(env),
            cwd=cwd,
        )
        try:
            usage = _watch(process.pid)
            end = time.perf_counter()
            # The process is dead but not reaped, so its counters are still there and now complete.
            usage = _with_traffic(usage, process.pid)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        text = log.read().decode(errors="replace")
    return replace(usage, seconds=end - begin, exit_code=process.returncode, output=text)


def _watch(pid: int) -> Usage:
    """Sample until the process ends; the end wakes us at once, whatever the interval."""
    usage = Usage()
    poller = select.poll()
    ended = os.pidfd_open(pid)
    try:
        poller.register(ended, select.POLLIN)
        while True:
            usage = _sample(usage, pid)
            if poller.poll(INTERVAL * 1000):
                return usage
    finally:
        os.close(ended)


def _sample(usage: Usage, pid: int) -> Usage:
    anon = rss = high = 0
    for member in process_tree(pid):
        status = _status(member)
        anon += status.get("RssAnon", 0)
        rss += status.get("VmRSS", 0)
        high = max(high, status.get("VmHWM", 0))
    return replace(
        usage,
        peak_anon=max(usage.peak_anon, anon),
        peak_rss=max(usage.peak_rss, rss, high),
        samples=usage.samples + 1,
    )


def process_tree(pid: int) -> list[int]:
    """`pid` and all its living descendants; processes that end meanwhile are left out."""
    found, queue = [], [pid]
    while queue:
        member = queue.pop()
        found.append(member)
        try:
            for thread in os.listdir(f"/proc/{member}/task"):
                queue.extend(map(int, Path(f"/proc/{member}/task/{thread}/children").read_text().split()))
        except OSError:  # it, or one of its threads, just ended
            continue
    return found


def _status(pid: int) -> dict[str, int]:
    """The sizes in /proc/PID/status, in bytes; empty for a process that is gone or a zombie.

    smaps_rollup would be exact where these counters lag by a few pages a thread, but it walks every mapped
    page under the lock that page faults need: with 37 GB of checkpoints mapped it would slow what it measures.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    sizes = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(size) * 1024 for name, size, _ in sizes}


def _with_traffic(usage: Usage, pid: int) -> Usage:
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:  # kernels without task I/O accounting
        return usage
    counters = dict(line.split(": ") for line in lines)
    return replace(usage, read_bytes=int(counters["read_bytes"]), write_bytes=int(counters["write_bytes"]))
