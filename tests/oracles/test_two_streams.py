"""Families of two streams against the real ComfyUI and diffusers: names, files that are loaded, LoRAs that are added."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergetool.adapters.loaders import Loading, loading
from mergetool.adapters.lora_file import open_lora
from mergetool.arch import recognise
from tests.adapters import chroma, flux2, lumina2, qwen_image, sd3
from tests.adapters.matrix import agrees
from tests.adapters.spellings import Written
from tests.arch.tables import table
from tests.oracles import ComfyUI
from tests.oracles.comparing import read, run, unlike
from tests.oracles.diffusers import Diffusers
from tests.oracles.two_streams import Case, Changes, in_comfyui, places

CASES = {
    "Qwen-Image": qwen_image.CASE, "Chroma": chroma.CASE, "Flux.2": flux2.CASE, "SD3": sd3.CASE, "Lumina-Image 2": lumina2.CASE,
}  # fmt: skip
PUBLISHED = [(name, size) for name, case in CASES.items() for size in case.published]
SPELLINGS = [(name, spelling) for name, case in CASES.items() for spelling in case.spellings]
CONVERTED = [(name, spelling) for name, case in CASES.items() for spelling in case.converted]
WHOLE = "model.diffusion_model."


@pytest.fixture(scope="module")
def diffusers() -> Iterator[Diffusers]:
    with Diffusers("0.42.1") as process:
        yield process


# -- names -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size"), PUBLISHED)
def test_every_tensor_is_the_rows_that_diffusers_converter_takes(name: str, size: str) -> None:
    case = CASES[name]
    shapes = case.shapes("comfyui", case.published[size])
    anatomy = recognise(table(shapes), source=name)
    held = case.family.held(anatomy.parts, "diffusers")
    found = {}
    for tensor, parts in held.items():
        windows = [anatomy.parts[part].stored for part in parts]
        (stored,) = {window.tensor for window in windows}
        first, rows = min(window.row for window in windows), sum(window.rows for window in windows)
        found[tensor] = (stored, first, rows, windows[0].row > windows[-1].row)
    theirs = places(case.converter, shapes)
    assert found == {tensor: (at.tensor, at.row, at.rows, at.swapped) for tensor, at in theirs.items()}


@pytest.mark.parametrize("prefix", ["", WHOLE])
@pytest.mark.parametrize(("name", "size"), PUBLISHED)
def test_comfyui_takes_a_whole_model_by_its_names_and_shapes(
    comfyui: ComfyUI, name: str, size: str, prefix: str
) -> None:
    case = CASES[name]
    shapes = case.shapes("comfyui", case.published[size])
    answer = comfyui.ask("recognise", shapes={prefix + in_comfyui(n): list(shape) for n, shape in shapes.items()})
    count = len(shapes)
    assert answer == {"config": case.configs[size], "missing": [], "unexpected": [], "parameters": count, "log": []}


# -- models ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, case: Case) -> Path:
    """Three models: diffusers' names, a whole checkpoint with norms as the first release calls them, and ComfyUI's names."""
    folder = tmp_path_factory.mktemp("models")
    save_file(case.values(1), folder / "a.safetensors")
    released = {in_comfyui(name): name for name in case.shapes("comfyui")}
    whole = {f"{WHOLE}{released[name]}": tensor for name, tensor in case.native(case.values(2)).items()}
    save_file({**whole, "vae.decoder.conv_in.weight": torch.zeros(4, 4)}, folder / "b.safetensors")
    save_file(case.native(case.values(3)), folder / "c.safetensors")
    return folder


def in_float64(case: Case, seed: int) -> Changes:
    return {name: tensor.double().numpy() for name, tensor in case.values(seed).items()}


@pytest.mark.parametrize("layout", ["comfyui", "diffusers"])
def test_a_merge_across_layouts_and_prefixes_is_the_one_of_float64(
    tmp_path: Path, case: Case, models: Path, comfyui: ComfyUI, layout: str
) -> None:
    out = tmp_path / "m.safetensors"
    expression = "'a.safetensors' + 3/4 * ('b.safetensors' - 'c.safetensors')"
    run("merge", expression, "-o", out, "--layout", layout, folder=models)
    a, b, c = (in_float64(case, seed) for seed in (1, 2, 3))
    found = read(out)
    if layout == "comfyui":
        answer = comfyui.ask("load", model=out)
        assert (answer["missing"], answer["unexpected"], answer["log"]) == ([], [], [])
        assert answer["config"] == case.loaded_as
        comfyui.ask("weights", model=out, out=tmp_path / "loaded.safetensors")
        found = case.by_diffusers(read(tmp_path / "loaded.safetensors"))
    assert unlike(found, {name: a[name] + 0.75 * (b[name] - c[name]) for name in a}) == []


def test_a_layout_and_back_is_the_same_file(tmp_path: Path, case: Case, models: Path) -> None:
    run("convert", models / "c.safetensors", "-o", "there.safetensors", "--layout", "diffusers", folder=tmp_path)
    run("convert", "there.safetensors", "-o", "back.safetensors", "--layout", "comfyui", folder=tmp_path)
    assert load_file(tmp_path / "there.safetensors").keys() == case.shapes("diffusers").keys()
    back, first = load_file(tmp_path / "back.safetensors"), load_file(models / "c.safetensors")
    assert {in_comfyui(name) for name in back} == first.keys()
    assert all(torch.equal(tensor, first[in_comfyui(name)]) for name, tensor in back.items())


@pytest.mark.parametrize("quant", ["fp8-scaled", "int8", "nvfp4", "mxfp8"])
def test_comfyui_loads_quantised_blocks_and_the_rest_as_it_was(
    tmp_path: Path, case: Case, models: Path, comfyui: ComfyUI, quant: str
) -> None:
    out = tmp_path / "q.safetensors"
    run("convert", models / "a.safetensors", "-o", out, "--quant", quant, folder=tmp_path)
    answer = comfyui.ask("load", model=out)
    assert (answer["missing"], answer["unexpected"], answer["log"]) == ([], [], [])
    assert answer["config"] == case.loaded_as
    comfyui.ask("weights", model=out, out=tmp_path / "loaded.safetensors")
    found, wanted = case.by_diffusers(read(tmp_path / "loaded.safetensors")), in_float64(case, 1)
    quantised = {name for name in wanted if case.is_quantised(name)}
    for name, value in wanted.items():
        error = np.abs(found[name] - value).max()
        assert error <= (0.25 if name in quantised else 0) * np.abs(value).max(), name
    marked = {f"{name.removesuffix('.comfy_quant')}.weight" for name in load_file(out) if name.endswith(".comfy_quant")}
    assert marked == {case.places[name].tensor for name in quantised}


@pytest.mark.filterwarnings("ignore:.*FluxPosEmbed:FutureWarning")
def test_diffusers_loads_what_convert_writes(tmp_path: Path, case: Case, models: Path) -> None:
    import diffusers

    run("convert", models / "b.safetensors", "-o", f"{tmp_path}/transformer/", "--layout", "diffusers", "--prefix", "",
        "--bundled", "drop", folder=tmp_path)  # fmt: skip
    made = getattr(diffusers, case.model)
    model, said = made.from_pretrained(tmp_path / "transformer", output_loading_info=True)
    assert not any(said.values())
    assert {key: model.config[key] for key in case.config} == dict(case.config)
    loaded = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    assert unlike(loaded, in_float64(case, 2)) == []


# -- LoRAs -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def zeros(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of zeros of every family, in ComfyUI's layout."""
    folder = tmp_path_factory.mktemp("zeros")
    for name, case in CASES.items():
        tensors = {in_comfyui(tensor): torch.zeros(shape) for tensor, shape in case.shapes("comfyui").items()}
        save_file(tensors, folder / f"{name}.safetensors")
    return folder


