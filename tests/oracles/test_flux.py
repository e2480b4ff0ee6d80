"""Flux.1 against the real ComfyUI and diffusers: names, files that are loaded, LoRAs that are added."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergetool.adapters.loaders import Loading, loading
from mergetool.adapters.lora_file import open_lora
from mergetool.arch import recognise
from mergetool.arch.families.flux import DEV, FLUX
from tests.adapters.flux import DIFFUSERS, SMALL, SPELLINGS
from tests.adapters.matrix import Changes, agrees
from tests.adapters.spellings import Written
from tests.arch.tables import table
from tests.oracles import ComfyUI, RefusedError
from tests.oracles.comparing import read, run, unlike
from tests.oracles.diffusers import Diffusers

Map = dict[str, list[Any]]


@pytest.fixture(scope="module")
def names(comfyui: ComfyUI) -> dict[str, Map]:
    """ComfyUI's own map of diffusers' names, for a model of the published and of a small size."""
    found = {}
    for size, sizes in (("dev", DEV), ("small", SMALL)):
        config = {
            "hidden_size": sizes["dim"],
            "depth": sizes["transformer_blocks"],
            "depth_single_blocks": sizes["single_transformer_blocks"],
        }
        found[size] = comfyui.ask("diffusers_names", function="flux_to_diffusers", config=config)["names"]
    return found


@pytest.fixture(scope="module")
def diffusers() -> Iterator[Diffusers]:
    with Diffusers("0.42.1") as process:
        yield process


def native(state: dict[str, torch.Tensor], names: Map) -> dict[str, torch.Tensor]:
    """A model in diffusers' names under ComfyUI's, as ComfyUI's map says."""
    shapes = FLUX.shapes(SMALL, "comfyui")
    found = {name.replace("_norm.scale", "_norm.weight"): torch.zeros(shape) for name, shape in shapes.items()}
    for name, tensor in state.items():
        target, start, rows, swapped = names[name]
        value = torch.cat(tensor.chunk(2)[::-1]) if swapped else tensor
        found[target][start or 0 : (start or 0) + (rows or len(tensor))] = value
    return found


def by_diffusers(state: Changes, names: Map) -> Changes:
    """The same the other way."""
    found = {}
    for name in FLUX.shapes(SMALL, "diffusers"):
        target, start, rows, swapped = names[name]
        value = state[target][start or 0 :][: rows or None]
        found[name] = np.concatenate(np.split(value, 2)[::-1]) if swapped else value
    return found


def values(seed: int) -> dict[str, torch.Tensor]:
    """A small model under diffusers' names, of multiples of 1/64 below 2: sums of a few are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(-127, 128, shape, generator=generator).float() / 64
        for name, shape in FLUX.shapes(SMALL, "diffusers").items()
    }


def test_every_name_that_comfyui_maps_means_the_same_rows(names: dict[str, Map]) -> None:
    anatomy = recognise(table(FLUX.shapes(DEV, "comfyui")), source="f")
    for name, held in FLUX.held(anatomy.parts, "diffusers").items():
        target, start, rows, swapped = names["dev"][name]
        windows = [anatomy.parts[part].stored for part in held]
        assert {one.tensor.replace("_norm.scale", "_norm.weight") for one in windows} == {target}
        first, count = min(one.row for one in windows), sum(one.rows for one in windows)
        whole = FLUX.shapes(DEV, "comfyui")[windows[0].tensor][0]
        assert (first, count) == (start or 0, rows or whole)
        assert (windows[0].row > windows[-1].row) == swapped


@pytest.mark.parametrize(  # of diffusers' names it converts those without a prefix alone
    ("layout", "prefix"), [("comfyui", ""), ("comfyui", "model.diffusion_model."), ("diffusers", "")]
)
@pytest.mark.parametrize(("size", "config"), [({}, "Flux"), ({"patch_in": 384}, "FluxInpaint"), ({"guidance": None}, "FluxSchnell")], ids=["dev", "Fill", "schnell"])  # fmt: skip
def test_comfyui_takes_a_whole_flux_by_its_names_and_shapes(
    comfyui: ComfyUI, size: dict[str, int | None], config: str, layout: str, prefix: str
) -> None:
    sizes = {name: value for name, value in {**DEV, **size}.items() if value is not None}
    shapes = {prefix + name: list(shape) for name, shape in FLUX.shapes(sizes, layout).items()}
    answer = comfyui.ask("recognise", shapes={n.replace("_norm.scale", "_norm.weight"): s for n, s in shapes.items()})
    count = len(FLUX.shapes(sizes, "comfyui"))
    assert answer == {"config": config, "missing": [], "unexpected": [], "parameters": count, "log": []}


# -- models ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory, names: dict[str, Map]) -> Path:
    """Three models: diffusers' names, Black Forest Labs' in a whole checkpoint, and ComfyUI's, which calls norms otherwise."""
    folder = tmp_path_factory.mktemp("flux")
    save_file(values(1), folder / "a.safetensors")
    bfl = {
        f"model.diffusion_model.{name.replace('_norm.weight', '_norm.scale')}": tensor
        for name, tensor in native(values(2), names["small"]).items()
    }
    save_file({**bfl, "vae.decoder.conv_in.weight": torch.zeros(4, 4)}, folder / "b.safetensors")
    save_file(native(values(3), names["small"]), folder / "c.safetensors")
    return folder


