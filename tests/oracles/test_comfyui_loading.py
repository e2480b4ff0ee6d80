"""What mergetool writes, loaded by the real ComfyUI: no key missing or unexpected, and the weights that mergetool reads itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ZImageTransformer2DModel
from safetensors.torch import load_file, save_file

from mergetool import models
from mergetool.arch.families.z_image import REFERENCE_CONFIG, reference_shapes
from mergetool.checkpoint.dtypes import F32
from tests.families import checkpoint
from tests.oracles import ComfyUI, RefusedError
from tests.oracles.comparing import Values, decoded, misloaded, read, run

# Half a step of each stored type: relative to the value (to the tensor's largest, which is more), and absolute.
STEPS = {
    "bf16": (2**-8, 0),
    "fp16": (2**-11, 2**-25),
    "fp32": (0, 0),
    "fp8_e4m3": (2**-4, 2**-10),
    "fp8_e5m2": (2**-3, 2**-17),
    "fp8-scaled": (2**-4, 0),
    "int8": (1 / 254, 0),
    "int8-convrot": (1 / 64, 0),  # of what a group's 64 codes add up to
    "nvfp4": (1 / 6 + 1 / 16, 0),
    "mxfp8": (2**-4, 0),
}
NAMES = {"comfyui": ["--layout", "comfyui"], "diffusers": ["--layout", "diffusers"]}
PREFIXES = {"no prefix": ["--prefix", ""], "ModelSave's prefix": ["--prefix", "model.diffusion_model."]}
QUANTISED = ("fp8-scaled", "int8", "int8-convrot", "nvfp4", "mxfp8")
WRITTEN = [
    (stored, layout, prefix)
    for stored in STEPS
    for layout in (["comfyui"] if stored in QUANTISED else NAMES)
    for prefix in PREFIXES
]
"""Every container, layout and prefix that ``convert`` and ``merge`` write; quantised weights are written under ComfyUI's names only."""


def option(stored: str) -> list[str]:
    return ["--quant" if stored in QUANTISED else "--dtype", stored]


def half_a_step(stored: str, values: Values) -> Values:
    relative, absolute = STEPS[stored]
    # 2^-22: scales are float32 and multiplied in float32
    return {
        name: np.abs(value).max() * (relative + (2**-22 if relative else 0)) + absolute
        for name, value in values.items()
    }


def added_up(stored: str, values: Values) -> Values:
    """Nothing, but for rotations: ComfyUI scales first and adds numbers that are rounded already, 64 of them."""
    return {name: 64 * 2**-24 * np.abs(value).max() * (stored == "int8-convrot") for name, value in values.items()}


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Z-Image in float32."""
    return checkpoint(tmp_path_factory.mktemp("source") / "source.safetensors", dtype=F32)


@pytest.mark.parametrize(("stored", "layout", "prefix"), WRITTEN)
def test_comfyui_loads_what_convert_writes(
    tmp_path: Path, source: Path, comfyui: ComfyUI, stored: str, layout: str, prefix: str
) -> None:
    written = tmp_path / "written.safetensors"
    run("convert", source, "-o", written, *option(stored), *NAMES[layout], *PREFIXES[prefix], folder=tmp_path)
    ours = decoded(written, tmp_path)
    assert misloaded(comfyui, written, ours, added_up(stored, ours)) == []
    whole = read(source)
    assert misloaded(comfyui, written, whole, half_a_step(stored, whole)) == []


@pytest.mark.parametrize("stored", ["bf16", *QUANTISED])
def test_comfyui_loads_what_merge_writes(family: Path, comfyui: ComfyUI, stored: str) -> None:
    run(
        "merge",
        "'alk.safetensors' + 2 * ('a.safetensors' - 'b.safetensors')",
        "-o",
        "merged.safetensors",
        *option(stored),
        folder=family,
    )
    ours = decoded(family / "merged.safetensors", family)
    assert misloaded(comfyui, family / "merged.safetensors", ours, added_up(stored, ours)) == []


@pytest.mark.parametrize("name", models.embedded())
def test_comfyui_loads_the_embedded_models(tmp_path: Path, comfyui: ComfyUI, name: str) -> None:
    out = tmp_path / "model.safetensors"
    run("convert", name, "-o", out, "--layout", "comfyui", folder=tmp_path)
    assert misloaded(comfyui, out, decoded(out, tmp_path)) == []


@pytest.mark.parametrize("layout", NAMES)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_comfyui_takes_a_whole_z_image_by_its_names_and_shapes(comfyui: ComfyUI, layout: str, prefix: str) -> None:
    shapes = {prefix + name: list(shape) for name, shape in reference_shapes(REFERENCE_CONFIG, layout).items()}
    assert comfyui.ask("recognise", shapes=shapes) == {
        "config": "ZImage",
        "missing": [],
        "unexpected": [],
        "parameters": 453,
        "log": [],
    }


def test_what_comfyui_cannot_load_is_an_error_with_its_words(tmp_path: Path, comfyui: ComfyUI) -> None:
    with pytest.raises(RefusedError, match="FileNotFoundError"):
        comfyui.ask("load", model=tmp_path / "absent.safetensors")


def test_comfyui_computes_from_one_layout_what_diffusers_computes_from_the_other(
    tmp_path: Path, comfyui: ComfyUI
) -> None:
    """Sums in another order, of a few thousand products of float32: 2^-24 times their number, relative to the largest."""
    model = tmp_path / "model.safetensors"
    run("convert", "lab.turbo", "-o", model, "--layout", "comfyui", "--dtype", "fp32", folder=tmp_path)
    run("convert", model, "-o", tmp_path / "transformer.safetensors", "--layout", "diffusers", folder=tmp_path)
    transformer = ZImageTransformer2DModel.from_config(
        ZImageTransformer2DModel.load_config(models.EMBEDDED / "turbo" / "transformer")
    )
    transformer.load_state_dict(load_file(tmp_path / "transformer.safetensors"))
    generator = torch.Generator().manual_seed(0)
    x, context = (
        torch.randn(1, 16, 16, 16, generator=generator),
        torch.randn(1, 20, transformer.config["cap_feat_dim"], generator=generator),
    )
    sigma = torch.tensor([0.7])
    save_file({"x": x, "context": context, "sigma": sigma}, tmp_path / "inputs.safetensors")
    comfyui.ask("forward", model=model, inputs=tmp_path / "inputs.safetensors", out=tmp_path / "out.safetensors")
    velocity = (x - load_file(tmp_path / "out.safetensors")["x"]) / sigma
    with torch.no_grad():
        (theirs,) = transformer.float().eval()([x[0].unsqueeze(1)], 1 - sigma, [context[0]], return_dict=False)[0]
    np.testing.assert_allclose(
        velocity[0].numpy(), -theirs.squeeze(1).numpy(), rtol=0, atol=2**-12 * float(theirs.abs().max())
    )
