"""Where and on what a number was measured, and the append-only table it is kept in: benchmarks/results.csv."""

from __future__ import annotations

import csv
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results.csv")
_ROOT = RESULTS.parent.parent

# fmt: off
MEASURED = (
    "benchmark", "case", "provider", "metric", "value", "unit", "ratio_to", "ratio", "p20", "p50", "p80", "n",
    "cache", "bytes_read", "bytes_written", "peak_anon_mb", "peak_rss_mb",
)
PROVENANCE = ("commit", "machine", "device", "torch", "date", "config")
# fmt: on
COLUMNS = (*MEASURED, *PROVENANCE)


@dataclass(frozen=True, slots=True)
class Result:
    """One row: what was measured, without where. Megabytes are decimal; None is written as an empty cell.

    ``ratio`` is the median of the run-by-run ratios to provider ``ratio_to`` in the same session, never a
    quotient of numbers from two sessions.
    """

    benchmark: str  # the claim, e.g. "merge"
    case: str  # its input and setting, e.g. "full bf16 cold"
    provider: str  # who did it: "byte copy", "mergetool", ...
    metric: str
    values: Sequence[float]
    unit: str
    ratio_to: str | None = None
    ratio: float | None = None
    cache: str = ""  # "cold (drop_caches)", "cold (fadvise)", "warm"
    bytes_read: int | None = None
    bytes_written: int | None = None
    peak_anon_mb: float | None = None
    peak_rss_mb: float | None = None
    device: str = "cpu"
    config: Mapping[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """The cells of MEASURED; ``value`` is the median, as is p50."""
        p20, p50, p80 = (percentile(self.values, share) for share in (0.2, 0.5, 0.8))
        cells = {name: getattr(self, name) for name in MEASURED if hasattr(self, name)}
        cells |= {"value": p50, "p20": p20, "p50": p50, "p80": p80, "n": len(self.values)}
        return {name: _short(cell) for name, cell in cells.items()}


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the values lie, interpolated between neighbours.

    Example: percentile([1.0, 3.0, 2.0], 0.5) gives 2.0. Raises ValueError for no values.
    """
    if not values:
        raise ValueError("a percentile needs at least one value")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def median_ratio(values: Sequence[float], reference: Sequence[float]) -> float:
    """Median of the run-by-run ratios values[i] / reference[i]: drift of the machine between runs cancels."""
    return statistics.median(a / b for a, b in zip(values, reference, strict=True))


def append(results: Iterable[Result], *, folder: Path, path: Path = RESULTS) -> None:
    """Append rows with this moment's provenance; `folder` is where the measured files lie (for the disk's name).

    Raises ValueError when the table at `path` has other columns.
    """
    new = not path.exists()
    if not new and (found := path.read_text().partition("\n")[0].split(",")) != list(COLUMNS):
        raise ValueError(f"{path} has the columns {found}; wanted {list(COLUMNS)}")
    common = {"commit": commit(), "machine": machine(folder), "torch": torch_version(), "date": now()}
    with path.open("a", newline="") as table:
        writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        for result in results:
            config = json.dumps(dict(result.config), sort_keys=True)
            writer.writerow({**result.row(), **common, "device": result.device, "config": config})


def now() -> str:
    """The time in UTC, to the second, ISO 8601."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@lru_cache(maxsize=1)
def commit() -> str:
    """Short hash of the checked-out commit, with "+changes" when a tracked file but the results differs.

    Asked once a process: call it before a long measurement, or it names what was committed meanwhile.
    """
    head = _git("rev-parse", "--short=10", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", f":!{RESULTS.relative_to(_ROOT)}")
    return f"{head}+changes" if head and changed else head or "unknown"


def torch_version() -> str:
    """The installed torch's version, without importing it."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return "none"


@lru_cache(maxsize=4)
def machine(folder: Path) -> str:
    """CPU model and cores, RAM, kernel, and the disk that `folder` lies on, on one line."""
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [f"{cpu_model()} ({os.cpu_count()} cores)", f"{ram:.0f} GiB RAM"]
    parts += [f"{platform.system()} {platform.release()}", disk(folder)]
    return " · ".join(parts)


def cpu_model() -> str:
    """The CPU's name, with family and model where the name is as short as a virtual machine's often is."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    first: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        first.setdefault(name.strip(), value.strip())
    model = first.get("model name", platform.machine())
    family = first.get("cpu family")
    return f"{model} family {family} model {first.get('model')}" if family and len(model) < 12 else model


def disk(folder: Path) -> str:
    """File system type and block device under `folder`, e.g. "ext4 on vda"."""
    device = os.stat(folder).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return "unknown disk"
    for line in mounts:
        left, _, right = line.partition(" - ")
        if left.split()[2] == wanted:
            kind, source = right.split()[:2]
            return f"{kind} on {_disk_model(source)}"
    return "unknown disk"


def _disk_model(source: str) -> str:
    name = Path(source).name
    for block in (name, name.rstrip("0123456789"), name.rpartition("p")[0]):
        try:
            model = Path(f"/sys/block/{block}/device/model").read_text().strip() if block else ""
        except OSError:
            continue
        if model:
            return f"{name} ({model})"
    return name


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _short(cell: Any) -> Any:
    if cell is None:
        return ""
    return float(f"{cell:.5g}") if isinstance(cell, float) else cell


def size_name(model: Path) -> str:
    """What a result calls the size of a model file: "full" from 12 GB, else its megabytes.

    Of the file that was measured, not of an option: models made at another size may lie in the folder already.
    """
    size = model.stat().st_size
    return "full" if size > 12e9 else f"{size / 1e6:.0f} MB"
