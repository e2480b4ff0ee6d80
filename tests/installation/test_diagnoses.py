"""Each module of the installation says what it finds: in folders made for it, and of what it is told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from mergetool import models, packages
from mergetool.installation import comfyui_folders, disks, gpus, interpreter, libraries, probes, processor
from mergetool_kernels import compiled


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes a module with some code, which can be imported."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name: str, code: str) -> str:
        (tmp_path / f"{name}.py").write_text(code)
        return name

    return make


def test_modules_are_imported_in_order_and_errors_are_told(module: Any) -> None:
    names = [module("first_trial", "print('noise')"), module("second_trial", "raise OSError('libx.so: none')\n")]
    found = probes.imported(names)
    assert found == {
        "first_trial": {"module": "first_trial", "error": ""},
        "second_trial": {"module": "second_trial", "error": "OSError: libx.so: none"},
    }


def test_a_module_that_ends_the_process_is_named_and_those_after_it_are_unknown(module: Any) -> None:
    names = [module("good_trial", ""), module("deadly_trial", "import os; os._exit(7)"), module("late_trial", "")]
    found = probes.imported(names)
    assert found["good_trial"]["error"] == ""
    assert found["deadly_trial"]["error"] == "it ended the process with code 7"
    assert "late_trial" not in found


def test_a_module_that_hangs_is_named(module: Any) -> None:
    names = [module("endless_trial", "import threading; threading.Event().wait()")]
    assert probes.imported(names, limit=0.5)["endless_trial"]["error"] == "it was not done after 0 seconds"


@pytest.mark.parametrize(
    ("name", "version", "there", "error", "verdict", "said", "remedy"),
    [
        ("torch", None, False, "", "note", "not installed", packages.install),
        ("numpy", None, False, "", "problem", "not installed", packages.install),
        ("gguf", None, False, "", "note", "optional", packages.install),
        ("torch", "9.9", False, "", "problem", "its files are gone", packages.reinstall),
        ("torch", "9.9", True, "OSError: no", "problem", "cannot be imported (OSError: no)", packages.reinstall),
        ("torch", "2.1", True, "", "problem", "too old", packages.install),
        ("torch", "9.9", True, "", "ok", "9.9", None),
    ],
)
def test_a_package_is_missing_gone_broken_too_old_or_well(
    name: str, version: str | None, there: bool, error: str, verdict: str, said: str, remedy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    package = packages.named(name)
    monkeypatch.setattr(packages, "installed", lambda _: version)
    monkeypatch.setattr(libraries, "_is_there", lambda _: there)
    found = next(d for d in libraries.diagnose({name: {"error": error}}) if d.topic == name)
    assert found.verdict == verdict
    assert said in found.text
    assert found.remedy == (remedy(package) if remedy else "")


CPU_TORCH = {"module": "torch", "error": "", "gpus": {"cuda": None, "hip": None, "devices": [], "why": ""}}
DEVICE = {"name": "NVIDIA RTX", "free": 20e9, "total": 24e9, "capability": [8, 9]}


def test_a_gpu_is_told_with_its_memory_and_a_missing_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "installed", lambda _: None)
    torch = {"error": "", "gpus": {"cuda": "12.8", "hip": None, "devices": [DEVICE], "why": ""}}
    one, triton = gpus.diagnose(torch)
    assert (one.verdict, one.text) == ("ok", "cuda:0 NVIDIA RTX, 20.0 of 24.0 GB free")
    assert (triton.verdict, triton.remedy) == ("note", packages.install(packages.named("triton")))


@pytest.mark.parametrize(
    ("torch", "driver", "verdict", "said"),
    [
        (CPU_TORCH, False, "note", "none: this torch is built for CPUs"),
        (CPU_TORCH, True, "note", "has an NVIDIA driver"),
        ({"error": "", "gpus": {"cuda": "12.8", "hip": None, "devices": [], "why": "E: no driver"}}, False, "note", "none (E: no driver)"),
        ({"error": "", "gpus": {"cuda": "12.8", "hip": None, "devices": [], "why": "E: old"}}, True, "problem", "cannot use the GPU (E: old)"),
        ({"error": "OSError: no"}, False, "note", "torch cannot be imported"),
        ({}, False, "note", "torch cannot be imported"),
    ],
)  # fmt: skip
def test_no_gpu_has_its_reason(
    torch: Any, driver: bool, verdict: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "has_driver", lambda: driver)
    (found,) = gpus.diagnose(torch)
    assert found.verdict == verdict
    assert said in found.text


def comfyui(folder: Path) -> Path:
    for name in ("comfy", "models/loras", "models/diffusion_models"):
        (folder / name).mkdir(parents=True)
    (folder / "main.py").touch()
    return folder


def test_comfyui_is_found_by_its_variable_with_its_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = comfyui(tmp_path / "Größere Bilder" / "ComfyUI")
    (folder / "extra_model_paths.yaml").touch()
    monkeypatch.setenv("COMFYUI_PATH", str(folder))
    found = next(d for d in comfyui_folders.diagnose() if d.facts.get("folder") == str(folder.resolve()))
    assert found.verdict == "ok"
    assert found.facts["models"] == {
        "diffusion_models": str(folder.resolve() / "models" / "diffusion_models"),
        "loras": str(folder.resolve() / "models" / "loras"),
    }
    assert str(folder / "extra_model_paths.yaml") in found.text


def test_comfyui_is_found_around_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = comfyui(tmp_path / "ComfyUI")
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.chdir(folder / "models" / "loras")
    assert str(folder.resolve()) in [d.facts.get("folder") for d in comfyui_folders.diagnose()]


def test_a_variable_that_leads_to_no_comfyui_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    first, *_ = comfyui_folders.diagnose()
    assert (first.verdict, str(tmp_path) in first.text) == ("note", True)


def test_kernels_say_their_compiler_and_instructions() -> None:
    found = processor.kernels()
    assert found.verdict == "ok"
    assert found.facts["compiler"].startswith(("GCC ", "Clang "))
    assert found.facts["instructions"]


def test_missing_kernels_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "LIBRARY", tmp_path / "for_processor.so")
    monkeypatch.setattr(compiled, "_library", lambda: None)
    assert "there was no C compiler" in processor.kernels().text
    (tmp_path / "for_processor.so").write_bytes(b"no library")
    found = processor.kernels()
    assert found.verdict == "note"
    assert "cannot be loaded" in found.text


def test_limits_of_a_container_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("1500000000\n")
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    monkeypatch.setattr(processor, "_CGROUP", tmp_path)
    memory, cores = processor.memory(), processor.cores()
    assert (memory.verdict, memory.facts["limit"]) == ("note", 1_500_000_000)
    assert (cores.verdict, cores.facts["quota"]) == ("note", 0.5)
    assert cores.remedy == "use `threads=1`"


def test_no_limits_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    monkeypatch.setattr(processor, "_CGROUP", tmp_path)
    assert (processor.memory().facts["limit"], processor.cores().facts["quota"]) == (None, None)


def test_a_home_that_cannot_be_written_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGETOOL_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    found = disks.names_file()
    assert (found.verdict, found.remedy) == ("note", "set MERGETOOL_CONFIG_DIR to a folder of yours")
    assert [line.verdict for line in disks.diagnose()] == ["note"] * 3
    assert not (tmp_path / "config").exists()


def test_a_file_of_names_that_cannot_be_read_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGETOOL_CONFIG_DIR", str(tmp_path))
    models.names_file().write_text("[models\n")
    found = disks.names_file()
    assert found.verdict == "problem"
    assert str(tmp_path / "models.toml") in found.text


def test_files_of_two_versions_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "installed", lambda _: "0.0.1")
    assert interpreter.mergetool().verdict == "problem"