@pytest.mark.parametrize("layout", FLUX.layouts)
def test_a_merge_across_layouts_and_prefixes_is_the_one_of_float64(
    tmp_path: Path, family: Path, comfyui: ComfyUI, names: dict[str, Map], layout: str
) -> None:
    out = tmp_path / "m.safetensors"
    run(
        "merge",
        "'a.safetensors' + 3/4 * ('b.safetensors' - 'c.safetensors')",
        "-o",
        out,
        "--layout",
        layout,
        folder=family,
    )
    a, b, c = ({name: tensor.double().numpy() for name, tensor in values(seed).items()} for seed in (1, 2, 3))
    expected = {name: a[name] + 0.75 * (b[name] - c[name]) for name in a}
    found = read(out)
    if layout == "comfyui":
        answer = comfyui.ask("load", model=out)
        assert (answer["missing"], answer["unexpected"], answer["log"], answer["config"]) == ([], [], [], "Flux")
        comfyui.ask("weights", model=out, out=tmp_path / "loaded.safetensors")
        found = by_diffusers(read(tmp_path / "loaded.safetensors"), names["small"])
    assert unlike(found, expected) == []


@pytest.mark.parametrize("quant", ["fp8-scaled", "int8", "nvfp4", "mxfp8"])
def test_comfyui_loads_quantised_blocks_and_the_rest_as_it_was(
    tmp_path: Path, family: Path, comfyui: ComfyUI, names: dict[str, Map], quant: str
) -> None:
    out = tmp_path / "q.safetensors"
    run("convert", family / "a.safetensors", "-o", out, "--quant", quant, folder=tmp_path)
    answer = comfyui.ask("load", model=out)
    assert (answer["missing"], answer["unexpected"], answer["log"], answer["config"]) == ([], [], [], "Flux")
    comfyui.ask("weights", model=out, out=tmp_path / "loaded.safetensors")
    found, wanted = by_diffusers(read(tmp_path / "loaded.safetensors"), names["small"]), values(1)
    quantised = {name for name in wanted if "transformer_blocks." in name and wanted[name].ndim == 2}
    for name, value in wanted.items():
        error = np.abs(found[name] - value.double().numpy()).max()
        assert error <= (0.25 if name in quantised else 0) * float(value.abs().max()), name
    marked = {f"{name.removesuffix('.comfy_quant')}.weight" for name in load_file(out) if name.endswith(".comfy_quant")}
    assert marked == {names["small"][name][0] for name in quantised}


def test_diffusers_loads_what_convert_writes(tmp_path: Path, family: Path) -> None:
    from diffusers import FluxTransformer2DModel

    run(
        "convert",
        family / "b.safetensors",
        "-o",
        f"{tmp_path}/transformer/",
        "--layout",
        "diffusers",
        "--prefix",
        "",
        "--bundled",
        "drop",
        folder=tmp_path,
    )
    model, said = FluxTransformer2DModel.from_pretrained(tmp_path / "transformer", output_loading_info=True)
    assert not any(said.values())
    assert unlike({name: tensor.double().numpy() for name, tensor in model.state_dict().items()},
                  {name: tensor.double().numpy() for name, tensor in values(2).items()}) == []  # fmt: skip


# -- LoRAs -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zeros(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zeros") / "zeros.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in FLUX.shapes(SMALL, "comfyui").items()}, path)
    return path


def in_comfyui(comfyui: ComfyUI, zeros: Path, lora: Path, names: Map) -> Changes:
    """What ComfyUI adds to a model of zeros, by diffusers' names."""
    out = lora.with_name("comfyui.safetensors")
    comfyui.ask("patch", model=zeros, lora=lora, out=out)
    return {name: value for name, value in by_diffusers(read(out), names).items() if value.any()}