def patched(comfyui: ComfyUI, case: Case, zeros: Path, lora: Path) -> Changes:
    """What ComfyUI adds to a model of zeros, by diffusers' names."""
    out = lora.with_name("comfyui.safetensors")
    comfyui.ask("patch", model=zeros / f"{case.family.name}.safetensors", lora=lora, out=out)
    return {name: value for name, value in case.by_diffusers(read(out)).items() if value.any()}


def check(case: Case, found: Changes | None, said: Loading, written: Written) -> None:
    """What a program did is what is said of it, and nothing else."""
    assert (found is None) == (said.error is not None), said
    dropped = {case.family.stored_name(part, "diffusers") for part in said.dropped}
    assert agrees(found or {}, written.changes, limit=2.0**-6) == set(written.changes) - dropped


@pytest.mark.parametrize(("name", "spelling"), SPELLINGS)
def test_loras_of_every_spelling_are_read_and_what_is_said_of_loaders_is_so(
    tmp_path: Path, zeros: Path, comfyui: ComfyUI, diffusers: Diffusers, name: str, spelling: str
) -> None:
    case = CASES[name]
    written = case.spellings[spelling]()
    lora = written.save(tmp_path)
    model = zeros / f"{name}.safetensors"
    run("lora", "bake", model, lora, "-o", "baked.safetensors", "--dtype", "fp32", "--force", folder=tmp_path)
    baked = case.by_diffusers({in_comfyui(n): value for n, value in read(tmp_path / "baked.safetensors").items()})
    assert agrees(baked, written.changes, limit=2.0**-19) == set(written.changes)
    assert {tensor for tensor, value in baked.items() if value.any()} == set(written.changes)
    with open_lora(lora) as file:
        assert file.family.loader == case.family.loader  # Chroma's names are Flux.1's
        assert not file.unmatched
        in_theirs, in_ours = loading(file)
    check(case, case.loaded(diffusers, lora), in_theirs, written)
    check(case, patched(comfyui, case, zeros, lora), in_ours, written)


