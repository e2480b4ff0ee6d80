"""Fresh environments of other Pythons: what works in them, how long it takes and how large it is.

    python -m tests.environments --python python3.12 --python python3.13 [--whole]

Each Python gets two environments in a folder with spaces and umlauts, one built with a C compiler and one without any on its PATH. They hold the
packages that ordinary merges need and no torch, or with ``--whole`` the plain install, which downloads gigabytes. Commands are run in each, and the
table says how they ended; the merged bytes must be the same everywhere. Exit code 1 when they are not, or a command fails that should not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergetool.packages import PACKAGES
from tests.wheel.builds import copied, listed

ROOT = Path(__file__).parents[2]
HEAVY = ("diffusers", "matplotlib", "safetensors", "scipy", "torch", "torchsde", "transformers")
"""Packages of the plain install that ordinary merges do without."""

MERGE = "lab.alkahest + 0.7*(lab.turbo - lab.base)"
COMMANDS: Mapping[str, tuple[int, Sequence[str]]] = {
    "version": (0, ["version"]),
    "doctor": (0, ["doctor", "--json"]),
    "inspect": (0, ["inspect", "lab.base"]),
    "merge": (0, ["merge", MERGE, "-o", "merged.safetensors", "--force"]),
    "fp8": (0, ["convert", "merged.safetensors", "--quant", "fp8-scaled", "-o", "fp8.safetensors"]),
    "int8": (0, ["convert", "merged.safetensors", "--quant", "int8", "-o", "int8.safetensors"]),
    "fp16": (0, ["convert", "fp8.safetensors", "--dtype", "fp16", "-o", "fp16.safetensors"]),
    "compare": (0, ["compare", "lab.base", "int8.safetensors"]),
    "methods": (0, ["methods"]),
    "ties": (69, ["merge", "ties(lab.turbo, lab.alkahest, base=lab.base)", "-o", "ties.safetensors", "--force"]),
}
"""Exit code without torch, and words, of each command."""


@dataclass(frozen=True)
class Result:
    """What became of one environment."""

    name: str
    seconds: float
    megabytes: float
    kernels: bool
    codes: Mapping[str, int]
    digest: str
    wrong: Sequence[str]


def build(python: str, *, compiler: bool, whole: bool, folder: Path) -> Result:
    """Make an environment, run the commands in it, and measure."""
    version = _run([python, "-c", "import platform; print(platform.python_version())"]).strip()
    name = f"Python {version}, {'compiler' if compiler else 'no compiler'}"
    place = folder / f"Größe und Raum, {name}"
    started = time.monotonic()
    _run([python, "-m", "venv", str(place)])
    inside = place / "bin" / "python"
    path = os.environ["PATH"] if compiler else str(place / "bin")
    env = {**os.environ, "PATH": path, "MERGETOOL_CONFIG_DIR": str(place / "config"), "HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONPATH", None)
    pip = [str(inside), "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt")]
    if not whole:
        light = [package.name for package in PACKAGES if not package.extra and package.name not in HEAVY]
        _run([*pip, *light], env)
    source = copied(folder / f"source of {name}", listed())  # a build writes its library into the source
    _run([*pip, *([] if whole else ["--no-deps"]), str(source)], env)
    seconds = time.monotonic() - started
    site = next((place / "lib").glob("python*/site-packages"))
    size = sum(file.stat().st_size for file in site.rglob("*") if file.is_file()) / 1e6
    work = place / "Bilder für später"
    work.mkdir()
    codes, wrong, kernels = {}, [], False
    for command, (wanted, words) in COMMANDS.items():
        done = subprocess.run(
            [str(place / "bin" / "mergetool"), *words], cwd=work, env=env, capture_output=True, text=True, check=False
        )
        codes[command] = done.returncode
        if done.returncode != (0 if whole else wanted) or "Traceback" in done.stderr:
            wrong.append(f"{command}: {done.returncode}, {done.stderr.strip()[-300:]}")
        if command == "doctor" and done.returncode == 0:
            kernels = any(
                line["topic"] == "kernels" and line["verdict"] == "ok" for line in json.loads(done.stdout)["checks"]
            )
    if kernels != compiler:
        wrong.append(f"kernels are {'' if kernels else 'not '}there")
    made = [work / f"{name}.safetensors" for name in ("merged", "fp8", "int8", "fp16")]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in made if file.exists())).hexdigest()[:16]
    shutil.rmtree(place)
    shutil.rmtree(source)
    return Result(name, seconds, size, kernels, codes, digest, wrong)


def _run(words: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    """Run a command that has to work; returns what it printed."""
    done = subprocess.run(words, env=env, cwd=ROOT.parent, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)} ended with {done.returncode}: {done.stderr.strip()[-1000:]}")
    return done.stdout


def main() -> int:
    """Build all that is asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--python", action="append", default=[], help="a Python, as python3.12; repeatable")
    parser.add_argument("--whole", action="store_true", help="the plain install, torch with it")
    asked = parser.parse_args()
    results = []
    print(
        "| environment | seconds | MB | kernels | exit codes | SHA-256 of what was made |\n|---|---:|---:|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        for python in asked.python or [sys.executable]:
            for compiler in (True, False):
                result = build(python, compiler=compiler, whole=asked.whole, folder=Path(folder))
                codes = ", ".join(f"{command} {code}" for command, code in result.codes.items())
                print(f"| {result.name} | {result.seconds:.0f} | {result.megabytes:.0f} | {'yes' if result.kernels else 'no'} | {codes} | {result.digest} |", flush=True)  # fmt: skip
                results.append(result)
    for result in results:
        for wrong in result.wrong:
            print(f"{result.name}: {wrong}", file=sys.stderr)
    same = len({result.digest for result in results}) == 1
    if not same:
        print("the environments made different bytes", file=sys.stderr)
    return 0 if same and not any(result.wrong for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
