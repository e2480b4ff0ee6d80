"""Models with other inputs or added modules beside plain ones: what is padded and carried, in any order of the terms, against float64."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergetool
from mergetool.arch.families.flux import FLUX
from mergetool.arch.families.sd3 import SD3
from mergetool.arch.families.wan import WAN
from mergetool.arch.known import KnownFamily
from mergetool.difference.extract import open_diff
from mergetool.engine import job
from mergetool.errors import FamilyError, UsageError
from mergetool.options.differences import DiffOptions
from mergetool.options.merging import MergeOptions
from mergetool.recipe.plan import Plan
from tests import sdxl
from tests.adapters import wan
from tests.oracles import ComfyUI
from tests.oracles.comparing import read

Tensors = dict[str, torch.Tensor]
WAN_SIZES: Mapping[str, int] = {
    "dim": 128,
    "hidden": 128,
    "input": 16,
    "output": 64,
    "text": 64,
    "frequencies": 256,
    "blocks": 2,
}
VACE: Mapping[str, int] = {"vace": 128, "vace_input": 96, "vace_blocks": 1}
FLUX_SIZES: Mapping[str, int] = {
    "dim": 32, "head": 16, "hidden": 128, "patch_in": 64, "patch_out": 64, "context": 16, "pooled": 16, "guidance": 32,
    "transformer_blocks": 1, "single_transformer_blocks": 1,
}  # fmt: skip
SD3_SIZES: Mapping[str, int] = {
    "dim": 64, "channels": 16, "output": 64, "context": 32, "pooled": 32, "positions": 4, "head": 16, "transformer_blocks": 2,
}  # fmt: skip
FAMILIES: Mapping[str, tuple[KnownFamily, Mapping[str, int], Mapping[str, int], str]] = {
    "Flux Fill": (FLUX, FLUX_SIZES, {"patch_in": 384}, "img_in.weight"),
    "Wan I2V": (WAN, WAN_SIZES, {"input": 36, "added": 128, "image": 64, "pictured": 128}, "patch_embedding.weight"),
    "SD3 with a mask": (SD3, SD3_SIZES, {"channels": 33}, "x_embedder.proj.weight"),
}
"""The family, the sizes of a plain model and what is other in the wide one, and the tensor that is wide."""


def numbers(shapes: Mapping[str, tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    """Multiples of 1/64 below 1, of which BF16 holds every one and float32 every sum of a few."""
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randint(-63, 64, shape, generator=generator) / 64).to(dtype) for name, shape in shapes.items()}


def made(text: str, **options: Any) -> Tensors:
    mergetool.merge(text, "out.safetensors", overwrite=True, force=True, **options)
    return load_file("out.safetensors")


def planned(text: str, **options: Any) -> Plan:
    with job.open_merge(text, MergeOptions(**options), fingerprints=False) as plan:
        return plan


def padded(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(like.shape, dtype=torch.float64)
    out[tuple(slice(size) for size in value.shape)] = value.double()
    return out


def expected(tune: Tensors, wide: Tensors, base: Tensors, factor: float) -> Tensors:
    """``tune + factor * (wide - base)`` in float64; what ``wide`` alone has, as it is."""
    return {
        name: padded(tune[name], value) + factor * (value.double() - padded(base[name], value))
        if name in tune
        else value.double()
        for name, value in wide.items()
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def three(family: KnownFamily, plain: Mapping[str, int], other: Mapping[str, int]) -> tuple[Tensors, Tensors, Tensors]:
    """Files ``tune``, ``wide`` and ``base``, and their tensors."""
    sizes = [plain, {**plain, **other}, plain]
    models = [numbers(family.shapes(family.derived(dict(size)), "comfyui"), seed) for seed, size in enumerate(sizes)]
    for name, tensors in zip(("tune", "wide", "base"), models, strict=True):
        save_file(tensors, f"{name}.safetensors")
    tune, wide, base = models
    return tune, wide, base


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_wide_models_tune_is_the_same_in_either_order(folder: Path, kind: str) -> None:
    family, plain, other, tensor = FAMILIES[kind]
    tune, wide, base = three(family, plain, other)
    found = made("'tune.safetensors' + ('wide.safetensors' - 'base.safetensors')")
    turned = made("'wide.safetensors' + ('tune.safetensors' - 'base.safetensors')")
    assert found.keys() == turned.keys() == wide.keys()
    assert all(found[name].equal(turned[name]) for name in found)
    assert found[tensor].shape == wide[tensor].shape != tune[tensor].shape
    for name, value in expected(tune, wide, base, 1).items():
        assert found[name].double().equal(value), name


@pytest.fixture(scope="module")
def unets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors, Tensors, Tensors]:
    """A folder with an SDXL tune, an inpainting model and their base, in diffusers' names as ComfyUI's files are not."""
    folder = tmp_path_factory.mktemp("unets")
    models = []
    for seed, (name, channels) in enumerate((("tune", 4), ("wide", 9), ("base", 4))):
        config = {**sdxl.SMALL, "in_channels": channels}
        models.append(numbers(sdxl.shapes(config), seed, torch.bfloat16))
        sdxl.checkpoint(folder / f"{name}.safetensors", models[-1], prefix=sdxl.UNET)
    tune, wide, base = models
    return folder, tune, wide, base


@pytest.mark.parametrize("factor", ["1", "0.5", "-0.3 * -7"])
def test_any_order_and_spelling_gives_the_same_bytes(folder: Path, factor: str) -> None:
    tune, wide, base = three(FLUX, FLUX_SIZES, {"patch_in": 384})
    plus, minus = f"{factor} * 'wide.safetensors'", f"{factor} * 'base.safetensors'"
    texts = [
        f"'tune.safetensors' + {factor} * ('wide.safetensors' - 'base.safetensors')",
        f"'tune.safetensors' - {factor} * ('base.safetensors' - 'wide.safetensors')",
        f"{plus} - {minus} + 'tune.safetensors'",
        f"{plus} + 'tune.safetensors' - {minus}",
        f"'tune.safetensors' + {plus} - {minus}",
    ]
    first, *others = [made(text, dtype="fp32") for text in texts]
    assert all(
        other.keys() == first.keys() and all(other[name].equal(first[name]) for name in first) for other in others
    )
    exact = expected(tune, wide, base, 2.1 if "*" in factor else float(factor))["img_in.weight"]
    torch.testing.assert_close(first["img_in.weight"].double(), exact, rtol=0, atol=2**-20 if "*" in factor else 0)


def test_the_padding_is_said_before_the_run(
    unets: tuple[Path, Tensors, Tensors, Tensors], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(unets[0])
    plan = planned("'tune.safetensors' + 0.5*('wide.safetensors' - 'base.safetensors')")
    (padding,) = plan.padded
    assert (padding.models, padding.wider) == (("tune.safetensors", "base.safetensors"), ("wide.safetensors",))
    assert (padding.shape, padding.to, padding.factor) == ((32, 4, 3, 3), (32, 9, 3, 3), Fraction(1, 2))
    assert str(padding) in plan.warnings
    assert "input_blocks.0.0.weight" in str(padding)
    kept = planned("'tune.safetensors' + ('wide.safetensors' - 'base.safetensors')", exclude=("conv_in",))
    assert kept.padded == ()
    assert dict(kept.header.tensors)[f"{sdxl.UNET}input_blocks.0.0.weight"].shape == (32, 4, 3, 3)


@pytest.mark.parametrize(
    "text",
    [
        "'tune.safetensors' - ('wide.safetensors' - 'base.safetensors')",  # the further channels of no model
        "'wide.safetensors' + ('tune.safetensors' - 'wide.safetensors')*0.5 + 0.5*('base.safetensors' - 'wide.safetensors')",
        "'wide.safetensors' + ('eight.safetensors' - 'base.safetensors')",  # a mask in the place of a picture
        "0.5*'wide.safetensors' + 0.5*'eight.safetensors'",
    ],
)
def test_other_widths_are_refused(
    unets: tuple[Path, Tensors, Tensors, Tensors], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.chdir(unets[0])
    if "eight" in text and not Path("eight.safetensors").exists():
        eight = {**unets[1], "conv_in.weight": torch.ones(32, 8, 3, 3)}
        sdxl.checkpoint(Path("eight.safetensors"), eight, prefix=sdxl.UNET)
    with pytest.raises((FamilyError, UsageError), match=r'"conv_in\.weight" has shape|could be a change'):
        planned(text)


def test_a_model_that_takes_what_it_does_not_make_is_no_plain_one(folder: Path) -> None:
    """Wan 2.2's 5B has 48 channels of another VAE: they are nothing that lies behind those of 16."""
    three(WAN, {**WAN_SIZES, "input": 20}, {"input": 48})
    with pytest.raises(FamilyError, match=r'"patch_embedding\.weight" has shape'):
        planned("'tune.safetensors' + ('wide.safetensors' - 'base.safetensors')")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.float64])
