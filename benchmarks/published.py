"""Every published size, planned without its weights: sizes of files, what stays in BF16, and memory.

    python -m benchmarks.published [--renew]

The files have the real names and shapes and no data: the disk holds their headers. Of each model a merge of three files in two layouts, the same with scaled
FP8, and a `diff` are planned as ``--dry-run`` plans them, for two threads. Prints the table of docs/reference/sizes.md, or with --renew writes it there.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path

from mergetool.checkpoint.dtypes import BF16
from mergetool.checkpoint.header import Header
from mergetool.difference import memory as of_diff
from mergetool.difference.extract import open_diff
from mergetool.engine import job
from mergetool.engine.device import CPU
from mergetool.engine.memory import memory_needed
from mergetool.options.differences import DiffOptions
from mergetool.options.merging import MergeOptions
from mergetool.recipe.plan import Plan
from tests.oracles.families import CASES

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "sizes.md"
COLUMNS = (
    "model", "parameters", "BF16", "scaled FP8", "of it in BF16", "largest tensor in BF16", "memory: merge", "FP8", "diff",
)  # fmt: skip
THREADS = 2
PUBLISHED = [(name, size) for name, case in CASES.items() for size in case.published]
FILES: Mapping[str, tuple[str, str]] = {
    "a": ("comfyui", "model.diffusion_model."),
    "b": ("diffusers", ""),
    "c": ("comfyui", ""),
}
"""The layout and prefix of each file."""


def headers(folder: Path, name: str, size: str) -> Mapping[str, Path]:
    """Write three models of a published size without their weights; the paths by `FILES`."""
    case, paths = CASES[name], {}
    for file, (layout, prefix) in FILES.items():
        shapes = case.shapes(layout, case.published[size])
        header = Header.plan((prefix + tensor, BF16, shape) for tensor, shape in shapes.items())
        paths[file] = folder / f"{file}.safetensors"
        with paths[file].open("wb") as out:
            out.write(header.encode())
            out.truncate(len(header.encode()) + header.data_size)
    return paths


def wide(plan: Plan) -> dict[str, int]:
    """The bytes of each tensor that is not quantised, the largest first."""
    sizes = {
        tensor.name: plan.header.tensors[tensor.name].nbytes for tensor in plan.tensors if tensor.quantiser is None
    }
    return dict(sorted(sizes.items(), key=lambda one: -one[1]))


def row(folder: Path, name: str, size: str) -> tuple[str, ...]:
    """The cells of a model, one for each of `COLUMNS`."""
    paths = headers(folder, name, size)
    expression = "'{a}' + ('{b}' - '{c}')".format(**paths)
    cells, needed = [], []
    for options in (MergeOptions(), MergeOptions(quant="fp8-scaled")):
        with job.open_merge(expression, options, fingerprints=False) as plan:
            cells.append(f"{plan.header.data_size / 1e9:.2f} GB")
            needed.append(job.BASE_MEMORY + memory_needed(plan, THREADS))
            left = {tensor.removeprefix("model.diffusion_model."): nbytes for tensor, nbytes in wide(plan).items()}
    with open_diff(str(paths["c"]), str(paths["b"]), DiffOptions()) as pairing:
        needed.append(of_diff.of_difference(pairing, DiffOptions(), THREADS, CPU))
    parameters = sum(map(prod, CASES[name].shapes("comfyui", CASES[name].published[size]).values()))
    largest = next(iter(left))
    return (
        f"{name} ({size})", f"{parameters / 1e9:.2f} billion", *cells, f"{sum(left.values()) / 1e9:.2f} GB",
        f"`{largest}`, {left[largest] / 1e6:.0f} MB", *(f"{memory / 1e6:.0f} MB" for memory in needed),
    )  # fmt: skip


def rows() -> Iterator[tuple[str, ...]]:
    """The cells of every published size."""
    for name, size in PUBLISHED:
        with tempfile.TemporaryDirectory() as folder:
            yield row(Path(folder), name, size)


def line(cells: Sequence[str]) -> str:
    """A row of the table as the page has it."""
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, or write it into its page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renew", action="store_true", help="write it into docs/reference/sizes.md")
    renew = parser.parse_args(arguments).renew
    table = "\n".join([line(COLUMNS), "|---|" + "---:|" * 4 + "---|" + "---:|" * 3, *map(line, rows())])
    if renew:
        text = PAGE.read_text("utf-8")
        PAGE.write_text(f"{text[: text.index('| model')]}{table}\n", "utf-8")
    else:
        print(table)


if __name__ == "__main__":
    main()
