"""What an oracle's tensors are held against, with one sentence for every difference: no difference is an empty list."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file

from tests.cli.run import mergetool
from tests.oracles.process import ComfyUI

Values = Mapping[str, npt.NDArray[np.float64]]


def read(path: Path) -> dict[str, npt.NDArray[np.float64]]:
    """The tensors of a safetensors file of floats, exactly, by name."""
    return {name: tensor.to(torch.float64).numpy() for name, tensor in load_file(path).items()}


def run(*arguments: object, folder: Path) -> str:
    """What a command that must succeed prints."""
    done = mergetool(*arguments, cwd=folder)
    assert done.code == 0, done.err
    return done.out


def decoded(model: Path, folder: Path) -> dict[str, npt.NDArray[np.float64]]:
    """What mergetool reads in a model: ``convert --dtype fp32`` to ComfyUI's names."""
    out = folder / f"{model.stem}-read.safetensors"
    run("convert", model, "-o", out, "--dtype", "fp32", "--layout", "comfyui", "--prefix", "", folder=folder)
    return read(out)


def unlike(theirs: Values, ours: Values, allowed: Values | None = None) -> list[str]:
    """A sentence for every tensor that one side lacks, or that differs by more than is ``allowed`` (an array or one number a tensor; without: by anything)."""
    found = [f"{name} is only there" for name in theirs.keys() - ours.keys()]
    found += [f"{name} is only here" for name in ours.keys() - theirs.keys()]
    for name in theirs.keys() & ours.keys():
        one, other = theirs[name], ours[name]
        if one.shape != other.shape:
            found.append(f"{name} has shape {list(one.shape)} there and {list(other.shape)} here")
        elif not (np.abs(one - other) <= (0 if allowed is None else allowed[name])).all():  # NaN is not equal
            found.append(
                f"{name} differs by up to {np.abs(one - other).max():.3g}, its largest value is {np.abs(other).max():.3g}"
            )
    return sorted(found)


def misloaded(
    comfyui: ComfyUI, model: Path, expected: Values, allowed: Values | None = None, *, config: str = "ZImage"
) -> list[str]:
    """How ComfyUI's model differs from ``expected`` after loading a file, in its names, class and values."""
    answer = comfyui.ask("load", model=model)
    out = model.with_name(f"{model.stem}-comfyui.safetensors")
    comfyui.ask("weights", model=model, out=out)
    found = [f"{name} is missing" for name in answer["missing"]] + [
        f"{name} is unexpected" for name in answer["unexpected"]
    ]
    if answer["config"] != config:
        found.append(f"the model is taken for {answer['config']}")
    return found + answer["log"] + unlike(read(out), expected, allowed)


def mispatched(
    comfyui: ComfyUI, model: Path, lora: Path, expected: Values, allowed: Values | None = None, *, strength: float = 1
) -> list[str]:
    """How ComfyUI's model differs from ``expected`` after a LoRA was added to it, with what it says of keys that it left out."""
    out = lora.with_name("comfyui-patched.safetensors")
    answer = comfyui.ask("patch", model=model, lora=lora, out=out, strength=strength)
    return answer["log"] + unlike(read(out), expected, allowed)
