"""Every family against the real ComfyUI and diffusers: names, merges, files that are loaded, LoRAs that are added."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergetool.adapters.loaders import Loading, loading
from mergetool.adapters.lora_file import open_lora
from mergetool.arch import recognise
from tests.adapters.matrix import agrees
from tests.adapters.spellings import Written
from tests.arch.tables import table
from tests.oracles import ComfyUI
from tests.oracles.case import Case, Changes, Tensors, in_comfyui, places
from tests.oracles.comparing import decoded, misloaded, read, run, unlike
from tests.oracles.diffusers import Diffusers
from tests.oracles.families import CASES
from tests.oracles.test_comfyui_loading import half_a_step, option

PUBLISHED = [(name, size) for name, case in CASES.items() for size in case.published]
NAMED = [
    (name, size, layout, prefix)
    for name, size in PUBLISHED
    for layout, prefix in (
        ("comfyui", ""),
        ("comfyui", "model.diffusion_model."),
        *[("diffusers", "")] * CASES[name].renamed,
    )
]
"""The files that ComfyUI knows; of diffusers' names those without a prefix, in some families."""
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


@pytest.mark.parametrize(("name", "size", "layout", "prefix"), NAMED)
def test_comfyui_takes_a_whole_model_by_its_names_and_shapes(
    comfyui: ComfyUI, name: str, size: str, layout: str, prefix: str
) -> None:
    case = CASES[name]
    shapes = {in_comfyui(n): list(shape) for n, shape in case.shapes(layout, case.published[size]).items()}
    answer = comfyui.ask("recognise", shapes={prefix + n: shape for n, shape in shapes.items()})
    count = len(case.shapes("comfyui", case.published[size]))
    assert answer == {"config": case.configs[size], "missing": [], "unexpected": [], "parameters": count, "log": []}


# -- models ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, case: Case) -> Path:
    """Three models in bf16 and as many spellings, each of them also as ComfyUI calls its tensors, in float32.

    ``a`` is a whole checkpoint with norms as the first release calls them, ``b`` has diffusers' names, ``base`` ComfyUI's under another prefix.
    """
    folder = tmp_path_factory.mktemp("models")
    for name, state in tunes(case).items():
        save_file(case.native(state), folder / f"{name}-native.safetensors")
    a, b, base = ({name: t.bfloat16() for name, t in state.items()} for state in tunes(case).values())
    released = {in_comfyui(name): name for name in case.shapes("comfyui")}
    whole = {f"{WHOLE}{released[name]}": tensor for name, tensor in case.native(a).items()}
    save_file({**whole, "vae.decoder.conv_in.weight": torch.zeros(4, 4)}, folder / "a.safetensors")
    save_file(b, folder / "b.safetensors")
    save_file({f"diffusion_model.{n}": tensor for n, tensor in case.native(base).items()}, folder / "base.safetensors")
    return folder


MERGE = "base + (a - base) * 1.7 + (b - base) * -0.4"


def tunes(case: Case) -> dict[str, Tensors]:
    """Values whose `MERGE` is no closer than 2^-21 to the middle between two numbers of bf16, so that float64 and float32 round it alike.

    All are integers by 64; the result is one, m, by 640. A middle is a number by 2^18 at most, and as far as 1/5 of that from m / 640 where 5 does not divide m.
    """
    a, b, base = (case.values(seed) for seed in (1, 2, 3))
    for name, tensor in b.items():
        m = (17 * a[name] - 4 * tensor - 3 * base[name]) * 64
        tensor += torch.where(m % 5 == 0, torch.where(tensor < 0, 1, -1), 0) / 64
    return {"a": a, "b": b, "base": base}


def merged(case: Case) -> Changes:
    """What `MERGE` is in float64, rounded once."""
    a, b, base = ({name: tensor.double() for name, tensor in state.items()} for state in tunes(case).values())
    found = {name: base[name] + (a[name] - base[name]) * 1.7 + (b[name] - base[name]) * -0.4 for name in a}
    return {name: value.bfloat16().double().numpy() for name, value in found.items()}


