"""Merges planned at published sizes, of files of which the disk holds the headers alone: what is quantised, sizes, memory."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest

from mergetool.checkpoint.dtypes import BF16
from mergetool.checkpoint.header import Header
from mergetool.engine import job
from mergetool.options.merging import MergeOptions
from tests.cli.run import mergetool
from tests.oracles.test_two_streams import CASES
from tests.oracles.two_streams import places

GB = 1e9
SIZES = {
    ("Qwen-Image", "base"): (1933, 40.86, 20.48),
    ("Chroma", "HD"): (643, 17.80, 9.19),
    ("Flux.2", "dev"): (299, 64.45, 33.04),
    ("Flux.2", "Klein 9B"): (201, 18.16, 9.43),
    ("Flux.2", "Klein 4B"): (149, 7.75, 4.07),
}
"""Tensors in ComfyUI's layout, and gigabytes in BF16 and with scaled FP8."""


@pytest.fixture(params=SIZES)
def published(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """Two models of a published size, ``a`` in ComfyUI's layout under a prefix, ``b`` in diffusers'."""
    name, size = request.param
    case = CASES[name]
    for file, layout, prefix in (("a", "comfyui", "model.diffusion_model."), ("b", "diffusers", "")):
        shapes = case.shapes(layout, case.published[size])
        header = Header.plan((prefix + tensor, BF16, shape) for tensor, shape in shapes.items())
        with (tmp_path / f"{file}.safetensors").open("wb") as out:
            out.write(header.encode())
            out.truncate(len(header.encode()) + header.data_size)
    return name, size


def test_a_merge_of_two_layouts_is_planned_at_its_published_size(published: tuple[str, str], tmp_path: Path) -> None:
    tensors, bf16, fp8 = SIZES[published]
    expression = f"'{tmp_path}/a.safetensors' + 0.5*('{tmp_path}/b.safetensors' - '{tmp_path}/a.safetensors')"
    for options, size in ((MergeOptions(), bf16), (MergeOptions(quant="fp8-scaled"), fp8)):
        with job.open_merge(expression, options, fingerprints=False) as plan:
            assert len(plan.tensors) == tensors
            assert plan.header.data_size / GB == pytest.approx(size, abs=0.01)
            assert not plan.left_out
            wide = [tensor for tensor in plan.tensors if tensor.quantiser is None and options.quant]
        if options.quant:
            case = CASES[published[0]]
            shapes = case.shapes("comfyui", case.published[published[1]])
            inside = {
                f"model.diffusion_model.{place.tensor}"
                for part, place in places(case.converter, shapes).items()
                if not ("transformer_blocks." in part and len(shapes[place.tensor]) == 2)
            }
            assert {tensor.name for tensor in wide} == inside


def test_its_dry_run_says_what_memory_it_takes(published: tuple[str, str], tmp_path: Path) -> None:
    done = mergetool("convert", "a.safetensors", "-o", "out.safetensors", "--quant", "fp8-scaled", "--dry-run", "--json", cwd=tmp_path)  # fmt: skip
    assert done.code == 0, done.err
    case = CASES[published[0]]
    largest = max(prod(shape) for shape in case.shapes("comfyui", case.published[published[1]]).values())
    assert largest * 4 < done.json["memory"] < 4 * GB
