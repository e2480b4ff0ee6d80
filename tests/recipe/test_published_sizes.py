"""Merges planned at published sizes, of files of which the disk holds the headers alone: what is quantised, sizes, memory."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest

from benchmarks.published import COLUMNS, PAGE, PUBLISHED, THREADS, headers, line, row
from mergetool.engine import job
from mergetool.options.merging import MergeOptions
from tests.cli.run import mergetool
from tests.oracles.case import places
from tests.oracles.families import CASES

LINES = {
    text.split(" | ")[0].removeprefix("| "): text
    for text in PAGE.read_text("utf-8").splitlines()
    if text.startswith("| ")
}


def test_the_page_has_a_row_for_every_published_size() -> None:
    assert list(LINES) == [COLUMNS[0], *(f"{name} ({size})" for name, size in PUBLISHED)]


@pytest.mark.parametrize(("name", "size"), [(name, next(iter(case.published))) for name, case in CASES.items()])
def test_sizes_and_memory_are_those_of_the_page(name: str, size: str, tmp_path: Path) -> None:
    assert line(row(tmp_path, name, size)) == LINES[f"{name} ({size})"]


@pytest.mark.parametrize("name", CASES)
def test_all_matrices_of_blocks_are_quantised_but_those_kept(name: str, tmp_path: Path) -> None:
    """What ComfyUI was asked of a small model (`tests.oracles.test_families`) holds for a published one."""
    case = CASES[name]
    size = next(iter(case.published))
    theirs, ours = (case.shapes(layout, case.published[size]) for layout in ("diffusers", "comfyui"))
    paths = headers(tmp_path, name, size)
    with job.open_merge(f"'{paths['c']}'", MergeOptions(quant="fp8-scaled"), fingerprints=False) as plan:
        found = {tensor.name for tensor in plan.tensors if tensor.quantiser is not None}
    in_blocks = {
        place.tensor
        for part, place in places(case.converter, ours).items()
        if case.stack in part and len(theirs[part]) == 2 and not any(module in part for module in case.kept)
    }
    assert found == in_blocks


def test_a_dry_run_says_what_memory_it_takes(tmp_path: Path) -> None:
    headers(tmp_path, "Chroma", "HD")
    command = ("convert", "a.safetensors", "-o", "out.safetensors", "--quant", "fp8-scaled", "--threads", THREADS)
    done = mergetool(*command, "--dry-run", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    largest = max(prod(shape) for shape in CASES["Chroma"].shapes("comfyui", CASES["Chroma"].published["HD"]).values())
    assert largest * 4 < done.json["memory"] < 4e9
