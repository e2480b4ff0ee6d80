"""Builds the compiled kernels of mergetool_kernels with the C compiler of this machine, where there is one.

Without it the package is installed as it is: everything works, with numpy and torch, on more of the processor's time.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("kernels/mergetool_kernels")
SOURCES = ("sums.c", "blend.c")
LIBRARY = FOLDER / "for_processor.so"
# No -march: the kernels choose by themselves what the processor can do. No contraction: the same sums on all of them.
FLAGS = ["-O3", "-std=gnu11", "-ffp-contract=off", "-fPIC", "-shared", "-Wno-psabi"]


class CompiledKernels(BuildHookInterface[Any]):
    """The hook that pyproject.toml names; runs for wheels, editable ones included."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile into the package's folder, and make the wheel one of this platform if that worked."""
        root = Path(self.root)
        library = root / LIBRARY
        fresh = library.with_suffix(".new")
        sources = [str(root / FOLDER / name) for name in SOURCES]
        command = [*shlex.split(os.environ.get("CC", "cc")), *FLAGS, *sources, "-o", str(fresh)]
        library.unlink(missing_ok=True)
        if sys.platform == "win32" or sys.byteorder != "little":
            return
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
            fresh.replace(library)  # at once: a program may have the old one open
        except (OSError, subprocess.CalledProcessError) as error:
            said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
            self.app.display_warning(f"mergetool: no compiled kernels, numpy is used instead: {said.strip()[:500]}")
            return
        build_data["artifacts"].append(str(LIBRARY))
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
