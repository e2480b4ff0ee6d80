"""SDXL as the real ComfyUI and diffusers load it: models that are written in every layout and container, and merges against float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mergetool.adapters.loaders import loading
from mergetool.adapters.lora_file import open_lora
from mergetool.arch.families.sdxl import SDXL_UNET
from tests.oracles import ComfyUI
from tests.oracles.comparing import decoded, misloaded, read, run, unlike
from tests.oracles.diffusers import Diffusers
from tests.oracles.test_comfyui_loading import half_a_step, option
from tests.sdxl import SMALL, UNET, checkpoint, values

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SDXL in float32, under ComfyUI's names."""
    return checkpoint(tmp_path_factory.mktemp("sdxl") / "source.safetensors", values(1))


# -- what is written -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["fp16", "fp8_e4m3", "fp8-scaled", "int8", "nvfp4", "mxfp8"])
def test_comfyui_loads_what_convert_writes(tmp_path: Path, source: Path, comfyui: ComfyUI, stored: str) -> None:
    written = tmp_path / "written.safetensors"
    run("convert", source, "-o", written, *option(stored), "--prefix", UNET, folder=tmp_path)
    assert misloaded(comfyui, written, decoded(written, tmp_path), config="SDXL") == []
    whole = read(source)
    assert misloaded(comfyui, written, whole, half_a_step(stored, whole), config="SDXL") == []


