"""Wan against the real ComfyUI and diffusers: files that are loaded, merges across layouts, LoRAs that are added."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, save_file

from mergetool.adapters.loaders import Loading, loading
from mergetool.adapters.lora_file import open_lora
from mergetool.arch.families.wan import WAN
from tests.adapters.matrix import Changes, agrees
from tests.adapters.spellings import Written
from tests.adapters.wan import COMFYUI, DIFFUSERS, DIM, FIVE_D, SMALL, SPELLINGS, written
from tests.oracles import ComfyUI, RefusedError
from tests.oracles.comparing import read, run, unlike
from tests.oracles.diffusers import Diffusers

Names = dict[str, str]


@pytest.fixture(scope="module")
def names(comfyui: ComfyUI) -> Names:
    """ComfyUI's names of its class -> diffusers' by its converter."""
    answer = comfyui.ask("architecture", module="wan.model", model="WanModel", config=COMFYUI)
    own = list(answer["tensors"])
    converted = convert_wan_transformer_to_diffusers({name: torch.tensor(i) for i, name in enumerate(own)})
    return {own[int(tensor)]: theirs for theirs, tensor in converted.items()}


@pytest.fixture(scope="module")
def diffusers() -> Iterator[Diffusers]:
    with Diffusers("0.42.1") as process:
        yield process


def native(state: dict[str, torch.Tensor], names: Names) -> dict[str, torch.Tensor]:
    """A model in diffusers' names under ComfyUI's."""
    return {ours: state[theirs] for ours, theirs in names.items()}


def by_diffusers(state: Changes, names: Names) -> Changes:
    """The same the other way."""
    return {theirs: state[ours] for ours, theirs in names.items()}


def values(seed: int) -> dict[str, torch.Tensor]:
    """A small model under diffusers' names, of multiples of 1/64 below 2: sums of a few are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(-127, 128, shape, generator=generator).float() / 64
        for name, shape in WAN.shapes(SMALL, "diffusers").items()
    }


# -- models ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory, names: Names) -> Path:
    """Three models: diffusers' names, ComfyUI's in a whole checkpoint with a VAE, and ComfyUI's without a prefix."""
    folder = tmp_path_factory.mktemp("wan")
    save_file(values(1), folder / "a.safetensors")
    b = {f"model.diffusion_model.{name}": tensor for name, tensor in native(values(2), names).items()}
    save_file({**b, "vae.decoder.conv_in.weight": torch.zeros(4, 4)}, folder / "b.safetensors")
    save_file(native(values(3), names), folder / "c.safetensors")
    return folder


@pytest.mark.parametrize("layout", WAN.layouts)
def test_a_merge_across_layouts_and_prefixes_is_the_one_of_float64(
    tmp_path: Path, family: Path, comfyui: ComfyUI, names: Names, layout: str
) -> None:
    out, expression = tmp_path / "m.safetensors", "'a.safetensors' + 3/4 * ('b.safetensors' - 'c.safetensors')"
    run("merge", expression, "-o", out, "--layout", layout, folder=family)
    a, b, c = ({name: tensor.double().numpy() for name, tensor in values(seed).items()} for seed in (1, 2, 3))
    expected = {name: a[name] + 0.75 * (b[name] - c[name]) for name in a}
    found = read(out)
    if layout == "comfyui":
        answer = comfyui.ask("load", model=out)
        assert (answer["missing"], answer["unexpected"], answer["log"], answer["config"]) == ([], [], [], "WAN21_I2V")
        comfyui.ask("weights", model=out, out=tmp_path / "loaded.safetensors")
        found = by_diffusers(read(tmp_path / "loaded.safetensors"), names)
    assert unlike(found, expected) == []


