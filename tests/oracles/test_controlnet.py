"""ControlNets against the real ComfyUI and diffusers: files that they load, merges across layouts, a fine-tune's change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel
from safetensors.torch import load_file, save_file

import mergetool
from mergetool.errors import FamilyError, UsageError
from tests import sdxl
from tests.controlnets import KINDS, values
from tests.oracles import ComfyUI

PREFIX = "control_model."


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, kind: str) -> Path:
    """Three ControlNets: two in diffusers' names, one as the first releases have them."""
    folder, family = tmp_path_factory.mktemp("controlnets"), KINDS[kind][0]
    for seed, name in enumerate("abc"):
        tensors = values(kind, seed)
        if name == "b":
            tensors = {PREFIX + family.stored_name(part, "comfyui"): value for part, value in tensors.items()}
        save_file(tensors, folder / f"{name}.safetensors")
    return folder


@pytest.mark.parametrize("prefix", [PREFIX, ""])
def test_comfyui_loads_what_convert_writes(
    folder: Path, kind: str, prefix: str, comfyui: ComfyUI, tmp_path: Path
) -> None:
    written = tmp_path / "control.safetensors"
    mergetool.convert(folder / "a.safetensors", written, layout="comfyui", prefix=prefix)
    answer = comfyui.ask("controlnet", path=written, out=tmp_path / "theirs.safetensors")
    assert answer == {"kind": "ControlNet", "log": []}
    family, theirs = KINDS[kind][0], load_file(tmp_path / "theirs.safetensors")
    ours = {family.stored_name(name, "comfyui"): value for name, value in values(kind, 0).items()}
    assert theirs.keys() == ours.keys()
    assert all(theirs[name].equal(value) for name, value in ours.items())


def test_diffusers_loads_the_folder_and_the_single_file(folder: Path, kind: str, tmp_path: Path) -> None:
    mergetool.convert(folder / "b.safetensors", f"{tmp_path}/b/", layout="diffusers")
    made = ControlNetModel.from_pretrained(tmp_path / "b")
    models = [made]
    if kind == "SD1.5":  # of SDXL's single files its converter forgets the embedder of pooled text
        models.append(ControlNetModel.from_single_file(str(folder / "b.safetensors"), config=str(tmp_path / "b")))
    for model in models:
        state = model.state_dict()
        assert all(state[name].equal(value) for name, value in values(kind, 1).items())
        assert state.keys() == values(kind, 1).keys()


def test_merges_of_their_own_kind_are_exact_across_layouts(folder: Path, kind: str, tmp_path: Path) -> None:
    text = " ".join(f"{sign}'{folder}/{name}.safetensors'" for sign, name in (("", "a"), ("+", "b"), ("-", "c")))
    mergetool.merge(text, tmp_path / "out.safetensors", force=True, keep_from=f"{folder}/a.safetensors")
    a, b, c = (values(kind, seed) for seed in range(3))
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == a.keys()
    assert all(found[name].double().equal(a[name].double() + b[name].double() - c[name].double()) for name in a)


def test_scales_are_refused_since_no_program_reads_them(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no program reads the weights of a SD.* ControlNet by scales"):
        mergetool.convert(folder / "a.safetensors", tmp_path / "out.safetensors", quant="fp8-scaled")


def test_a_fine_tunes_change_is_added_to_the_encoder_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    control = values("SDXL", 0)
    save_file(control, "control.safetensors")
    tune, base = sdxl.values(1), sdxl.values(2)
    for name, tensors in (("tune", tune), ("base", base)):
        sdxl.checkpoint(Path(f"{name}.safetensors"), tensors, prefix=sdxl.UNET)
    text = "'control.safetensors' + ('tune.safetensors' - 'base.safetensors')"
    with pytest.raises(FamilyError, match="include=input_blocks"):
        mergetool.merge(text, "out.safetensors", force=True)
    mergetool.merge(text, "out.safetensors", force=True, include=["input_blocks", "middle_block"])
    found = load_file("out.safetensors")
    assert found.keys() == control.keys()
    for name, value in control.items():
        if name.startswith(("down_blocks", "mid_block", "conv_in")):
            change = tune[name].double() - base[name].double()
            torch.testing.assert_close(found[name].double(), value.double() + change, rtol=0, atol=2**-23)
        else:
            assert found[name].equal(value), name
