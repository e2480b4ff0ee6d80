"""Windows' rules for names, open files and paths, by a double (`tests.windows`); nothing here ran on Windows."""

from __future__ import annotations

import errno
import mmap
import nturl2path
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import pytest

from mergetool.checkpoint import paths, system
from mergetool.checkpoint.files import StagedFolder, write_file
from mergetool.checkpoint.inputs import InputFile
from mergetool.checkpoint.journal import Journal
from mergetool.checkpoint.names import why_not_on_windows
from mergetool.checkpoint.outputs import lora_target, model_target
from mergetool.errors import DataError, OutputError
from tests import windows as double

ROOT = Path(__file__).parents[2]
DEVICES = ["CON", "nul.safetensors", "Aux.x.safetensors", "COM1.safetensors", "lpt9.sft", "con .safetensors", "COM¹"]
CHARACTERS = [f"a{character}b.safetensors" for character in '<>:"\\|?*\t\x01']
ENDS = ["folder.", "folder ", "folder. ."]
GOOD = ["z-image v1.5.safetensors", "console.safetensors", "COM10.safetensors", "nullify.safetensors", "ä'§.sft", ".x"]


@pytest.fixture
def windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, once pytest has made the test's folder, which asks who its owner is."""
    double.imitate(monkeypatch)


@pytest.mark.parametrize("name", [*DEVICES, *CHARACTERS, *ENDS])
@pytest.mark.usefixtures("windows")
def test_a_name_that_windows_cannot_have_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    for write in (lambda path: write_file(path, b"x"), lambda path: StagedFolder.create(path, 1)):
        with pytest.raises(OutputError, match=r"cannot be written, because .*; choose another name"):
            write(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", DEVICES[:5])
def test_devices_are_those_that_the_standard_library_knows(name: str) -> None:
    assert PureWindowsPath(name).is_reserved()
    assert why_not_on_windows(name) == "Windows takes it for a device"


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.usefixtures("windows")
def test_a_name_that_only_looks_like_one_is_written(name: str, tmp_path: Path) -> None:
    assert not PureWindowsPath(name).is_reserved()
    write_file(tmp_path / name, b"x")
    assert (tmp_path / name).read_bytes() == b"x"


@pytest.mark.parametrize("target", [model_target, lora_target])
@pytest.mark.parametrize(("name", "why"), [("con.safetensors", "device"), ("style: oil", "the character")])
def test_here_such_a_name_is_a_note(target: Callable[[str], object], name: str, why: str, tmp_path: Path) -> None:
    note = target(str(tmp_path / name)).note  # type: ignore[attr-defined]
    assert f'Windows cannot have "{Path(name).stem}.safetensors", because' in note
    assert why in note
    assert target(str(tmp_path / "concept.safetensors")).note == ""  # type: ignore[attr-defined]


def test_a_folder_with_a_dot_at_its_end_is_a_note_here(tmp_path: Path) -> None:
    assert "which Windows drops" in model_target(f"{tmp_path}/v1./").note


# ---- files that are open


def test_the_double_refuses_what_is_open_or_mapped_and_nothing_else(tmp_path: Path, windows: None) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * 5000)
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with pytest.raises(PermissionError):
            os.replace(path, tmp_path / "b")
    with pytest.raises(PermissionError):
        os.unlink(path)
    mapping.close()
    os.replace(path, tmp_path / "b")
    os.unlink(tmp_path / "b")


