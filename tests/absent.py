"""Python processes in which packages are missing or broken, as an installation leaves them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.patience import HANG

_FINDER = """
import os, sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in os.environ["ABSENT"].split():
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
"""

_COMMANDS = """
import contextlib, io, json, sys, traceback
from mergetool_kernels import compiled
if sys.argv[1] == "no kernels":
    compiled.LIBRARY = compiled.LIBRARY.with_name("absent.so")
from mergetool.engine import device
device.WORTH_STARTING = 0  # as if every file were large enough for a GPU to be looked for
from mergetool.__main__ import main
ran = []
for words in json.loads(sys.argv[2]):
    sys.argv = ["mergetool", *words]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
        except BaseException:
            traceback.print_exc()
            code = "traceback"
    ran.append([code, out.getvalue(), err.getvalue()])
print(json.dumps([ran, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


@dataclass(frozen=True)
class Ended:
    """How one command ended."""

    code: int | str
    out: str
    err: str


def environment(
    folder: Path, *, absent: Sequence[str] = (), broken: Sequence[str] = (), error: str = "OSError"
) -> dict[str, str]:
    """Variables for a Python whose modules ``absent`` are not there, and whose modules ``broken`` raise ``error`` when they are imported."""
    place = folder / "site"
    place.mkdir(exist_ok=True)
    if absent:
        (place / "sitecustomize.py").write_text(_FINDER)
    for module in broken:
        (place / module).mkdir(exist_ok=True)
        said = "libbroken.so: cannot open shared object file: No such file or directory"
        (place / module / "__init__.py").write_text(f"raise {error}({said!r})\n")
    config = {"MERGETOOL_CONFIG_DIR": str(folder / "config"), "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **config, "PYTHONPATH": str(place), "ABSENT": " ".join(absent)}


def commands(
    lines: Sequence[Sequence[str]], cwd: Path, env: Mapping[str, str], *, kernels: bool = True
) -> tuple[list[Ended], set[str]]:
    """Run some commands one after the other in one such process; returns how each ended, and the top modules that are imported afterwards."""
    asked = [sys.executable, "-c", _COMMANDS, "kernels" if kernels else "no kernels", json.dumps(lines)]
    done = subprocess.run(asked, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=HANG)
    assert done.returncode == 0, done.stderr
    ran, modules = json.loads(done.stdout)
    return [Ended(*each) for each in ran], set(modules)