@pytest.mark.parametrize("key_format", ["default", "diffusers", "comfyui", "kohya"])
@pytest.mark.parametrize(("name", "spelling"), CONVERTED)
def test_what_convert_writes_is_loaded_whole_by_its_program(
    tmp_path: Path, zeros: Path, comfyui: ComfyUI, diffusers: Diffusers, name: str, spelling: str, key_format: str
) -> None:
    case = CASES[name]
    written = case.spellings[spelling]()
    converted = tmp_path / "converted.safetensors"
    run("lora", "convert", written.save(tmp_path), "-o", converted, "--key-format", key_format, folder=tmp_path)
    if key_format != "diffusers" or not case.has_one_width:
        found = patched(comfyui, case, zeros, converted)
        assert agrees(found, written.changes, limit=2.0**-6) == found.keys() == set(written.changes)
    if key_format == "diffusers" or (key_format == "default" and not case.has_one_width):
        loaded = case.loaded(diffusers, converted)
        assert loaded is not None
        assert agrees(loaded, written.changes, limit=2.0**-6) == loaded.keys() == set(written.changes)


def test_a_resized_lora_is_its_strongest_directions(
    tmp_path: Path, case: Case, zeros: Path, comfyui: ComfyUI, diffusers: Diffusers
) -> None:
    written = case.spellings[case.converted[0]]()
    resized = tmp_path / "resized.safetensors"
    run("lora", "resize", written.save(tmp_path), "-o", resized, "--rank", "2", "--dtype", "fp32", folder=tmp_path)
    others = () if case.has_one_width else (case.loaded(diffusers, resized),)
    for found in (patched(comfyui, case, zeros, resized), *others):
        assert found is not None
        assert found.keys() == written.changes.keys()
        for name, change in written.changes.items():
            left, values, right = np.linalg.svd(change, full_matrices=False)
            best = (left[:, :2] * values[:2]) @ right[:2]
            assert np.linalg.norm(found[name] - change) <= np.linalg.norm(best - change) + 2.0**-12 * values[0], name


def test_what_diff_writes_is_the_difference_in_both_programs(
    tmp_path: Path, case: Case, zeros: Path, comfyui: ComfyUI, diffusers: Diffusers
) -> None:
    """A difference of rank 2 in every matrix: base and variant in different layouts."""
    base, delta = case.values(1), {}
    for i, (name, tensor) in enumerate(base.items()):
        if tensor.ndim == 2:
            generator = torch.Generator().manual_seed(i)
            up, down = (torch.randn(*shape, generator=generator) for shape in ((len(tensor), 2), (2, tensor.shape[1])))
            delta[name] = up @ down / 8
    variant = case.native({name: tensor + delta.get(name, 0) for name, tensor in base.items()})
    save_file(base, tmp_path / "base.safetensors")
    save_file({f"{WHOLE}{name}": tensor for name, tensor in variant.items()}, tmp_path / "variant.safetensors")
    run("diff", "--base", "base.safetensors", "--variant", "variant.safetensors", "-o", "lora.safetensors", "--rank", "4", "--dtype", "fp32",
        "--min-dim", "1", folder=tmp_path)  # fmt: skip
    expected = {name: change.double().numpy() for name, change in delta.items()}
    lora = tmp_path / "lora.safetensors"
    assert len(expected) == case.matrices
    mapped = case.mapped(expected)
    loaded = [(patched(comfyui, case, zeros, lora), mapped)]
    if not case.has_one_width:
        loaded.append((case.loaded(diffusers, lora), set(expected)))
    for found, wanted in loaded:
        assert found is not None
        assert agrees(found, expected, limit=2.0**-14) == found.keys() == wanted
    with open_lora(lora) as file:
        theirs, ours = (one.verdict for one in loading(file))
        assert theirs == ("not at all" if case.has_one_width else "whole")
        assert ours == ("whole" if mapped == expected.keys() else "partly")
