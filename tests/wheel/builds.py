"""Building what is installed, from a copy of this checkout: a build writes its library beside the sources, which other tests have open."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.patience import HANG

ROOT = Path(__file__).parents[2]


def listed(*folders: str) -> list[str]:
    """The files of the checkout that git has or would take, below some folders or all."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *folders]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted(name for name in names if name and (ROOT / name).is_file())


def copied(to: Path, names: Iterable[str]) -> Path:
    """A folder with those files of the checkout, as links where that can be: nothing of a build writes to them."""
    for name in names:
        place = to / name
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(ROOT / name, place)
        except OSError:  # another file system
            place.write_bytes((ROOT / name).read_bytes())
    return to


@dataclass(frozen=True)
class Built:
    """A file that was built, and what the build said."""

    path: Path
    said: str

    @property
    def files(self) -> dict[str, bytes]:
        """The content of a wheel by name, without what is made of the names: RECORD."""
        with zipfile.ZipFile(self.path) as archive:
            return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}


def build(source: Path, target: str, to: Path, **environment: str) -> Built:
    """Build a ``wheel`` or ``sdist`` of ``source`` into the folder ``to``, as pip does, in this environment."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(to)]
    done = subprocess.run(
        command,
        cwd=source,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stdout
    (path,) = to.iterdir()
    return Built(path, done.stdout)
