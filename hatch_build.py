"""Builds the compiled kernels of mergetool_kernels with the C compiler of this machine, where there is one.

They make the wheel one of this platform: ``py3-none-linux_x86_64``, since ctypes loads them into any Python. Without a compiler
the wheel is ``py3-none-any``, and everything works with numpy and torch, on more of the processor's time. Neither case is an error.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("kernels/mergetool_kernels")
SOURCES = ("sums.c", "blend.c")
# No -march: the kernels choose by themselves what the processor can do. No contraction: the same sums on all of them.
FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=off", "-shared", "-Wno-psabi")
OLDEST_MACOS = "11.0"  # the first of Apple's own processors; torch has no wheels for Intel's any more


def library_name(system: str) -> str:
    """The file that `mergetool_kernels.compiled` loads on a ``sys.platform``."""
    return "for_processor.dll" if system == "win32" else "for_processor.so"


def compiler(system: str) -> list[str]:
    """The command of the C compiler: CC, or what this system calls it. Microsoft's cannot compile these sources."""
    chosen = os.environ.get("CC")
    if chosen:
        return [chosen] if os.path.isfile(chosen) else shlex.split(chosen)
    if system == "win32":
        return [next(filter(shutil.which, ("gcc", "clang")), "gcc")]
    return ["cc"]


def flags(system: str) -> list[str]:
    """What the compiler is told on a ``sys.platform``."""
    if system == "win32":
        return [*FLAGS, "-static-libgcc"]  # nothing beside the library but what Windows has
    if system == "darwin":
        target = [f"-mmacosx-version-min={_oldest_macos()}"]
        return [*FLAGS, "-fPIC", *target, *(part for name in _processors() for part in ("-arch", name))]
    return [*FLAGS, "-fPIC"]


def tag(system: str) -> str:
    """The tag of a wheel with the library in it: any Python 3, no ABI of Python's, this platform."""
    name = sysconfig.get_platform()
    if system == "darwin":
        processors = _processors()
        name = f"macosx-{_oldest_macos()}-{processors[0] if len(processors) == 1 else 'universal2'}"
    return "py3-none-" + re.sub(r"[-.]", "_", name)


def _oldest_macos() -> str:
    return os.environ.get("MACOSX_DEPLOYMENT_TARGET") or OLDEST_MACOS


def _processors() -> list[str]:
    """Those of a Mac that the library is for: ARCHFLAGS, as build tools set it, or its own."""
    return re.findall(r"-arch\s+(\S+)", os.environ.get("ARCHFLAGS", "")) or [platform.machine()]


class CompiledKernels(BuildHookInterface[Any]):
    """The hook that pyproject.toml names; runs for wheels, editable ones included."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile into the package's folder, and make the wheel one of this platform if that worked."""
        if sys.byteorder != "little":
            self._go_without("this processor stores the highest byte first")
            return
        folder, name = Path(self.root) / FOLDER, library_name(sys.platform)
        fresh = folder / f"{name}.new"
        sources = [str(folder / source) for source in SOURCES]
        try:
            (folder / name).unlink(missing_ok=True)
            command = [*compiler(sys.platform), *flags(sys.platform), *sources, "-o", str(fresh)]
            subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
            fresh.replace(folder / name)  # at once: a program may have the old one open
        except (OSError, ValueError, subprocess.CalledProcessError) as error:  # ValueError: a CC with half a quotation
            self._go_without(error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error))
            return
        build_data["artifacts"].append((FOLDER / name).as_posix())
        build_data["pure_python"] = False
        build_data["tag"] = tag(sys.platform)

    def _go_without(self, why: str) -> None:
        self.app.display_warning(f"mergetool: no compiled kernels, numpy is used instead: {why.strip()[:500]}")
