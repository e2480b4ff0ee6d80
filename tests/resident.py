"""How much memory this process has, as the system counts it."""

from __future__ import annotations

from pathlib import Path


def resident(what: str) -> int:
    """Bytes of this process in memory: now (VmRSS), or the most since the last reset (VmHWM). Its ru_maxrss would begin with that of the
    process it was forked from."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return 1024 * int(line.split()[1])
