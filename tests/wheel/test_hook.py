"""What the build does on systems that are not here: the compiler's command and the wheel's tag, by doubles."""

from __future__ import annotations

import importlib.util
import platform
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hatchling.bridge.app import Application

from tests.wheel.builds import ROOT


class App(Application):
    """Where a build's warnings are shown."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def display_warning(self, message: str = "", **_: Any) -> None:
        self.said.append(message)


@pytest.fixture
def hook() -> ModuleType:
    """The module of the hook, as hatchling loads it: from its file."""
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that writes its arguments into a file beside it, and its output."""
    path = tmp_path / "a compiler" / "cc"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\necho "$@" > "{path}.told"\nfor last in "$@"; do :; done\necho library > "$last"\n')
    path.chmod(0o755)
    monkeypatch.setenv("CC", str(path))
    return path


def built(hook: ModuleType, root: Path) -> tuple[dict[str, Any], list[str]]:
    """What a build is told of its wheel, and the user."""
    (root / "kernels/mergetool_kernels").mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = {"artifacts": [], "pure_python": True, "infer_tag": False}
    app = App()
    hook.CompiledKernels(str(root), {}, None, None, str(root), "wheel", app).initialize("standard", data)
    return data, app.said


def on_a_mac(monkeypatch: pytest.MonkeyPatch, processor: str) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: processor)
    # What a universal Python from python.org says, whatever its Mac.
    monkeypatch.setattr(sysconfig, "get_platform", lambda: "macosx-10.9-universal2")
    for name in ("ARCHFLAGS", "MACOSX_DEPLOYMENT_TARGET"):
        monkeypatch.delenv(name, raising=False)


def test_a_mac_gets_a_library_and_a_tag_of_its_own_processor(
    hook: ModuleType, compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_mac(monkeypatch, "arm64")
    data, _ = built(hook, tmp_path)
    assert data["tag"] == "py3-none-macosx_11_0_arm64"
    told = Path(f"{compiler}.told").read_text()
    assert "-arch arm64" in told
    assert "-mmacosx-version-min=11.0" in told


def test_a_mac_builds_for_the_processors_and_the_version_that_build_tools_ask_for(
    hook: ModuleType, compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_mac(monkeypatch, "arm64")
    monkeypatch.setenv("ARCHFLAGS", "-arch x86_64 -arch arm64")
    monkeypatch.setenv("MACOSX_DEPLOYMENT_TARGET", "12.3")
    data, _ = built(hook, tmp_path)
    assert data["tag"] == "py3-none-macosx_12_3_universal2"
    assert "-arch x86_64 -arch arm64" in Path(f"{compiler}.told").read_text()


def test_windows_gets_a_dll_that_needs_no_library_of_the_compiler(
    hook: ModuleType, compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(sysconfig, "get_platform", lambda: "win-amd64")
    data, _ = built(hook, tmp_path)
    assert data["tag"] == "py3-none-win_amd64"
    assert data["artifacts"] == ["kernels/mergetool_kernels/for_processor.dll"]
    assert (tmp_path / data["artifacts"][0]).read_text() == "library\n"
    told = Path(f"{compiler}.told").read_text()
    assert "-static-libgcc" in told
    assert "-fPIC" not in told  # clang refuses it for Windows


@pytest.mark.parametrize("here", [("gcc", "clang"), ("clang",)])
def test_windows_looks_for_the_compilers_that_can(
    hook: ModuleType, here: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(hook.shutil, "which", lambda name: name if name in here else None)
    assert hook.compiler("win32") == [here[0]]


def test_a_library_that_a_running_program_holds_is_no_failure_of_the_build(
    hook: ModuleType, compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Windows holds a DLL that is loaded."""

    def held(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "The process cannot access the file", str(path))

    monkeypatch.setattr(Path, "unlink", held)
    data, said = built(hook, tmp_path)
    assert "tag" not in data
    assert data["pure_python"]
    assert len(said) == 1
    assert "numpy is used instead" in said[0]
    assert "The process cannot access the file" in said[0]


def test_half_a_quotation_in_cc_is_said(hook: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "gcc '-O")
    data, said = built(hook, tmp_path)
    assert "tag" not in data
    assert "No closing quotation" in said[0]


def test_a_processor_of_the_other_byte_order_goes_without(
    hook: ModuleType, compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "byteorder", "big")
    data, said = built(hook, tmp_path)
    assert "tag" not in data
    assert "byte" in said[0]
    assert not Path(f"{compiler}.told").exists()
