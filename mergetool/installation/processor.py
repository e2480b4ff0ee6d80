"""The compiled kernels, the cores and the memory of this machine."""

from __future__ import annotations

import os
from pathlib import Path

from mergetool import packages
from mergetool.checkpoint import system
from mergetool.errors import PackageError
from mergetool.installation.diagnosis import Diagnosis

_CGROUP = Path("/sys/fs/cgroup")
_LEAST_MEMORY = 2_000_000_000


def kernels() -> Diagnosis:
    """The compiled kernels, or the reason why they are not used."""
    try:
        with packages.told():
            from mergetool_kernels import compiled
    except PackageError as error:
        return Diagnosis("kernels", "problem", "not loaded, since numpy cannot be", str(error))
    facts = {"file": str(compiled.LIBRARY), "compiler": compiled.compiler(), "instructions": compiled.instructions()}
    why = compiled.obstacle()
    if not why:
        by = facts["compiler"] or "a compiler that does not say"
        return Diagnosis(
            "kernels", "ok", f"compiled by {by}, {facts['instructions'] or 'instructions not told'}, {compiled.LIBRARY}",
            facts=facts,
        )  # fmt: skip
    remedy = "install a C compiler (Debian: apt install gcc; Windows: mingw-w64; macOS: Xcode's command line tools), then mergetool again"
    return Diagnosis(
        "kernels",
        "note",
        f"not used: {why}; numpy gives the same bytes, in more of the processor's time",
        remedy,
        facts,
    )


def cores() -> Diagnosis:
    """The cores that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota()
    facts = {"cores": os.cpu_count(), "allowed": allowed, "quota": quota}
    if quota is not None and quota < allowed:
        return Diagnosis(
            "cores", "note", f"{allowed}, of which this container may use the time of {quota:g}",
            f"use `threads={max(1, round(quota))}`", facts,
        )  # fmt: skip
    return Diagnosis("cores", "ok", str(allowed), facts=facts)


def memory() -> Diagnosis:
    """The memory of the machine, or of the container that this is."""
    whole, limit = system.main_memory(), _memory_limit()
    facts = {"bytes": whole, "limit": limit}
    if whole is None and limit is None:
        return Diagnosis("memory", "note", "the system does not say how much there is", facts=facts)
    least = min(size for size in (whole, limit) if size is not None)
    said = f"{least / 1e9:.1f} GB" + (" (limit of this container)" if least == limit and limit != whole else "")
    if least < _LEAST_MEMORY:
        return Diagnosis("memory", "note", f"{said}: merges take half a gigabyte, pictures many", facts=facts)
    return Diagnosis("memory", "ok", said, facts=facts)


def _own_groups(name: str) -> list[Path]:
    """Files of that name of this process's control group and those above it, of either version of the interface."""
    try:
        lines = Path("/proc/self/cgroup").read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    places = [_CGROUP / name, _CGROUP / "memory" / name, _CGROUP / "cpu" / name]
    for line in lines:
        _, kinds, own = [*line.split(":", 2), "", ""][:3]
        root = _CGROUP / kinds.split(",")[-1] if kinds else _CGROUP
        folder = root / own.strip("/")
        while folder != root and root in folder.parents:
            places.append(folder / name)
            folder = folder.parent
    return places


def _texts(name: str) -> list[str]:
    found = []
    for place in _own_groups(name):
        try:
            found.append(place.read_text("utf-8").strip())
        except (OSError, UnicodeDecodeError):
            continue
    return found


def _memory_limit() -> int | None:
    """Bytes that the control groups of this process allow; None for no limit."""
    numbers = [
        int(text) for name in ("memory.max", "memory.limit_in_bytes") for text in _texts(name) if text.isdecimal()
    ]
    return min((number for number in numbers if number < 1 << 60), default=None)


def _cpu_quota() -> float | None:
    """Cores' worth of time that the control groups of this process allow; None for no limit."""
    shares = []
    for text in _texts("cpu.max"):
        quota, _, period = text.partition(" ")
        if quota.isdecimal() and period.isdecimal() and int(period):
            shares.append(int(quota) / int(period))
    for quota, period in zip(_texts("cpu.cfs_quota_us"), _texts("cpu.cfs_period_us"), strict=False):
        if quota.isdecimal() and period.isdecimal() and int(period):
            shares.append(int(quota) / int(period))
    return min(shares, default=None)
