"""Imports in a process of their own, with a time limit.

A package that hangs or ends its process is found out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LIMIT = 60.0
"""Seconds for all imports of a process; torch takes 1 to 10, more from a cold disk."""

_CODE = """
import importlib, json, sys, warnings
warnings.simplefilter("ignore")
given = json.loads(sys.argv[1])
sys.path[:] = given["path"]

def gpus(torch):
    found = {"cuda": torch.version.cuda, "hip": torch.version.hip, "devices": [], "why": ""}
    try:
        if found["cuda"] or found["hip"]:
            torch.cuda.init()
        for place in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            free, total = torch.cuda.mem_get_info(place)
            name, kind = torch.cuda.get_device_name(place), torch.cuda.get_device_capability(place)
            found["devices"].append({"name": name, "free": free, "total": total, "capability": list(kind)})
    except Exception as error:
        found["why"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return found

for name in given["modules"]:
    told = {"module": name, "error": ""}
    try:
        module = importlib.import_module(name)
        if name == "torch":
            told["gpus"] = gpus(module)
    except BaseException as error:
        lines = str(error).splitlines() or [""]
        told["error"] = f"{type(error).__name__}: {lines[0][:200]}"
    print(json.dumps(told), flush=True)
"""


def imported(modules: Sequence[str], limit: float = LIMIT) -> dict[str, dict[str, Any]]:
    """Import modules, one after the other, in another process.

    Returns the outcome of each by its name.

    ``error`` is "" for one that can be imported. A module that ends the process, or does not end in ``limit`` seconds, has that as its error; those
    after it are not in the result. ``gpus`` of torch are the devices that it sees, or why there are none.
    """
    asked = json.dumps({"path": [place for place in sys.path if place], "modules": list(modules)})
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(
            [sys.executable, "-c", _CODE, asked],
            stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.DEVNULL, cwd=_some_folder(), env=os.environ,
        )  # fmt: skip
        try:
            end = process.wait(limit)
            ended = f"it ended the process with code {end}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            ended = f"it was not done after {limit:.0f} seconds"
        out.seek(0)
        lines = out.read().decode("utf-8", "replace").splitlines()
    return _read(lines, modules, ended)


def _read(lines: Sequence[str], modules: Sequence[str], ended: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        try:
            told = json.loads(line)
        except ValueError:  # printed by a package
            continue
        if isinstance(told, dict) and told.get("module") in modules:
            found[told["module"]] = told
    culprit = next((module for module in modules if module not in found), None)
    if culprit is not None:
        found[culprit] = {"module": culprit, "error": ended}
    return found


def _some_folder() -> Path:
    """A folder that is there, since the working folder may be gone."""
    return Path(sys.executable).parent
