"""``mergetool doctor``: each package, missing or broken, and what a program can read of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mergetool import packages
from mergetool.packages import PACKAGES
from tests import absent
from tests.patience import HANG


def doctor(folder: Path, **without: list[str]) -> tuple[int | str, dict[str, Any], list[dict[str, Any]]]:
    """Exit code, the line of each topic but the last of its name, and all lines."""
    (ended,), modules = absent.commands([["doctor", "--json"]], folder, absent.environment(folder, **without))  # type: ignore[arg-type]
    assert "torch" not in modules
    told = json.loads(ended.out)
    assert told["ok"] == (ended.code == 0)
    return ended.code, {line["topic"]: line for line in told["checks"]}, told["checks"]


def test_every_package_and_place_has_a_line_and_all_is_well(tmp_path: Path) -> None:
    code, topics, _ = doctor(tmp_path)
    assert code == 0
    # no torchvision of the registry fits a CPU's torch, so spandrel is not among the packages of development
    assert [p.name for p in PACKAGES if topics[p.name]["verdict"] != "ok"] == ["spandrel"]
    assert topics["spandrel"]["verdict"] == "note"
    others = {"python", "system", "mergetool", "kernels", "gpu", "cores", "memory", "outputs", "downloads", "temporary", "names", "comfyui"}  # fmt: skip
    assert set(topics) == others | {package.name for package in PACKAGES}
    assert topics["outputs"]["folder"] == str(tmp_path)
    assert topics["names"]["file"] == str(tmp_path / "config" / "models.toml")


def test_a_torch_whose_files_are_gone_is_a_problem_with_its_command(tmp_path: Path) -> None:
    code, topics, _ = doctor(tmp_path, absent=["torch"])
    assert (code, topics["torch"]["verdict"]) == (1, "problem")
    assert "its files are gone" in topics["torch"]["text"]
    assert topics["torch"]["remedy"] == packages.reinstall(packages.named("torch"))
    assert topics["gpu"]["verdict"] == "note"


def test_a_broken_torch_is_a_problem_with_its_reason(tmp_path: Path) -> None:
    code, topics, lines = doctor(tmp_path, broken=["torch"])
    assert code == 1
    assert [line["topic"] for line in lines if line["verdict"] == "problem"] == ["torch"]
    assert "(OSError: libbroken.so: cannot open shared object file" in topics["torch"]["text"]
    assert topics["torch"]["remedy"] == packages.reinstall(packages.named("torch"))


def test_a_broken_numpy_is_a_problem_and_all_else_is_told(tmp_path: Path) -> None:
    env = absent.environment(tmp_path, broken=["numpy"], error="ImportError")
    done = subprocess.run(
        [sys.executable, "-m", "mergetool", "doctor"], env=env, cwd=tmp_path, capture_output=True, text=True,
        check=False, timeout=HANG,
    )  # fmt: skip
    assert done.returncode == 1
    assert "problem numpy " in done.stdout
    assert "problem kernels " in done.stdout
    assert "ok      outputs " in done.stdout
    assert done.stderr.startswith("mergetool: ")
    assert done.stderr.count("\n") == 1


def test_it_works_in_a_folder_that_is_gone(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    code = (
        "import os, sys; os.rmdir(os.getcwd()); sys.argv = ['mergetool', 'doctor']\n"
        "from mergetool.__main__ import main; main()"
    )
    env = {**os.environ, "MERGETOOL_CONFIG_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=gone, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "note    outputs          the working folder is gone" in done.stdout


def test_without_the_command_lines_own_package_a_sentence_says_so(tmp_path: Path) -> None:
    env = absent.environment(tmp_path, absent=["typer"])
    done = subprocess.run(
        [sys.executable, "-m", "mergetool", "doctor"], env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (69, "")
    typer = packages.install(packages.named("typer"))
    assert (
        done.stderr == f"mergetool: the package typer is not installed, which all commands need; install it: {typer}\n"
    )


@pytest.mark.parametrize("words", [["--version"], ["version", "--json"]])
def test_the_version_is_told_without_numpy_and_torch(words: list[str], tmp_path: Path) -> None:
    env = absent.environment(tmp_path, absent=["numpy", "torch"])
    done = subprocess.run(
        [sys.executable, "-m", "mergetool", *words], env=env, capture_output=True, text=True, check=True
    )
    assert "kernels" in done.stdout
    assert "not loaded, since numpy cannot be" in done.stdout