def test_padded_rows_are_read_from_every_float(folder: Path, dtype: torch.dtype) -> None:
    tune, wide, base = three(FLUX, FLUX_SIZES, {"patch_in": 128})
    save_file({name: value.to(dtype) for name, value in tune.items()}, "tune.safetensors")
    found = made("'tune.safetensors' + ('wide.safetensors' - 'base.safetensors')", dtype="fp32")
    exact = expected({name: value.to(dtype) for name, value in tune.items()}, wide, base, 1)
    assert found["img_in.weight"].double().equal(exact["img_in.weight"])


def test_a_lora_of_the_plain_model_is_padded_too(folder: Path) -> None:
    tune, wide, base = three(FLUX, FLUX_SIZES, {"patch_in": 128})
    up, down = numbers({"up": (32, 2), "down": (2, 64)}, 9).values()
    save_file(
        {"diffusion_model.img_in.lora_B.weight": up, "diffusion_model.img_in.lora_A.weight": down}, "lora.safetensors"
    )
    found = made("'tune.safetensors' + ('wide.safetensors' - 'base.safetensors') + lora('lora.safetensors')")
    exact = expected(tune, wide, base, 1)["img_in.weight"]
    exact[:, :64] += up.double() @ down.double()
    torch.testing.assert_close(found["img_in.weight"].double(), exact, rtol=0, atol=2**-22)


