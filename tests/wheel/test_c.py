"""The C sources compile without a warning, here and for Windows, and give the functions that Python calls."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

from mergetool_kernels import compiled
from tests.wheel.builds import ROOT

MINGW = "x86_64-w64-mingw32-gcc"
KERNELS = ROOT / "kernels/mergetool_kernels"
SOURCES = [str(KERNELS / name) for name in ("sums.c", "blend.c")]
STRICT = ("-Wall", "-Wextra", "-Werror")
PROCESSORS = ("x86-64", "x86-64-v3", "x86-64-v4")
WINDOWS_OWN = {"KERNEL32.dll", "msvcrt.dll"}


def flags(system: str) -> list[str]:
    """What the build tells the compiler on a ``sys.platform``."""
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    told: list[str] = module.flags(system)
    return told


def called() -> set[str]:
    """The functions of the library that Python calls, by its text."""
    text = Path(compiled.__file__).read_text()
    return {
        name
        for way in (r"library\.", r"_built\(\)\.", r"_text\(\"")
        for name in re.findall(rf"{way}(mergetool_\w+)", text)
    }


def library(to: Path, compiler: str, system: str, *more: str) -> Path:
    """The sources as a library, with every warning an error."""
    command = [compiler, *flags(system), *STRICT, *more, *SOURCES, "-o", str(to / "library.dll")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return to / "library.dll"


def test_python_calls_three_functions_and_asks_for_two_texts() -> None:
    texts = {"mergetool_compiler", "mergetool_instructions"}
    assert called() == {"mergetool_sums", "mergetool_blend", "mergetool_moves"} | texts


def test_the_sources_compile_here_without_a_warning(tmp_path: Path) -> None:
    shown = subprocess.run(["nm", "-D", "--defined-only", library(tmp_path, "cc", "linux")], capture_output=True, text=True, check=True).stdout  # fmt: skip
    assert {name for name in shown.split() if name.startswith("mergetool_")} >= called()


@pytest.mark.parametrize("processor", PROCESSORS)
def test_the_sources_compile_for_windows_without_a_warning(processor: str, tmp_path: Path) -> None:
    """Debian's mingw-w64; the baseline is what is shipped, since Windows has no choice at load time."""
    made = library(tmp_path, MINGW, "win32", f"-march={processor}")
    exported, needed = look_into(made)
    assert exported == called()
    assert needed <= WINDOWS_OWN


def look_into(dll: Path) -> tuple[set[str], set[str]]:
    """The functions that a DLL gives and the DLLs that it needs, as the binutils read them."""
    command = [MINGW.replace("gcc", "objdump"), "-p", str(dll)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "pei-x86-64" in shown
    table = shown.split("[Ordinal/Name Pointer] Table")[1].split("\n\n")[0]
    return set(re.findall(r"\[ *\d+\].* (\w+)$", table, re.MULTILINE)), set(re.findall(r"DLL Name: (\S+)", shown))