def test_diffusers_loads_the_folder_that_convert_writes(tmp_path: Path, source: Path) -> None:
    from diffusers import UNet2DConditionModel

    run("convert", source, "-o", f"{tmp_path}/unet/", "--layout", "diffusers", folder=tmp_path)
    found, about = UNet2DConditionModel.from_pretrained(tmp_path / "unet", output_loading_info=True)
    assert {key: about[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")} == {
        "missing_keys": [],
        "unexpected_keys": [],
        "mismatched_keys": [],
    }
    assert {key: found.config[key] for key in SMALL} == dict(SMALL)
    wanted = values(1)
    assert found.state_dict().keys() == wanted.keys()
    assert all(tensor.equal(wanted[name]) for name, tensor in found.state_dict().items())


# -- merges --------------------------------------------------------------------------------------------------------------------


def sixteenths(seed: int) -> Tensors:
    """Weights whose differences and sums, times multiples of a quarter, float32 holds exactly."""
    return {name: (tensor * 400).round() / 16 for name, tensor in values(seed).items()}


FILES = {"a": ("comfyui", UNET), "b": ("diffusers", ""), "c": ("diffusers", "unet."), "d": ("comfyui", "")}
"""The layout and prefix of each file."""
MERGES = {
    "'a.safetensors' + 1.5*('b.safetensors' - 'c.safetensors')": (1, 1.5, -1.5, 0),
    "0.25*'d.safetensors' + 0.75*'b.safetensors'": (0, 0.75, 0, 0.25),
    "'c.safetensors' - 2*('a.safetensors' - 'd.safetensors')": (-2, 0, 1, 2),
}


@pytest.mark.parametrize("layout", ["comfyui", "diffusers"])
@pytest.mark.parametrize("expression", MERGES)
def test_merges_across_layouts_and_prefixes_are_exact(
    tmp_path: Path, comfyui: ComfyUI, expression: str, layout: str
) -> None:
    """The names that ComfyUI's own map gives tell which tensors belong together."""
    models = {name: sixteenths(seed) for seed, name in enumerate(FILES)}
    for name, (own, prefix) in FILES.items():
        checkpoint(tmp_path / f"{name}.safetensors", models[name], layout=own, prefix=prefix)
    expected = {
        name: sum(
            factor * models[model][name].double().numpy()
            for model, factor in zip(FILES, MERGES[expression], strict=True)
        )
        for name in models["a"]
    }
    out = tmp_path / "out.safetensors"
    run("merge", expression, "-o", out, "--layout", layout, "--prefix", "", "--force", folder=tmp_path)
    found = read(out)
    if layout == "comfyui":
        config = {"num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 1, 1, 2, 2],
                  "transformer_depth_middle": 2, "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2]}  # fmt: skip
        theirs = comfyui.ask("diffusers_names", function="unet_to_diffusers", config=config)["names"]
        found = {name: found[theirs[name][0]] for name in expected}
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


# -- LoRAs -----------------------------------------------------------------------------------------------------------------------


def moved(base: Tensors) -> tuple[Tensors, Tensors]:
    """A variant that differs in every matrix and convolution by two directions, and the differences."""
    generator = torch.Generator().manual_seed(9)
    deltas = {}
    for name, weight in base.items():
        if name.endswith(".weight") and weight.ndim > 1:
            up, down = (
                torch.randn(len(weight), 2, generator=generator),
                torch.randn(2, weight[0].numel(), generator=generator),
            )
            deltas[name] = (up @ down * 0.02).reshape(weight.shape)
    return {name: weight + deltas.get(name, 0) for name, weight in base.items()}, deltas


@pytest.fixture(scope="session")
def difference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors]:
    """A folder with ``base``, ``variant`` and the LoRA ``diff`` makes of them, and what they differ by."""
    folder = tmp_path_factory.mktemp("difference")
    base = values(1)
    variant, deltas = moved(base)
    checkpoint(folder / "base.safetensors", base, prefix=UNET)
    checkpoint(folder / "variant.safetensors", variant, layout="diffusers")
    files = ["--base", "base.safetensors", "--variant", "variant.safetensors", "-o", "lora.safetensors"]
    run("diff", *files, "--rank-thresh", "0.99999", "--dtype", "fp32", "--min-dim", "1", folder=folder)
    return folder, deltas


def near(found: np.ndarray, wanted: np.ndarray) -> bool:
    """The threshold's share of the energy, and float32's roundings of the sum."""
    return bool(np.linalg.norm(found - wanted) <= 2**-8 * np.linalg.norm(wanted))


def test_comfyui_adds_the_whole_difference(difference: tuple[Path, Tensors], tmp_path: Path, comfyui: ComfyUI) -> None:
    folder, deltas = difference
    base = folder / "base.safetensors"
    answer = comfyui.ask("patch", model=base, lora=folder / "lora.safetensors", out=tmp_path / "out.safetensors")
    assert (answer["log"], len(answer["patched"])) == ([], 264)
    found, before = read(tmp_path / "out.safetensors"), values(1)
    for name, tensor in before.items():
        change = found[SDXL_UNET.stored_name(name, "comfyui")] - tensor.double().numpy()
        assert near(change, deltas[name].double().numpy()) if name in deltas else not change.any(), name


def test_diffusers_loads_the_whole_difference(difference: tuple[Path, Tensors], tmp_path: Path) -> None:
    folder, deltas = difference
    model = {"pipeline": "StableDiffusionXLPipeline", "model": "UNet2DConditionModel", "config": dict(SMALL)}
    with Diffusers("0.42.1") as diffusers:
        diffusers.ask("load", lora=folder, name="lora.safetensors", out=tmp_path / "out.safetensors", **model)
    found = read(tmp_path / "out.safetensors")
    assert len(found) == 264
    assert found.keys() == deltas.keys()
    assert [name for name, delta in deltas.items() if not near(found[name], delta.double().numpy())] == []


def test_what_diff_says_of_loaders_is_that_both_load_it_whole(difference: tuple[Path, Tensors]) -> None:
    folder, _ = difference
    said = run("lora", "inspect", "lora.safetensors", folder=folder)
    assert "SDXL" in said
    with open_lora(folder / "lora.safetensors") as file:
        verdicts = {one.name: one.verdict for one in loading(file)}
    assert verdicts == {
        "diffusers 0.39, 0.40 and 0.42.1": "whole",
        "diffusers 0.36 and 0.38": "not at all",
        "ComfyUI 0.30": "whole",
    }


CONV = "input_blocks_4_0_in_layers_2"  # [64, 32, 3, 3]
LYCORIS: dict[str, dict[str, tuple[int, ...]]] = {
    "LoCon": {"lora_down.weight": (2, 32, 3, 3), "lora_up.weight": (64, 2, 1, 1)},
    "LoCon with a middle": {"lora_down.weight": (2, 32, 1, 1), "lora_up.weight": (64, 2, 1, 1), "lora_mid.weight": (2, 2, 3, 3)},
    "LoHa": {"hada_w1_a": (64, 2), "hada_w1_b": (2, 288), "hada_w2_a": (64, 2), "hada_w2_b": (2, 288)},
    "LoKr": {"lokr_w1": (4, 4), "lokr_w2": (16, 8, 3, 3)},
    "a whole difference": {"diff": (64, 32, 3, 3)},
}  # fmt: skip


@pytest.mark.parametrize("kind", LYCORIS)
def test_comfyui_adds_to_a_convolution_what_bake_adds(
    tmp_path: Path, source: Path, comfyui: ComfyUI, kind: str
) -> None:
    generator = torch.Generator().manual_seed(3)
    tensors = {
        f"lora_unet_{CONV}.{end}": torch.randn(shape, generator=generator) * 0.3 for end, shape in LYCORIS[kind].items()
    }
    save_file({**tensors, f"lora_unet_{CONV}.alpha": torch.tensor(1.0)}, tmp_path / "lora.safetensors")
    out = tmp_path / "out.safetensors"
    answer = comfyui.ask("patch", model=source, lora=tmp_path / "lora.safetensors", out=out)
    name = "input_blocks.4.0.in_layers.2.weight"
    assert (answer["log"], answer["patched"]) == ([], [f"diffusion_model.{name}"])
    run(
        "lora",
        "bake",
        source,
        "lora.safetensors",
        "-o",
        "baked.safetensors",
        "--dtype",
        "fp32",
        "--force",
        folder=tmp_path,
    )
    theirs, ours, before = read(out), read(tmp_path / "baked.safetensors"), read(source)
    assert np.abs(ours[name] - before[name]).max() > 0.05
    assert unlike(theirs, ours, {other: np.array(2.0**-18 if other == name else 0) for other in ours}) == []
