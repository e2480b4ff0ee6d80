"""The wheel: what is in it, for which systems it is, and that it works where it is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from mergetool import __version__
from tests.patience import HANG
from tests.wheel.builds import ROOT, Built, build, copied, listed

LIBRARY = "mergetool_kernels/for_processor.so"
INFO = f"mergetool-{__version__}.dist-info"
WHERE = "import mergetool, mergetool_kernels.compiled as c; print(mergetool.__file__, c.is_available())"
MERGE = ("merge", "lab.alkahest + 0.7*(lab.turbo - lab.base)", "-o", "merged.safetensors")


def python_files() -> set[str]:
    """What belongs into a wheel by git's list of files."""
    program = {name for name in listed("mergetool") if not name.startswith("mergetool/lab/training/")}
    kernels = {Path(name).relative_to("kernels").as_posix() for name in listed("kernels") if name.endswith(".py")}
    return program | kernels


def test_the_wheel_is_for_any_python_3_on_this_platform(wheel: Built) -> None:
    assert wheel.path.name == f"mergetool-{__version__}-py3-none-linux_{os.uname().machine}.whl"
    said = wheel.files[f"{INFO}/WHEEL"].decode().splitlines()
    assert f"Tag: py3-none-linux_{os.uname().machine}" in said
    assert "Root-Is-Purelib: false" in said


def test_the_wheel_holds_the_program_and_nothing_that_made_or_tests_it(wheel: Built) -> None:
    about = {f"{INFO}/{name}" for name in ("METADATA", "WHEEL", "entry_points.txt", "licenses/LICENSE")}
    assert set(wheel.files) == python_files() | about | {LIBRARY}
    assert not any(re.search(r"(^|/)(training|tests|benchmarks|docs)/", name) for name in wheel.files)
    assert wheel.files[f"{INFO}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()


def test_the_library_needs_no_newer_linux_than_manylinux_2_17(wheel: Built) -> None:
    command = [sys.executable, "-m", "auditwheel", "show", str(wheel.path)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f'consistent with the following platform tag: "manylinux_2_17_{os.uname().machine}"' in " ".join(
        shown.split()
    )


def test_the_wheel_of_the_sdist_is_the_wheel_of_the_checkout(wheel: Built, tmp_path: Path) -> None:
    """With one of the six embedded models, since packing all of them takes a quarter of a minute."""
    left_out = re.compile(r"(mergetool/lab/data|training/members)/(?!base/|record)|tests/golden/")
    names = [name for name in listed() if not left_out.match(name)]
    sdist = build(copied(tmp_path / "source", names), "sdist", tmp_path / "dist")
    with tarfile.open(sdist.path) as archive:
        archive.extractall(tmp_path, filter="data")
    again = build(tmp_path / sdist.path.name.removesuffix(".tar.gz"), "wheel", tmp_path / "again")
    assert again.path.name == wheel.path.name
    assert again.files == {name: data for name, data in wheel.files.items() if not left_out.match(name)}


def test_without_a_compiler_the_wheel_is_for_every_platform_and_the_build_says_so(pure: Built) -> None:
    assert pure.path.name == f"mergetool-{__version__}-py3-none-any.whl"
    assert "no compiled kernels, numpy is used instead" in pure.said
    assert "/nowhere/cc" in pure.said
    assert LIBRARY not in pure.files


def test_a_compiler_that_fails_is_quoted_and_the_wheel_is_built(tmp_path: Path) -> None:
    names = [name for name in listed() if not name.startswith("mergetool/lab/data/")]
    built = build(copied(tmp_path / "source", names), "wheel", tmp_path / "dist", CC="cc -fno-such-option")
    assert built.path.name.endswith("-py3-none-any.whl")
    assert "-fno-such-option" in built.said


@pytest.mark.parametrize("kind", ["wheel", "pure"])
def test_an_installed_wheel_merges_to_the_bytes_of_the_checkout(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    built: Built = request.getfixturevalue(kind)
    install = ["pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path / "installed")]
    subprocess.run([sys.executable, "-m", *install, str(built.path)], check=True)
    merged = []
    for folder in (tmp_path / "installed", ROOT):
        place = tmp_path / f"from-{folder.name}"
        place.mkdir()
        where = _run(folder, place, "-c", WHERE)
        assert where == f"{folder / 'mergetool/__init__.py'} {folder == ROOT or kind == 'wheel'}\n"
        assert "1.80 M parameters" in _run(folder, place, "-m", "mergetool", "inspect", "lab.base")
        _run(folder, place, "-m", "mergetool", *MERGE)
        merged.append((place / "merged.safetensors").read_bytes())
    assert merged[0] == merged[1]


def _run(packages: Path, cwd: Path, *arguments: str) -> str:
    paths = os.pathsep.join([str(packages), str(packages / "kernels")])
    env = {**os.environ, "PYTHONPATH": paths, "MERGETOOL_CONFIG_DIR": str(cwd)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=HANG
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
