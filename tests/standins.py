"""Small files under the names that help and documentation use, so that their commands can be run as they stand.

``provide(folder, words)`` puts beside a command what its words name and the folder lacks; names that follow ``-o`` are the command's to make.
Models are the embedded ones or merges of them, 3.6 MB each, so that fine-tunes have parents, multipliers have effects and pictures show something.
Names without an ending (``alkahest``) are registered in ``config/models.toml`` of the folder, where `tests.cli.run` looks for them.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import mergetool
from mergetool.models import EMBEDDED
from tests.cli import run as commands

NAMES: Mapping[str, str] = {
    "alkahest": "lab.alkahest",
    "base": "lab.base",
    "z-image": "lab.base",
    "turbo": "lab.turbo",
    "deturbo": "lab.deturbo",
    "artshoot": "lab.striped",
    "tuned": "lab.striped",
    "beret": "lab.base + 0.5*(lab.striped - lab.base)",
    "sharper": "lab.deturbo + 0.5*(lab.hollow - lab.deturbo)",
    "a": "lab.base + 0.02*(lab.striped - lab.base)",
    "b": "lab.base",
    "c": "lab.hollow",
    "d": "lab.deturbo",
}
"""Registered names, each with the model or the expression that it stands for."""

MODELS: Mapping[str, str] = {
    "a.safetensors": "lab.base + 0.8*(lab.striped - lab.base)",
    "alkahest.safetensors": "lab.alkahest",
    "b.safetensors": "lab.base + (lab.hollow - lab.deturbo)",
    "base.safetensors": "lab.base",
    "merged.safetensors": "lab.alkahest + 1.25*(lab.striped - lab.base)",
    "someone.safetensors": "lab.base + 0.5*(lab.striped - lab.base)",
    "tuned.safetensors": "lab.striped",
    "tuned-a.safetensors": "lab.striped",
    "tuned-b.safetensors": "lab.base + (lab.hollow - lab.deturbo)",
    "turbo.safetensors": "lab.turbo",
    "z_image.safetensors": "lab.base",
}
"""Files, each with the model or the expression that it holds; none of them records how it was made."""

QUANTISED: Mapping[str, tuple[str, str]] = {
    "turbo-fp8.safetensors": ("lab.turbo", "fp8-scaled"),
    "turbo-nvfp4.safetensors": ("lab.turbo", "nvfp4"),
}

DIFFERENCES: Mapping[str, tuple[str, str, int]] = {
    "style.safetensors": ("lab.base", "lab.striped", 8),
    "detail.safetensors": ("lab.deturbo", "lab.hollow", 8),
    "other.safetensors": ("lab.base", "lab.base + 0.7*(lab.striped - lab.base) + 0.3*(lab.hollow - lab.deturbo)", 8),
    "lora.safetensors": ("lab.base", "lab.striped", 96),
    "tuned-minus-z-image.safetensors": ("lab.base", "lab.striped", 96),
}
"""LoRAs, each with its base, the variant it makes of it, and its rank."""

MERGES: Mapping[str, Sequence[str]] = {
    "out.safetensors": (),
    "out-folder": ("--layout", "diffusers"),
}
"""Merges that record how they were made, each with options beside `MERGE`."""

MERGE = "alkahest + 1.25*(tuned - base)"

PIPELINES: Mapping[str, str] = {"Z-Image": "base", "Z-Image-Turbo": "turbo"}
"""Pipeline folders, each with the embedded one."""

CONTROL = "control_model."
UNETS: Mapping[str, tuple[int, int] | tuple[int, int, str]] = {
    "sd15.safetensors": (0, 4),
    "realistic.safetensors": (1, 4),
    "sd15-inpainting.safetensors": (2, 9),
    "control.safetensors": (3, 4, CONTROL),
}
"""Small models of Stable Diffusion 1, each with the seed of what it learned, its input channels, and the prefix of a ControlNet."""

PROMPTS = "a blue circle on a gold background\na red square on a white background\n"
RECIPE = """\
models: {alkahest: lab.alkahest, tuned: lab.striped, base: lab.base}
variables: {m: 1.25}
outputs:
  bridge:
    merge: alkahest + m * (tuned - base)
    protect: refiner