@pytest.mark.parametrize("layout", ["comfyui", "diffusers"])
def test_a_merge_of_three_spellings_is_the_one_of_float64_bit_for_bit(
    tmp_path: Path, case: Case, models: Path, comfyui: ComfyUI, layout: str
) -> None:
    out = tmp_path / "m.safetensors"
    expression = re.sub(r"[a-z]+", lambda word: f"'{word[0]}.safetensors'", MERGE)
    run("merge", expression, "-o", out, "--layout", layout, "--prefix", "", "--force", folder=models)
    assert {tensor.dtype for tensor in load_file(out).values()} == {torch.bfloat16}
    found = read(out)
    if layout == "comfyui":
        assert (
            misloaded(comfyui, out, {in_comfyui(n): value for n, value in found.items()}, config=case.loaded_as) == []
        )
        found = case.by_diffusers(read(tmp_path / "m-comfyui.safetensors"))
    assert unlike(found, merged(case)) == []


def test_comfyuis_own_nodes_make_the_same_merge(tmp_path: Path, case: Case, models: Path, comfyui: ComfyUI) -> None:
    a, b, base = (str(models / f"{name}-native.safetensors") for name in ("a", "b", "base"))
    operations = [
        ["ModelMergeSubtract", a, base, 1.7],
        ["ModelMergeSubtract", b, base, -0.4],
        ["ModelMergeAdd", base, 0],
        ["ModelMergeAdd", 2, 1],
    ]
    comfyui.ask("merge", out=tmp_path / "theirs.safetensors", operations=operations)
    saved = {
        in_comfyui(name.removeprefix(WHOLE)): tensor.bfloat16().double().numpy()
        for name, tensor in load_file(tmp_path / "theirs.safetensors").items()
    }
    expected = merged(case) | {name: value for name, value in in_float64(case, 3).items() if name in case.unmerged}
    assert unlike(case.by_diffusers(saved), expected) == []


def in_float64(case: Case, seed: int) -> Changes:
    return {name: tensor.double().numpy() for name, tensor in case.values(seed).items()}


def test_a_layout_and_back_is_the_same_file(tmp_path: Path, case: Case, models: Path) -> None:
    run(
        "convert",
        models / "base-native.safetensors",
        "-o",
        "there.safetensors",
        "--layout",
        "diffusers",
        folder=tmp_path,
    )
    run("convert", "there.safetensors", "-o", "back.safetensors", "--layout", "comfyui", folder=tmp_path)
    assert load_file(tmp_path / "there.safetensors").keys() == case.shapes("diffusers").keys()
    back, first = load_file(tmp_path / "back.safetensors"), load_file(models / "base-native.safetensors")
    assert {in_comfyui(name) for name in back} == first.keys()
    assert all(torch.equal(tensor, first[in_comfyui(name)]) for name, tensor in back.items())


@pytest.mark.parametrize(
    "stored", ["fp8-scaled", "nvfp4", *(pytest.param(quant, marks=pytest.mark.long) for quant in ("int8", "mxfp8"))]
)
def test_comfyui_loads_quantised_blocks_and_the_rest_as_it_was(
    tmp_path: Path, case: Case, models: Path, comfyui: ComfyUI, stored: str
) -> None:
    """It loads what mergetool reads, within half a step of the source."""
    out, source = tmp_path / "q.safetensors", models / "a-native.safetensors"
    run("convert", source, "-o", out, *option(stored), folder=tmp_path)
    ours = {in_comfyui(name): value for name, value in decoded(out, tmp_path).items()}
    assert misloaded(comfyui, out, ours, config=case.loaded_as) == []
    wanted = read(source)
    quantised = {case.places[name].tensor for name in case.shapes("diffusers") if case.is_quantised(name)}
    allowed = {name: step if name in quantised else np.array(0) for name, step in half_a_step(stored, wanted).items()}
    assert unlike(ours, wanted, allowed) == []
    marked = {f"{name.removesuffix('.comfy_quant')}.weight" for name in load_file(out) if name.endswith(".comfy_quant")}
    assert marked == quantised