def in_diffusers(diffusers: Diffusers, lora: Path, config: dict[str, Any] = DIFFUSERS) -> Changes | None:
    """The same of diffusers; None where it raises an error."""
    out = lora.with_name("diffusers.safetensors")
    asked = {"pipeline": "FluxPipeline", "model": "FluxTransformer2DModel", "config": config}
    try:
        diffusers.ask("load", lora=lora.parent, name=lora.name, out=out, **asked)
    except RefusedError:
        return None
    return read(out)


def stored(parts: set[str]) -> set[str]:
    """The parameters of diffusers that hold parts."""
    return {FLUX.stored_name(part, "diffusers") for part in parts}


def claimed(found: Loading, written: Written) -> set[str]:
    return set(written.changes) - stored(set(found.dropped))


def check(found: Changes | None, said: Loading, written: Written) -> None:
    """What a program did is what is said of it, and nothing else."""
    assert (found is None) == (said.error is not None)
    assert agrees(found or {}, written.changes, limit=2.0**-6) == claimed(said, written)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_loras_of_every_spelling_are_read_and_what_is_said_of_loaders_is_so(
    tmp_path: Path, zeros: Path, comfyui: ComfyUI, diffusers: Diffusers, names: dict[str, Map], spelling: str
) -> None:
    written = SPELLINGS[spelling]()
    lora = written.save(tmp_path)
    run("lora", "bake", zeros, lora, "-o", "baked.safetensors", "--dtype", "fp32", "--force", folder=tmp_path)
    baked = by_diffusers(
        {n.replace("_norm.scale", "_norm.weight"): v for n, v in read(tmp_path / "baked.safetensors").items()},
        names["small"],
    )
    assert agrees(baked, written.changes, limit=2.0**-19) == set(written.changes)
    assert {name for name, value in baked.items() if value.any()} == set(written.changes)
    with open_lora(lora) as file:
        assert file.family is FLUX
        assert not file.unmatched
        in_theirs, in_ours = loading(file)
    check(in_diffusers(diffusers, lora), in_theirs, written)
    check(in_comfyui(comfyui, zeros, lora, names["small"]), in_ours, written)


@pytest.mark.parametrize("key_format", ["default", "diffusers", "comfyui", "kohya"])
@pytest.mark.parametrize("spelling", ["diffusers, alphas", "ai-toolkit, native", "OneTrainer, attention"])
def test_what_convert_writes_is_loaded_whole_by_its_program(
    tmp_path: Path,
    zeros: Path,
    comfyui: ComfyUI,
    diffusers: Diffusers,
    names: dict[str, Map],
    spelling: str,
    key_format: str,
) -> None:
    written = SPELLINGS[spelling]()
    lora = written.save(tmp_path)
    converted = tmp_path / "converted.safetensors"
    run("lora", "convert", lora, "-o", converted, "--key-format", key_format, folder=tmp_path)
    found = in_comfyui(comfyui, zeros, converted, names["small"])
    assert agrees(found, written.changes, limit=2.0**-6) == found.keys() == set(written.changes)
    if key_format in ("default", "diffusers"):
        loaded = in_diffusers(diffusers, converted)
        assert loaded is not None
        assert agrees(loaded, written.changes, limit=2.0**-6) == loaded.keys() == set(written.changes)


def test_what_diff_writes_is_the_difference_in_both_programs(
    tmp_path: Path, zeros: Path, comfyui: ComfyUI, diffusers: Diffusers, names: dict[str, Map]
) -> None:
    """A difference of rank 2 in every matrix: base and variant in different layouts."""
    base, delta = values(1), {}
    for i, (name, tensor) in enumerate(base.items()):
        if tensor.ndim == 2:
            generator = torch.Generator().manual_seed(i)
            delta[name] = (
                torch.randn(len(tensor), 2, generator=generator)
                @ torch.randn(2, tensor.shape[1], generator=generator)
                / 8
            )
    variant = native({name: tensor + delta.get(name, 0) for name, tensor in base.items()}, names["small"])
    save_file(base, tmp_path / "base.safetensors")
    save_file(
        {f"model.diffusion_model.{name}": tensor for name, tensor in variant.items()}, tmp_path / "variant.safetensors"
    )
    run("diff", "--base", "base.safetensors", "--variant", "variant.safetensors", "-o", "lora.safetensors", "--rank", "4", "--dtype", "fp32",
        "--min-dim", "1", folder=tmp_path)  # fmt: skip
    expected = {name: change.double().numpy() for name, change in delta.items()}
    lora = tmp_path / "lora.safetensors"
    for found in (in_comfyui(comfyui, zeros, lora, names["small"]), in_diffusers(diffusers, lora)):
        assert found is not None
        assert len(found) == len(expected) == 36
        assert agrees(found, expected, limit=2.0**-14) == expected.keys()
    with open_lora(lora) as file:
        assert [one.verdict for one in loading(file)] == ["whole", "whole"]
