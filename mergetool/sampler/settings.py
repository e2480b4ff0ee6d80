"""From what a user writes to what the sampler takes, with the defaults of the model asked for; and pictures to files."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from mergetool import models
from mergetool.checkpoint.files import write_file
from mergetool.checkpoint.targets import require_folder
from mergetool.errors import OutputError, UsageError
from mergetool.sampler import sheet
from mergetool.sampler.load import Components, WeightedLora, pipeline_folder
from mergetool.sampler.session import Made
from mergetool.sampler.studio import Pictures, Refinement, Shot, Stage, Studio

FIRST_SHIFT, SECOND_SHIFT = 6.0, 3.0
"""Of Z-Image Base's and Z-Image Turbo's own schedulers."""

LARGE = 1e9
"""Bytes of weights from which a model is run in BF16 by default."""


def loras(texts: Sequence[str]) -> tuple[WeightedLora, ...]:
    return tuple(WeightedLora.parse(text) for text in texts)


def own_shift(model: str) -> float | None:
    """The shift in the scheduler config of the pipeline folder that a model lies in, None where there is none."""
    folder = pipeline_folder(models.resolve(model).path)
    path = None if folder is None else folder / "scheduler" / "scheduler_config.json"
    if path is None or not path.is_file():
        return None
    found = json.loads(path.read_text("utf-8")).get("shift")
    return float(found) if isinstance(found, int | float) else None


def stage(model: str, steps: int, guidance: float, shift: float | None, added: tuple[WeightedLora, ...]) -> Stage:
    """A first stage. Raises UsageError for numbers that cannot be meant."""
    _require_guidance(guidance)
    made = Stage(model, steps, guidance, shift or own_shift(model) or FIRST_SHIFT, added)
    made.levels()
    return made


def refinements(
    model: str,
    steps: int,
    guidance: float,
    shift: float | None,
    added: tuple[WeightedLora, ...],
    strengths: str,
    *,
    strength_as: str,
) -> tuple[Refinement, ...]:
    """One second stage for each of the comma-separated ``strengths``. Raises UsageError."""
    _require_guidance(guidance)
    if strength_as not in ("comfyui", "diffusers"):
        raise UsageError(f'--strength-as is one of comfyui, diffusers, not "{strength_as}".')
    own = shift or own_shift(model) or SECOND_SHIFT
    found = []
    for text in strengths.split(","):
        try:
            value = float(text)
        except ValueError:
            raise UsageError(
                f'--strength "{strengths}" is no number or list of numbers; write 0.15 or 0.1,0.15,0.25.'
            ) from None
        made = Refinement(model, steps, guidance, own, added, value, strength_as)  # type: ignore[arg-type]
        made.levels()
        found.append(made)
    return tuple(found)


def seeds(text: str) -> list[int]:
    """``1,2,3`` or ``1-8`` or both. Raises UsageError."""
    found: list[int] = []
    for piece in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})(?:-(\d{1,18}))?\s*", piece)
        if match is None or int(match[2] or match[1]) - int(match[1]) not in range(10_000):
            raise UsageError(f'--seeds "{text}" is no list of seeds; write 1,2,3 or 1-8.')
        found.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
    return found


def shots(
    prompts: Sequence[str], numbers: Sequence[int], negative: str, refine_prompt: str | None, refine_seed: int | None
) -> tuple[Shot, ...]:
    """Every prompt with every seed."""
    return tuple(Shot(prompt, number, negative, refine_prompt, refine_seed) for prompt in prompts for number in numbers)


def studio(
    model: str,
    *,
    pipeline: str | None = None,
    text_encoder: Path | None = None,
    tokenizer: Path | None = None,
    vae: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Studio:
    """The shared parts for a model. Raises UsageError for a device that is not there, InputMissing for missing parts."""
    if not model:
        raise UsageError("there is no model: name one with --base, or with --init-image and --refiner.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device here; leave the option out to use the CPU.")
    if dtype not in ("auto", "fp32", "bf16"):
        raise UsageError(f'--dtype is one of auto, fp32, bf16, not "{dtype}".')
    if dtype == "auto":
        dtype = "bf16" if is_large(model) else "fp32"
    found = Components.find(model, pipeline=pipeline, text_encoder=text_encoder, tokenizer=tokenizer, vae=vae)
    return Studio(found, device, torch.bfloat16 if dtype == "bf16" else torch.float32)


def is_large(model: str) -> bool:
    """Whether a model's weights are more than LARGE."""
    with models.open_model(model) as opened:
        return sum(part.nbytes for part in opened.anatomy.parts.values()) > LARGE