def test_a_quantised_tune_meets_the_wide_model(folder: Path) -> None:
    """Its own elements as their codes mean them, also where the input embedder has codes."""
    tune, wide, base = three(FLUX, FLUX_SIZES, {"patch_in": 128})
    codes = tune["img_in.weight"].to(torch.float8_e4m3fn)
    scaled = {"img_in.weight": codes, "img_in.weight_scale": torch.tensor(0.5)}
    marker = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    save_file({**tune, **scaled, "img_in.comfy_quant": marker}, "tune.safetensors")
    found = made("'tune.safetensors' + ('wide.safetensors' - 'base.safetensors')", dtype="fp32")
    exact = expected({**tune, "img_in.weight": codes.double() / 2}, wide, base, 1)["img_in.weight"]
    assert found["img_in.weight"].double().equal(exact)


# -- modules that one model adds -------------------------------------------------------------------------------------------------


def test_modules_of_one_model_are_carried_with_its_difference(folder: Path) -> None:
    tune, vace, base = three(WAN, WAN_SIZES, VACE)
    added = vace.keys() - base.keys()
    for text in (
        "'tune.safetensors' + ('wide.safetensors' - 'base.safetensors')",
        "'wide.safetensors' + ('tune.safetensors' - 'base.safetensors')",
    ):
        found = made(text)
        assert {name for name in found if not found[name].double().equal(expected(tune, vace, base, 1)[name])} == set()
        assert found.keys() == vace.keys()
    plan = planned("'tune.safetensors' + 0.5*('wide.safetensors' - 'base.safetensors')")
    assert len(plan.reasons()["taken from wide.safetensors"]) == len(added)
    assert any("whole in spite of its factor of 0.5" in warning for warning in plan.warnings)
    half = made("'tune.safetensors' + 0.5*('wide.safetensors' - 'base.safetensors')")
    assert all(half[name].equal(vace[name]) for name in added)


