"""The recipes of benchmarks/recipes, made on the embedded models and looked at: the table and the sheet of docs/reference/recipes.md.

    python -m benchmarks.bench_recipes [--pictures 100]

Every recipe runs as a user runs it, `mergetool merge RECIPE.yaml -o FOLDER`, then a second time, which must find everything up to date.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.bench_lab import Lab, Row, few_steps, many_steps, percent, share, write_sheet, write_table
from benchmarks.provenance import commit
from mergetool.sampler.parts import WeightedLora
from mergetool.sampler.request import Pictures, Stage

RECIPES = Path(__file__).parent / "recipes"

IN_SHEET = {
    "alkahest": "alkahest",
    "refiner-preserving, m = 2": "hollow, m = 2",
    "bridge, from_base": "from base",
    "bridge, both": "both",
    "hand-merge, average": "average",
    "hand-merge, later": "with base late",
    "deturbo, 4 steps": "deturbo, 4",
    "re-turbo, returned, 4 steps": "re-turbo, 4",
}
"""What the sheet shows, by its row in the table, with its label there."""


def made(recipe: str, folder: Path) -> Path:
    """The folder with a recipe's outputs."""
    program = [
        str(Path(sys.executable).with_name("mergetool")),
        "merge",
        str(RECIPES / f"{recipe}.yaml"),
        "-o",
        str(folder),
    ]
    first = subprocess.run([*program, "--no-progress"], check=True, capture_output=True, text=True)
    again = subprocess.run([*program, "--no-progress"], check=True, capture_output=True, text=True)
    print(first.stdout.splitlines()[0], "then", again.stdout.splitlines()[0], flush=True)
    if ", 0 to make" not in again.stdout.splitlines()[0]:
        raise SystemExit(f"{recipe} makes something again:\n{again.stdout}")
    return folder


def looks(folder: Path) -> list[tuple[str, Stage]]:
    """What is looked at: the models that were begun from, and every output, each as its family is sampled."""

    def out(name: str) -> str:
        return str(folder / f"{name}.safetensors")

    lora = WeightedLora(folder / "re-turbo.lora.safetensors", 1.0)
    return [
        ("alkahest", many_steps("lab.alkahest", 3.0)),
        *((f"refiner-preserving, m = {m}", many_steps(out(f"refiner-preserving-{m}"), 3.0)) for m in ("1", "2", "2.5")),
        *((f"bridge, {name}", many_steps(out(name), 3.0)) for name in ("from_base", "from_turbo", "both")),
        ("hollow", many_steps("lab.hollow", 3.0)),
        ("hand-merge, average", many_steps(out("average"), 3.0)),
        ("hand-merge, later", many_steps(out("later"), 3.0)),
        ("turbo, 4 steps", few_steps("lab.turbo")),
        ("deturbo, 4 steps", few_steps("lab.deturbo")),
        ("re-turbo, returned, 4 steps", few_steps(out("returned"))),
        ("deturbo with the LoRA loaded, 4 steps", few_steps("lab.deturbo", loras=(lora,))),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=100)
    options = parser.parse_args(arguments)
    commit()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for recipe in sorted(path.stem for path in RECIPES.glob("*.yaml")):
            made(recipe, folder)
        lab = Lab(options.pictures, folder)
        rows: list[Row] = []
        shown: dict[str, Pictures] = {}
        for label, stage in looks(folder):
            shown[label] = lab.pictures(stage)
            readings = lab.read(shown[label])
            counts = (
                lab.adherence(shown[label]),
                share(r.striped for r in readings),
                share(r.hollow for r in readings),
            )
            rows.append([label, *map(percent, counts)])
            print(rows[-1], flush=True)
        write_table(
            "recipes", ["pictures of", "adherence", "striped", "hollow"], rows, lab, page="reference/recipes.md"
        )
        write_sheet("recipes", lab, [shown[label] for label in IN_SHEET], list(IN_SHEET.values()))


if __name__ == "__main__":
    main()