@pytest.mark.parametrize("layout", WAN.layouts)
def test_a_file_comes_back_from_the_other_layout_bit_for_bit(tmp_path: Path, family: Path, layout: str) -> None:
    source = family / ("a.safetensors" if layout == "diffusers" else "c.safetensors")
    (other,) = set(WAN.layouts) - {layout}
    run("convert", source, "-o", "there.safetensors", "--layout", other, folder=tmp_path)
    run("convert", "there.safetensors", "-o", "back.safetensors", "--layout", layout, folder=tmp_path)
    before, after = load_file(source), load_file(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("quant", ["fp8-scaled", "int8", "nvfp4", "mxfp8"])
def test_comfyui_loads_quantised_blocks_and_the_rest_as_it_was(
    tmp_path: Path, family: Path, comfyui: ComfyUI, names: Names, quant: str
) -> None:
    out = tmp_path / "q.safetensors"
    run("convert", family / "a.safetensors", "-o", out, "--quant", quant, folder=tmp_path)
    answer = comfyui.ask("load", model=out)
    assert (answer["missing"], answer["unexpected"], answer["log"], answer["config"]) == ([], [], [], "WAN21_I2V")
    comfyui.ask("weights", model=out, out=tmp_path / "loaded.safetensors")
    found, wanted = by_diffusers(read(tmp_path / "loaded.safetensors"), names), values(1)
    quantised = {name for name in wanted if name.startswith("blocks.") and wanted[name].ndim == 2}
    for name, value in wanted.items():
        error = np.abs(found[name] - value.double().numpy()).max()
        assert error <= (0.25 if name in quantised else 0) * float(value.abs().max()), name
    marked = {f"{name.removesuffix('.comfy_quant')}.weight" for name in load_file(out) if name.endswith(".comfy_quant")}
    assert {names[name] for name in marked} == quantised


def test_diffusers_loads_what_convert_writes(tmp_path: Path, family: Path) -> None:
    from diffusers import WanTransformer3DModel

    how = ("--layout", "diffusers", "--prefix", "", "--bundled", "drop")
    run("convert", family / "b.safetensors", "-o", f"{tmp_path}/transformer/", *how, folder=tmp_path)
    model, said = WanTransformer3DModel.from_pretrained(tmp_path / "transformer", output_loading_info=True)
    assert not any(said.values())
    assert unlike({name: tensor.double().numpy() for name, tensor in model.state_dict().items()},
                  {name: tensor.double().numpy() for name, tensor in values(2).items()}) == []  # fmt: skip


# -- LoRAs -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zeros(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zeros") / "zeros.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in WAN.shapes(SMALL, "comfyui").items()}, path)
    return path


def in_comfyui(comfyui: ComfyUI, zeros: Path, lora: Path, names: Names) -> Changes:
    """What ComfyUI adds to a model of zeros, by diffusers' names."""
    out = lora.with_name("comfyui.safetensors")
    comfyui.ask("patch", model=zeros, lora=lora, out=out)
    return {name: value for name, value in by_diffusers(read(out), names).items() if value.any()}


def in_diffusers(diffusers: Diffusers, lora: Path) -> Changes | None:
    """The same of diffusers; None where it raises an error."""
    out = lora.with_name("diffusers.safetensors")
    asked = {"pipeline": "WanImageToVideoPipeline", "model": "WanTransformer3DModel", "config": DIFFUSERS}
    try:
        diffusers.ask("load", lora=lora.parent, name=lora.name, out=out, **asked)
    except RefusedError:
        return None
    return {name: value for name, value in read(out).items() if value.any()}


def check(found: Changes | None, said: Loading, wanted: Written) -> None:
    """What a program did is what is said of it, and nothing else."""
    assert (found is None) == (said.error is not None)
    assert agrees(found or {}, wanted.changes, limit=2.0**-6) == set(wanted.changes) - set(said.dropped)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_loras_of_every_spelling_are_read_and_what_is_said_of_loaders_is_so(
    tmp_path: Path, zeros: Path, comfyui: ComfyUI, diffusers: Diffusers, names: Names, spelling: str
) -> None:
    made = SPELLINGS[spelling]()
    lora = made.save(tmp_path)
    run("lora", "bake", zeros, lora, "-o", "baked.safetensors", "--dtype", "fp32", "--force", folder=tmp_path)
    baked = by_diffusers(read(tmp_path / "baked.safetensors"), names)
    assert agrees(baked, made.changes, limit=2.0**-19) == set(made.changes)
    assert {name for name, value in baked.items() if value.any()} == set(made.changes)
    with open_lora(lora) as file:
        assert (file.family, file.unmatched) == (WAN, ())
        in_theirs, in_ours = loading(file)
    check(in_diffusers(diffusers, lora), in_theirs, made)
    check(in_comfyui(comfyui, zeros, lora, names), in_ours, made)


@pytest.mark.parametrize("key_format", ["default", "diffusers", "comfyui", "kohya"])
@pytest.mark.parametrize("spelling", ["every matrix, alphas", "diffusers", "musubi, pictures"])
def test_what_convert_writes_is_loaded_whole_by_its_program(
    tmp_path: Path, zeros: Path, comfyui: ComfyUI, diffusers: Diffusers, names: Names, spelling: str, key_format: str
) -> None:
    made = SPELLINGS[spelling]()
    lora = made.save(tmp_path)
    converted = tmp_path / "converted.safetensors"
    run("lora", "convert", lora, "-o", converted, "--key-format", key_format, folder=tmp_path)
    with open_lora(converted) as file:
        in_theirs, in_ours = loading(file)
    assert in_theirs.verdict == "whole" or key_format not in ("default", "diffusers")
    assert in_ours.verdict == "whole" or key_format == "diffusers"
    check(in_diffusers(diffusers, converted), in_theirs, made)
    check(in_comfyui(comfyui, zeros, converted, names), in_ours, made)


def test_what_diff_writes_is_the_difference_in_both_programs(
    tmp_path: Path, zeros: Path, comfyui: ComfyUI, diffusers: Diffusers, names: Names
) -> None:
    """A difference of rank 2 in every matrix and the embedder of patches, of which ``--full`` stores the latter for ComfyUI."""
    base, delta = values(1), {}
    for i, (name, tensor) in enumerate(base.items()):
        if tensor.ndim in (2, 5):
            generator = torch.Generator().manual_seed(i)
            up = torch.randn(len(tensor), 2, generator=generator)
            delta[name] = (up @ torch.randn(2, tensor[0].numel(), generator=generator) / 8).reshape(tensor.shape)
    variant = native({name: tensor + delta.get(name, 0) for name, tensor in base.items()}, names)
    save_file(base, tmp_path / "base.safetensors")
    save_file(
        {f"model.diffusion_model.{name}": tensor for name, tensor in variant.items()}, tmp_path / "variant.safetensors"
    )
    run("diff", "--base", "base.safetensors", "--variant", "variant.safetensors", "-o", "lora.safetensors", "--rank", "4", "--dtype", "fp32",
        "--min-dim", "1", "--full", "full.safetensors", folder=tmp_path)  # fmt: skip
    expected = {name: change.double().numpy() for name, change in delta.items()}
    patches = {"patch_embedding.weight": expected.pop("patch_embedding.weight")}
    lora = tmp_path / "lora.safetensors"
    for found in (in_comfyui(comfyui, zeros, lora, names), in_diffusers(diffusers, lora)):
        assert found is not None
        assert len(found) == len(expected) == 32
        assert agrees(found, expected, limit=2.0**-14) == expected.keys()
    with open_lora(lora) as file:
        assert [one.verdict for one in loading(file)] == ["whole", "whole"]
    full = in_comfyui(comfyui, zeros, tmp_path / "full.safetensors", names)
    assert agrees(full, patches, limit=2.0**-14) == full.keys() == patches.keys()


def test_factors_of_five_dimensions_are_resized(tmp_path: Path, zeros: Path, comfyui: ComfyUI, names: Names) -> None:
    made = written("diffusion_model.", FIVE_D, ranks=(4,))
    lora = made.save(tmp_path)
    run("lora", "resize", lora, "-o", "small.safetensors", "--rank", "2", folder=tmp_path)
    found = in_comfyui(comfyui, zeros, tmp_path / "small.safetensors", names)
    assert found.keys() == made.changes.keys()
    for name, change in made.changes.items():
        wanted, is_there = change.reshape(len(change), -1), found[name].reshape(len(change), -1)
        u, s, vt = np.linalg.svd(wanted, full_matrices=False)
        best = (u[:, :2] * s[:2]) @ vt[:2]
        assert np.abs(is_there - best).max() <= 2.0**-6 * np.abs(best).max(), name
    assert found["patch_embedding.weight"].shape == (DIM, 36, 1, 2, 2)