@pytest.mark.filterwarnings("ignore:.*FluxPosEmbed:FutureWarning")
def test_diffusers_loads_what_convert_writes(tmp_path: Path, case: Case, models: Path) -> None:
    import diffusers

    run("convert", models / "a.safetensors", "-o", f"{tmp_path}/transformer/", "--layout", "diffusers", "--prefix", "",
        "--bundled", "drop", folder=tmp_path)  # fmt: skip
    made = getattr(diffusers, case.model)
    model, said = made.from_pretrained(tmp_path / "transformer", output_loading_info=True)
    assert not any(said.values())
    assert {key: model.config[key] for key in case.config} == dict(case.config)
    loaded = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    assert unlike(loaded, in_float64(case, 1)) == []


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
    found = patched(comfyui, case, zeros, converted)
    if key_format == "diffusers":
        with open_lora(converted) as file:
            check(case, found, loading(file)[1], written)
    else:
        assert agrees(found, written.changes, limit=2.0**-6) == found.keys() == set(written.changes)
    if key_format == "diffusers" or (key_format == "default" and not case.has_one_width):
        loaded = case.loaded(diffusers, converted)
        assert loaded is not None
        assert agrees(loaded, written.changes, limit=2.0**-6) == loaded.keys() == set(written.changes)


@pytest.mark.parametrize("name", dict(CONVERTED))
def test_a_resized_lora_is_its_strongest_directions(
    tmp_path: Path, zeros: Path, comfyui: ComfyUI, diffusers: Diffusers, name: str
) -> None:
    case = CASES[name]
    written = case.spellings[case.resized or case.converted[0]]()
    resized = tmp_path / "resized.safetensors"
    run("lora", "resize", written.save(tmp_path), "-o", resized, "--rank", "2", "--dtype", "fp32", folder=tmp_path)
    others = () if case.has_one_width or case.resized else (case.loaded(diffusers, resized),)
    for found in (patched(comfyui, case, zeros, resized), *others):
        assert found is not None
        assert found.keys() == written.changes.keys()
        for name, change in written.changes.items():
            matrix = change.reshape(len(change), -1)
            left, values, right = np.linalg.svd(matrix, full_matrices=False)
            best = (left[:, :2] * values[:2]) @ right[:2]
            assert (
                np.linalg.norm(found[name].reshape(matrix.shape) - matrix)
                <= np.linalg.norm(best - matrix) + 2.0**-12 * values[0]
            ), name


def test_what_diff_writes_is_the_difference_in_both_programs(
    tmp_path: Path, case: Case, zeros: Path, comfyui: ComfyUI, diffusers: Diffusers
) -> None:
    """A difference of rank 2 in every matrix: base and variant in different layouts. What no LoRA holds is in a file for ComfyUI."""
    base, delta = case.values(1), {}
    for i, (name, tensor) in enumerate(base.items()):
        if tensor.ndim in case.dimensions and name.endswith(".weight"):
            generator = torch.Generator().manual_seed(i)
            up, down = (
                torch.randn(*shape, generator=generator) for shape in ((len(tensor), 2), (2, tensor[0].numel()))
            )
            delta[name] = (up @ down / 8).reshape(tensor.shape)
    variant = case.native({name: tensor + delta.get(name, 0) for name, tensor in base.items()})
    save_file(base, tmp_path / "base.safetensors")
    save_file({f"{WHOLE}{name}": tensor for name, tensor in variant.items()}, tmp_path / "variant.safetensors")
    full = ["--full", "full.safetensors"] * bool(case.in_full)
    run("diff", "--base", "base.safetensors", "--variant", "variant.safetensors", "-o", "lora.safetensors", "--rank", "4", "--dtype", "fp32",
        "--min-dim", "1", *full, folder=tmp_path)  # fmt: skip
    expected = {name: change.double().numpy() for name, change in delta.items()}
    whole = {name: expected.pop(name) for name in case.in_full}
    lora = tmp_path / "lora.safetensors"
    assert len(expected) == case.matrices
    mapped = case.mapped(expected)
    loaded = [(patched(comfyui, case, zeros, lora), mapped)]
    if not case.has_one_width:
        loaded.append((case.loaded(diffusers, lora), set(expected)))
    for found, wanted in loaded:
        assert found is not None
        assert agrees(found, expected, limit=2.0**-14) == found.keys() == wanted
    if whole:
        found = patched(comfyui, case, zeros, tmp_path / "full.safetensors")
        assert agrees(found, whole, limit=2.0**-14) == found.keys() == whole.keys()
    with open_lora(lora) as file:
        theirs, *_, ours = (one.verdict for one in loading(file))
        assert theirs == ("not at all" if case.has_one_width else "whole")
        assert ours == ("whole" if mapped == expected.keys() else "partly")
