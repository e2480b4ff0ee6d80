"""LoRAs of Stable Diffusion 1: every spelling is read, and what is said of ComfyUI and diffusers is what these do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from mergetool.adapters.convert import convert
from mergetool.adapters.formats import KEY_FORMATS
from mergetool.adapters.loaders import Loading, loading
from mergetool.adapters.lora_file import open_lora
from mergetool.adapters.values import dense_rows
from mergetool.arch.families.sd15 import SD15
from tests.adapters.test_sdxl import (
    DOWN,
    UP,
    A,
    B,
    Changes,
    Pair,
    Spell,
    alike,
    changes_of,
    flat,
    old,
    processor,
    right,
    written,
)
from tests.oracles import ComfyUI, RefusedError
from tests.oracles.diffusers import Diffusers

SMALL = {
    "sample_size": 64,
    "block_out_channels": [32, 64, 128, 128],
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SOME = re.compile(
    r"conv_(?:in|out)|time_embedding|down_blocks\.1\.attentions\.0|down_blocks\.3\.resnets\.0|mid_block\.attentions|up_blocks\.0\.upsamplers"
    r"|up_blocks\.3\.attentions\.2"
)
"""Modules of every kind and place."""


def native(module: str) -> str:
    return SD15.stored_name(f"{module}.weight", "comfyui").removesuffix(".weight")


SPELLINGS: dict[str, Spell] = {
    "sd-scripts": lambda m: (f"lora_unet_{flat(m)}", DOWN, UP),
    "underscored ComfyUI names": lambda m: (f"lora_unet_{flat(native(m))}", DOWN, UP),
    "SimpleTuner": lambda m: (f"lycoris_{flat(m)}", DOWN, UP),
    "PEFT in diffusers": lambda m: (f"unet.{m}", A, B),
    "old diffusers": old,
    "PEFT behind a processor": lambda m: (f"unet.{processor(m)}", A, B),
    "ComfyUI's names": lambda m: (f"diffusion_model.{native(m)}", A, B),
    "bare": lambda m: (m, A, B),
    "raw PEFT": lambda m: (f"base_model.model.{m}", A, B),
}
CASES: dict[str, tuple[str, tuple[int, ...], float | None]] = {
    **{name: (name, (2, 4, 2, 3), None) for name in SPELLINGS},
    "sd-scripts, alpha": ("sd-scripts", (2,), 1.0),
    "sd-scripts, alpha, mixed ranks": ("sd-scripts", (2, 4, 2, 3), 2.0),
    "ComfyUI's names, alpha": ("ComfyUI's names", (2,), 1.0),
}
"""The spelling, ranks by turns, and every module's alpha."""
SOURCE = "sd-scripts, alpha, mixed ranks"


@pytest.fixture(scope="module")
def shapes() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        made = UNet2DConditionModel(**SMALL)
    return {name: tuple(value.shape) for name, value in made.state_dict().items()}


def factors(shapes: dict[str, tuple[int, ...]], ranks: tuple[int, ...]) -> dict[str, Pair]:
    """Factors of matrices and convolutions, the latter as LoCon has them."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    chosen = ((p, s) for p, s in shapes.items() if p.endswith(".weight") and len(s) > 1 and SOME.match(p))
    for i, (part, shape) in enumerate(chosen):
        rank = ranks[i % len(ranks)]
        down = torch.randn(rank, *shape[1:], generator=generator) * 0.1
        up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator) * 0.1
        found[part.removesuffix(".weight")] = down, up
    return found


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, tuple[int, ...]]
) -> dict[str, tuple[Path, Changes]]:
    """Files by name, with what each means."""
    folder = tmp_path_factory.mktemp("loras")
    found = {}
    for i, (name, (spelling, ranks, alpha)) in enumerate(CASES.items()):
        pairs = factors(shapes, ranks)
        found[name] = written(folder / f"{i}.safetensors", SPELLINGS[spelling], pairs, alpha), changes_of(pairs, alpha)
    for key_format in KEY_FORMATS[:-1]:
        with open_lora(found[SOURCE][0]) as file:
            convert(file, folder / f"{key_format}.safetensors", key_format)
        found[f"converted: {key_format}"] = folder / f"{key_format}.safetensors", found[SOURCE][1]
    return found


NAMES = [*CASES, *(f"converted: {key_format}" for key_format in KEY_FORMATS[:-1])]


@pytest.mark.parametrize("name", NAMES)
def test_every_spelling_means_the_same_changes(files: dict[str, tuple[Path, Changes]], name: str) -> None:
    path, wanted = files[name]
    with open_lora(path) as file:
        assert (file.family, file.unmatched) == (SD15, ())
        found = {part: dense_rows(file, change, 0, change.rows) for part, (change,) in file.changes.items()}
    assert found.keys() == wanted.keys()
    assert [part for part in wanted if not alike(found[part], wanted[part])] == []


Found = Iterator[tuple[str, set[str], bool]]
"""A file's name, the parts that a program changes as it means, and whether it rejects the file."""


def in_comfyui(files: dict[str, tuple[Path, Changes]], shapes: dict[str, tuple[int, ...]], comfyui: ComfyUI) -> Found:
    folder = next(iter(files.values()))[0].parent
    own = {SD15.stored_name(name, "comfyui"): name for name in shapes}
    save_file({stored: torch.zeros(shapes[name]) for stored, name in own.items()}, folder / "zeros.safetensors")
    for name, (path, wanted) in files.items():
        comfyui.ask("patch", model=folder / "zeros.safetensors", lora=path, out=folder / "out")
        yield name, right({own[key]: tensor for key, tensor in load_file(folder / "out").items()}, wanted), False


def in_diffusers(files: dict[str, tuple[Path, Changes]]) -> Found:
    model = {"pipeline": "StableDiffusionPipeline", "model": "UNet2DConditionModel", "config": SMALL}
    with Diffusers("0.42.1") as diffusers:
        for name, (path, wanted) in files.items():
            try:
                diffusers.ask("load", lora=path.parent, name=path.name, out=path.parent / "out", **model)
            except RefusedError:
                yield name, set(), True
            else:
                yield name, right(load_file(path.parent / "out"), wanted), False


def said(path: Path) -> dict[str, Loading]:
    with open_lora(path) as file:
        return {one.program: one for one in loading(file)}


@pytest.mark.parametrize("program", ["ComfyUI", "diffusers"])
def test_a_program_loads_what_is_said(
    files: dict[str, tuple[Path, Changes]], shapes: dict[str, tuple[int, ...]], comfyui: ComfyUI, program: str
) -> None:
    wrong, whole = {}, set()
    for name, changed, rejects in in_comfyui(files, shapes, comfyui) if program == "ComfyUI" else in_diffusers(files):
        path, wanted = files[name]
        one = said(path)[program]
        expected = wanted.keys() - one.dropped.keys()
        if (changed, rejects) != (expected, one.error is not None):
            wrong[name] = (len(changed), len(expected), sorted(changed ^ expected)[:3], rejects, one.error)
        if changed == wanted.keys():
            whole.add(name)
    assert wrong == {}
    assert {"converted: default", "sd-scripts", "old diffusers"} <= whole