def picture_size(text: str | None, start: Pictures | None, place: Studio) -> tuple[int, int]:
    """(width, height): as written, or the init image's, or what the VAE was made for. Raises UsageError."""
    unit = 2 * place.reduction
    if start is not None:
        height, width = start.shape[:2]
        if text is not None and text != f"{width}x{height}":
            raise UsageError(f"--init-image is {width}x{height}, and so is what becomes of it; leave --size out.")
        if width % unit or height % unit:
            raise UsageError(
                f"--init-image is {width}x{height}; both sides must be multiples of {unit}: crop it first."
            )
        return width, height
    if text is None:
        side = int(place.vae.config.sample_size)
        return side, side
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if match is None:
        raise UsageError(f'--size "{text}" is not WIDTHxHEIGHT; write for example 1024x768.')
    size = int(match[1]), int(match[2])
    place.latent_size(size)
    return size


def require_target(target: Path, *, many: bool, overwrite: bool) -> None:
    """Raises OutputError, before any work, when the picture or folder cannot be made there."""
    if many and target.suffix.lower() == ".png":
        raise UsageError(
            f'more than one picture makes a folder, not a file: name one without .png, as in "{target.stem}".'
        )
    if not many and target.suffix.lower() != ".png":
        raise UsageError(f'one picture is a PNG: name it "{target.name}.png".')
    require_folder(target.parent)
    if target.is_dir() != many and target.exists():
        raise OutputError(f'"{target}" is {"no folder" if many else "a folder"}; choose another place with -o.')
    if target.exists() and not overwrite and (not many or any(target.iterdir())):
        raise OutputError(f'"{target}" exists; choose another place with -o, or replace it with --overwrite.')


def write(made: Sequence[Sequence[Made]], target: Path, *, many: bool) -> list[Path]:
    """Write the pictures: one file, or a folder with all of them, the sheet and ``pictures.json``; returns the paths."""
    if not many:
        last = made[0][-1]
        write_file(target, sheet.png(last.picture, last.parameters), overwrite=True)
        return [target]
    target.mkdir(exist_ok=True)
    paths, record = [], []
    for row, line in enumerate(made):
        for column, one in enumerate(line):
            path = target / f"{row:03}-{column}.png"
            write_file(path, sheet.png(one.picture, one.parameters), overwrite=True)
            paths.append(path)
            record.append({"file": path.name, **one.parameters})
    out = io.BytesIO()
    across = [_label(one) for one in made[0]]
    down = [f"{line[0].parameters['seed']}: {line[0].parameters['prompt']}" for line in made]
    sheet.sheet([[one.picture for one in line] for line in made], across, down).save(out, "PNG")
    for name, data in (("sheet.png", out.getvalue()), ("pictures.json", json.dumps(record, indent=1).encode() + b"\n")):
        write_file(target / name, data, overwrite=True)
        paths.append(target / name)
    return paths


def _label(one: Made) -> str:
    first, second = one.parameters["first"], one.parameters["second"]
    if second is None:
        return f"{first['model']}, {first['steps']} steps"
    return f"strength {second['strength']:g}"


def _require_guidance(value: float) -> None:
    if not 0 <= value < 1e4:
        raise UsageError(f"guidance is 0 (none) or more, not {value:g}.")