def test_modules_of_two_models_are_merged_where_the_rest_is_a_model(folder: Path) -> None:
    _, vace, _ = three(WAN, WAN_SIZES, VACE)
    other = numbers({name: tuple(value.shape) for name, value in vace.items()}, 7)
    save_file(other, "other.safetensors")
    change = "0.25*('wide.safetensors' - 'base.safetensors') + 0.75*('other.safetensors' - 'base.safetensors')"
    name = "vace_patch_embedding.weight"
    found = made(f"'tune.safetensors' + {change}")
    assert found[name].double().equal(0.25 * vace[name].double() + 0.75 * other[name].double())
    twice = planned(f"'tune.safetensors' + {change.replace('0.25', '0.5')}")
    assert dict(twice.left_out)[name] == "only in wide.safetensors"


def test_what_is_added_can_be_left_out_or_kept_by_its_group(folder: Path) -> None:
    _, vace, base = three(WAN, WAN_SIZES, VACE)
    text = "'tune.safetensors' + ('wide.safetensors' - 'base.safetensors')"
    without = planned(text, exclude=("vace",))
    assert dict(without.header.tensors).keys() == base.keys()
    assert {reason for _, reason in without.left_out} == {"excluded: vace"}
    assert dict(planned(text, multipliers=(("vace", Fraction(0)),)).header.tensors).keys() == base.keys()
    kept = planned(text, exclude=("vace",), keep_from="wide.safetensors")
    assert dict(kept.header.tensors).keys() == vace.keys()


def test_nothing_is_carried_from_what_is_subtracted_or_averaged(folder: Path) -> None:
    _, _, base = three(WAN, WAN_SIZES, VACE)
    for text in (
        "'tune.safetensors' - ('wide.safetensors' - 'base.safetensors')",
        "0.5*'tune.safetensors' + 0.5*'wide.safetensors'",
    ):
        plan = planned(text, keep_from="tune.safetensors")
        assert dict(plan.header.tensors).keys() == base.keys()
        assert dict(plan.left_out)["vace_patch_embedding.weight"] == "only in wide.safetensors"


def test_added_modules_get_the_names_of_the_anchors_layout_and_prefix(folder: Path) -> None:
    three(WAN, WAN_SIZES, VACE)
    mergetool.convert("wide.safetensors", "theirs.safetensors", layout="diffusers")
    save_file({f"net.{name}": value for name, value in load_file("tune.safetensors").items()}, "tune.safetensors")
    found = made("'tune.safetensors' + ('theirs.safetensors' - 'base.safetensors')")
    assert found.keys() == {f"net.{name}" for name in load_file("wide.safetensors")}


def test_a_folder_gets_the_config_of_the_wide_model(folder: Path) -> None:
    three(FLUX, FLUX_SIZES, {"patch_in": 384})
    for name in ("tune", "wide", "base"):
        mergetool.convert(f"{name}.safetensors", f"{name}/", layout="diffusers")
    assert json.loads(Path("tune/config.json").read_text())["in_channels"] == 64
    mergetool.merge(
        "tune + (wide - base)".replace("tune", "'tune'").replace("wide", "'wide'").replace("base", "'base'"),
        "out/",
        force=True,
    )
    assert json.loads(Path("out/config.json").read_text())["in_channels"] == 384


def test_verify_derives_padded_and_carried_tensors_again(folder: Path) -> None:
    three(WAN, WAN_SIZES, {**VACE, "input": 36})
    made("'tune.safetensors' + 0.5*('wide.safetensors' - 'base.safetensors')")
    report = mergetool.verify("out.safetensors")
    assert report.weights.sound


def test_a_difference_leaves_the_wide_weight_out_and_says_so(folder: Path) -> None:
    three(FLUX, FLUX_SIZES, {"patch_in": 384})
    mergetool.diff("base.safetensors", "wide.safetensors", "lora.safetensors", rank=4, min_dim=8)
    with open_diff("base.safetensors", "wide.safetensors", DiffOptions(rank=4, min_dim=8)) as pairing:
        assert dict(pairing.left_out)["x_embedder.weight"] == "takes other inputs, of another shape"
        assert ["no LoRA adds channels to a model's input" in warning for warning in pairing.warnings] == [True]
    assert not [name for name in load_file("lora.safetensors") if "x_embedder" in name or "img_in" in name]