@pytest.mark.parametrize("reader", ["window", "read"])
@pytest.mark.usefixtures("windows")
def test_an_input_that_was_closed_can_be_replaced(reader: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"x" * 9000)
    with InputFile.open(path) as file:
        view = getattr(file, reader)(10, 5000)
        assert bytes(view) == b"x" * 5000
        del view
        file.release(10, 5000)
    write_file(path, b"new", overwrite=True)
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EINVAL])
def test_an_output_that_a_program_has_open_stays_and_the_sentence_says_why(
    number: int, tmp_path: Path, windows: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EINVAL is what Python makes of Windows' error for a file that is mapped, 1224."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")

    def refuse(source: object, target: object) -> None:
        error = OSError(number, "in use", str(source))
        error.winerror = 1224 if number == errno.EINVAL else 5
        raise error

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OutputError, match="as where a program has the file open; close what uses it"):
        write_file(path, b"new", overwrite=True)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_scanner_that_has_the_new_file_open_for_a_moment_is_waited_for(
    tmp_path: Path, windows: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, waited, tries = os.replace, [], [double.UsedError(errno.EACCES, "in use")] * 3

    def busy(source: Path, target: Path) -> None:
        if tries:
            raise tries.pop()
        replace(source, target)

    monkeypatch.setattr(os, "replace", busy)
    monkeypatch.setattr(system, "WAITS", (1, 2, 3, 4))
    monkeypatch.setattr(system, "time", SimpleNamespace(sleep=waited.append))
    (tmp_path / "a").write_bytes(b"old")
    write_file(tmp_path / "a", b"new", overwrite=True)
    assert (tmp_path / "a").read_bytes() == b"new"
    assert waited == [1, 2, 3]


def test_only_windows_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def refuse(source: Path, target: Path) -> None:
        tries.append(source)
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(os, "replace", refuse)
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(OutputError, match="permission was denied; check the folder"):
        write_file(tmp_path / "a", b"new", overwrite=True)
    assert len(tries) == 1


@pytest.mark.usefixtures("windows")
def test_a_journal_goes_with_its_run(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "stage", {"inputs": "digest"})
    assert journal.path.exists()
    journal.remove()
    assert list(tmp_path.iterdir()) == []


def test_the_times_of_an_open_file_may_differ_from_those_of_its_name(
    tmp_path: Path, windows: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On FAT, Python 3.12 told another creation time by the descriptor than by the name."""
    path, fstat = tmp_path / "a", os.fstat
    path.write_bytes(b"x")
    monkeypatch.setattr(os, "fstat", lambda fd: os.stat_result([*fstat(fd)[:9], -11644473600]))
    with InputFile.open(path) as file:
        file.check_unchanged()
        path.write_bytes(b"longer")
        with pytest.raises(DataError, match="changed while it was read"):
            file.check_unchanged()


# ---- paths


def test_a_path_that_is_too_long_is_called_so(tmp_path: Path, windows: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows says that there is no such file."""
    folder, opened = tmp_path / ("f" * 120), os.open
    folder.mkdir()

    def limited(path: Path, *arguments: int) -> int:
        if len(str(path)) > system.LONGEST_WINDOWS_PATH:
            raise FileNotFoundError(errno.ENOENT, "The system cannot find the path specified", str(path))
        return opened(path, *arguments)

    monkeypatch.setattr(os, "open", limited)
    room = system.LONGEST_WINDOWS_PATH - len(str(folder)) - 1
    with pytest.raises(OutputError, match=r"the path is too long: Windows takes 259 .* \(LongPathsEnabled\)"):
        write_file(folder / ("n" * (room - 10)), b"x")
    write_file(folder / ("n" * (room - 40)), b"x")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ('"C:\\My models\\a.safetensors"', "C:\\My models\\a.safetensors"),
        ("file:///C:/My%20models/a.safetensors", "C:\\My models\\a.safetensors"),
        ("file://nas/models/a.safetensors", "\\\\nas\\models\\a.safetensors"),
        ("\\\\nas\\models\\a.safetensors", "\\\\nas\\models\\a.safetensors"),
        ("C:\\new\\table\\", "C:\\new\\table\\"),
    ],
)
def test_paths_as_windows_copies_them(typed: str, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "url2pathname", nturl2path.url2pathname)
    assert paths.typed(typed) == meant


def test_every_text_is_read_and_written_with_its_encoding() -> None:
    """Without one it is UTF-8 here and a code page on Windows."""
    places = ["mergetool", "kernels", "hatch_build.py"]
    command = [sys.executable, "-m", "ruff", "check", "--preview", "--select", "PLW1514", *places]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