"""


def provide(folder: Path, words: Sequence[str]) -> None:
    """Make in ``folder`` what a command's ``words`` name, it lacks, and is known here.

    A name is also found inside an expression, after a strength's or an option's sign, and below a folder.
    """
    read = [word for before, word in zip(("", *words), words, strict=False) if before not in ("-o", "--output")]
    for name in dict.fromkeys(name for word in read for name in re.findall(r"[A-Za-z0-9_][\w./-]*", word)):
        place = folder / name
        if name in NAMES:
            _register(folder, name)
        elif not os.path.lexists(place) and (maker := _maker(name)) is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            maker(place)


def _register(folder: Path, name: str) -> None:
    """Let a name stand for its model, in the configuration that commands run in ``folder`` have."""
    registry = folder / "config" / "models.toml"
    lines = registry.read_text("utf-8") if registry.exists() else "[models]\n"
    if f'"{name}" =' not in lines:
        registry.parent.mkdir(exist_ok=True)
        registry.write_text(f'{lines}"{name}" = {str(_model(NAMES[name]))!r}\n', "utf-8")


def _maker(name: str) -> Callable[[Path], object] | None:
    """What puts a file or folder of that name at a place; None for a name that is not known."""
    if name in MODELS:
        return lambda place: _copy(_model(MODELS[name]), place)
    if name in QUANTISED:
        return lambda place: _copy(_quantised(*QUANTISED[name]), place)
    if name in DIFFERENCES:
        return lambda place: _copy(_difference(*DIFFERENCES[name]), place)
    if name in MERGES:
        return lambda place: _record(place, MERGES[name])
    if name in UNETS:
        return lambda place: _unet(place, *UNETS[name])
    if name in PIPELINES:
        return lambda place: _copy(EMBEDDED / PIPELINES[name], place)
    return OTHERS.get(name)


def _copy(source: Path, place: Path) -> None:
    (shutil.copytree if source.is_dir() else shutil.copyfile)(source, place)


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="standins-")


def _fresh(stem: str) -> Path:
    """A place of this process for a new file, which is removed at its end."""
    folder = Path(_scratch().name)
    return folder / f"{len(list(folder.iterdir()))}-{stem}"


@functools.cache
def _model(expression: str) -> Path:
    """A file without a recipe that holds the result of an expression."""
    if re.fullmatch(r"lab\.\w+", expression):
        return next((EMBEDDED / expression.removeprefix("lab.") / "transformer").glob("*.safetensors"))
    from safetensors.torch import load_file, save_file

    merged, plain = _fresh("merge.safetensors"), _fresh("plain.safetensors")
    mergetool.merge(expression, merged, force=True, protect=["refiner"])
    save_file(load_file(merged), plain)
    return plain


def _unet(place: Path, seed: int, channels: int, prefix: str = "model.diffusion_model.") -> None:
    """A base for seed 0, else the base with a change in every weight; a ControlNet under its prefix."""
    import torch
    from safetensors.torch import save_file

    from mergetool.arch.families.controlnet import SD15_CONTROLNET
    from mergetool.arch.families.sd15 import SD15
    from mergetool.arch.table import BLOCK

    family = SD15_CONTROLNET if prefix == CONTROL else SD15
    paths = [spot.path for spot in family.table.spots if BLOCK in spot.path]
    depths = {".".join(path[: path.index(BLOCK)]): 1 for path in paths}
    widths = {"width0": 32, "width1": 64, "width2": 64, "hint0": 16, "hint1": 32, "hint2": 96, "hint3": 256}
    sizes = {**widths, "input": channels, "output": 4, "picture": 3, **depths}
    common, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in family.shapes(family.derived(sizes), "comfyui").items():
        plain = (*shape[:1], 4, *shape[2:]) if name == "input_blocks.0.0.weight" else shape
        value = torch.zeros(shape)
        value[tuple(slice(size) for size in plain)] = torch.randn(plain, generator=common)
        change = torch.randn(shape, generator=own) if seed else torch.zeros(shape)
        tensors[f"{prefix}{name}"] = (0.05 * value + 0.005 * change).half()
    save_file(tensors, place)


def _record(place: Path, options: Sequence[str]) -> None:
    """A merge that is made in its folder, of models that are registered there."""
    provide(place.parent, [MERGE])
    ran = commands.mergetool("merge", MERGE, "--protect", "refiner", *options, "-o", place.name, cwd=place.parent)
    assert ran.code == 0, ran.err


@functools.cache
def _quantised(model: str, container: str) -> Path:
    place = _fresh("quantised.safetensors")
    mergetool.convert(model, place, quant=container)
    return place


@functools.cache
def _difference(base: str, variant: str, rank: int) -> Path:
    place = _fresh("lora.safetensors")
    mergetool.diff(base, variant, output=place, rank=rank)
    return place


def _gguf(place: Path) -> None:
    from tests.quant.ggml import Q
    from tests.quant.models import as_gguf

    as_gguf(place, _model("lab.base"), Q.Q8_0)


def _peft(place: Path) -> None:
    mergetool.lora_convert(_difference(*DIFFERENCES["style.safetensors"]), output=place, key_format="peft")


def _photo(place: Path) -> None:
    from PIL import Image

    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(place)


def _text_encoder(place: Path) -> None:
    """A single file, and beside it the config that says it is small."""
    source = EMBEDDED / "base" / "text_encoder"
    shutil.copyfile(source / "model.safetensors", place)
    shutil.copyfile(source / "config.json", place.parent / "config.json")


def _vae(place: Path) -> None:
    """The same of the VAE, under the names of single files."""
    from diffusers import AutoencoderKL
    from safetensors.torch import save_file

    from tests.pipelines import as_single_file

    folder = AutoencoderKL.from_pretrained(EMBEDDED / "base" / "vae")
    blocks = len(folder.config["block_out_channels"])
    save_file(as_single_file(folder.state_dict(), blocks), place)
    shutil.copyfile(EMBEDDED / "base" / "vae" / "config.json", place.parent / "config.json")


OTHERS: Mapping[str, Callable[[Path], object]] = {
    "bridge.yaml": lambda place: place.write_text(RECIPE, "utf-8"),
    "prompts.txt": lambda place: place.write_text(PROMPTS, "utf-8"),
    "photo.png": _photo,
    "peft-folder": _peft,
    "z_image-Q8_0.gguf": _gguf,
    "text_encoders/qwen_3_4b.safetensors": _text_encoder,
    "vae/ae.safetensors": _vae,
    "tokenizer": lambda place: shutil.copytree(EMBEDDED / "base" / "tokenizer", place),
}