# -- ComfyUI ---------------------------------------------------------------------------------------------------------------------


def test_comfyui_pads_a_weight_by_the_same_zeros(
    unets: tuple[Path, Tensors, Tensors, Tensors], comfyui: ComfyUI, tmp_path: Path
) -> None:
    """Its own padding of a difference, which its nodes ask for in LoRAs alone."""
    folder, tune, wide, base = unets
    weight, difference = (
        tune["conv_in.weight"],
        wide["conv_in.weight"].float() - padded(base["conv_in.weight"], wide["conv_in.weight"]).float(),
    )
    save_file({"weight": weight.float(), "difference": difference}, tmp_path / "given.safetensors")
    comfyui.ask(
        "padded_difference", tensors=tmp_path / "given.safetensors", strength=0.5, out=tmp_path / "theirs.safetensors"
    )
    text = f"'{folder}/tune.safetensors' + 0.5*('{folder}/wide.safetensors' - '{folder}/base.safetensors')"
    mergetool.merge(text, tmp_path / "ours.safetensors", dtype="fp32", force=True)
    ours = load_file(tmp_path / "ours.safetensors")[f"{sdxl.UNET}input_blocks.0.0.weight"]
    assert ours.equal(load_file(tmp_path / "theirs.safetensors")["weight"])


def test_comfyui_makes_the_same_of_the_order_that_it_takes(
    unets: tuple[Path, Tensors, Tensors, Tensors], comfyui: ComfyUI, tmp_path: Path
) -> None:
    """Its example has the inpainting model first, and leaves its first layer as it is; the rest is the sum, and so are the mask's channels."""
    folder, *_ = unets
    paths = {name: folder / f"{name}.safetensors" for name in ("tune", "wide", "base")}
    operations = [["ModelMergeSubtract", paths["wide"], paths["base"], 1.0], ["ModelMergeAdd", 0, paths["tune"]]]
    comfyui.ask("merge", out=tmp_path / "theirs.safetensors", operations=operations)
    mergetool.merge(
        f"'{paths['tune']}' + ('{paths['wide']}' - '{paths['base']}')",
        tmp_path / "ours.safetensors",
        dtype="fp32",
        force=True,
    )
    theirs, ours = read(tmp_path / "theirs.safetensors"), read(tmp_path / "ours.safetensors")
    first = f"{sdxl.UNET}input_blocks.0.0.weight"
    assert theirs.keys() == ours.keys()
    assert [name for name in ours if not (ours[name] == theirs[name]).all()] == [first]
    assert (ours[first][:, 4:] == theirs[first][:, 4:]).all()
    loaded = comfyui.ask("load", model=tmp_path / "ours.safetensors")
    assert (loaded["missing"], loaded["unexpected"]) == ([], [])
    assert loaded["parameters"] == sum(1 for name in ours if prod(ours[name].shape))


@pytest.mark.parametrize(
    ("added", "config"),
    [
        ({"vace": wan.DIM, "vace_input": 96, "vace_blocks": 1}, "WAN21_Vace"),
        ({"input": 36, "added": wan.DIM, "image": wan.IMAGE, "pictured": wan.DIM}, "WAN21_I2V"),
    ],
    ids=["VACE", "I2V"],
)
def test_comfyui_takes_the_result_for_the_kind_that_was_added(
    folder: Path, comfyui: ComfyUI, added: Mapping[str, int], config: str
) -> None:
    plain = {size: number for size, number in wan.SMALL.items() if size not in ("added", "image", "pictured")}
    three(WAN, {**plain, "input": 16}, added)
    assert comfyui.ask("load", model=folder / "tune.safetensors")["config"] == "WAN21_T2V"
    made("'tune.safetensors' + ('wide.safetensors' - 'base.safetensors')")
    answer = comfyui.ask("load", model=folder / "out.safetensors")
    assert (answer["missing"], answer["unexpected"], answer["log"], answer["config"]) == ([], [], [], config)
