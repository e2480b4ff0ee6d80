"""The main job on real files, in a few seconds: make a small Z-Image family, merge it, take a difference LoRA.

    python -m benchmarks.quickstart [FOLDER]

Every command is printed before it is run, so that it can be typed again.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

MODELS = ("alkahest", "turbo", "deturbo")


COMMANDS = (
    *(f"mergetool models add --here {name} {name}.safetensors" for name in MODELS),
    "mergetool inspect alkahest",
    "mergetool merge 'alkahest + 20 * (turbo - deturbo)' --protect refiner -o merged.safetensors",
    "mergetool diff --base alkahest --variant turbo --rank-thresh 0.995 --exclude refiner",
)


def main(folder: Path) -> None:
    """Make the family in ``folder`` and run the commands there; what an earlier run left is replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    generate = [sys.executable, "-m", "benchmarks.generate", "family", str(folder), "--size", "small"]
    print(f"$ python {shlex.join(generate[1:])}", flush=True)
    subprocess.run(generate, check=True, cwd=Path(__file__).parents[1])
    program = Path(sys.executable).with_name("mergetool")
    for command in COMMANDS:
        print(f"\n$ {command}", flush=True)
        subprocess.run([str(program), *shlex.split(command)[1:]], check=True, cwd=folder)
    print(f"\nThe files are in {folder}.")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "quickstart").resolve())
