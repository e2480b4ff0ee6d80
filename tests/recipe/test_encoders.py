"""Text encoders in merges of all-in-one files: by the formula of the model, in both spellings, chosen by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergetool
from mergetool.engine import job
from mergetool.errors import DataError, FamilyError
from mergetool.models import open_model
from mergetool.options.merging import MergeOptions
from mergetool.recipe.plan import Plan
from tests.recipe.all_in_one import UNET
from tests.text_encoders import CLIP_G, CLIP_L, VAE, Tensors, beside, clip, open_clip

SHIFT = "'a.safetensors' + 0.25*('b.safetensors' - 'a.safetensors')"
FC1, FUSED = (
    f"{CLIP_L}text_model.encoder.layers.1.mlp.fc1.weight",
    f"{CLIP_G}transformer.resblocks.1.attn.in_proj_weight",
)
POSITIONS = f"{CLIP_L}text_model.embeddings.position_ids"


def unet(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "input_blocks.0.0.weight": (32, 4, 3, 3),
        "middle_block.1.transformer_blocks.0.attn1.to_q.weight": (64, 64),
    }
    return {f"{UNET}{name}": torch.randn(shape, generator=generator).half() for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    for seed, name in enumerate("ab"):
        save_file({**unet(seed), **beside(seed, torch.float16)}, folder / f"{name}.safetensors")
    return folder


@pytest.fixture(autouse=True)
def models(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        Path(f"{name}.safetensors").symlink_to(originals / f"{name}.safetensors")


def replaced(name: str, tensors: Tensors) -> None:
    Path(name).unlink()
    save_file(tensors, name)


def made(expression: str = SHIFT, **options: Any) -> Tensors:
    mergetool.merge(expression, "out.safetensors", force=True, overwrite=True, **options)
    return load_file("out.safetensors")


def planned(expression: str = SHIFT, **options: Any) -> Plan:
    with job.open_merge(expression, MergeOptions(**options), fingerprints=False) as plan:
        return plan


def reason(plan: Plan, tensor: str) -> str:
    return next(reason for reason, names in plan.reasons().items() if tensor in names)


def test_they_are_merged_by_the_formula_in_their_own_dtype() -> None:
    found, a, b = made(dtype="fp32"), load_file("a.safetensors"), load_file("b.safetensors")
    for name in (name for name in a if name.startswith("conditioner.") and name != POSITIONS):
        wanted = (0.75 * a[name].double() + 0.25 * b[name].double()).half()
        torch.testing.assert_close(found[name], wanted, rtol=1e-3, atol=1e-7)
        assert not found[name].equal(a[name])
    assert found[VAE].equal(a[VAE])
    assert found[POSITIONS].equal(a[POSITIONS])


def test_without_them_the_models_bytes_are_the_same() -> None:
    found, kept = made(), made(bundled="keep")
    assert found.keys() == kept.keys()
    assert all(found[name].equal(kept[name]) for name in found if name.startswith(UNET))
    a = load_file("a.safetensors")
    assert all(kept[name].equal(a[name]) for name in a if not name.startswith(UNET))


def test_one_model_alone_is_copied_bit_for_bit() -> None:
    found, a = made("'a.safetensors'", dtype="bf16"), load_file("a.safetensors")
    assert all(found[name].equal(a[name]) and found[name].dtype == a[name].dtype for name in beside(0))


@pytest.mark.parametrize(
    ("pattern", "stays"),
    [
        ("text_encoder", {FC1, FUSED}),
        ("clip_l", {FC1}),
        ("clip_g", {FUSED}),
        ("text_encoders.clip_l.transformer.text_model.encoder.layers.1", {FC1}),
    ],
)
def test_groups_and_names_choose_them(pattern: str, stays: set[str]) -> None:
    found, a = made(multipliers={pattern: 0}), load_file("a.safetensors")
    assert {name for name in (FC1, FUSED) if found[name].equal(a[name])} == stays


def test_a_multiplier_of_q_alone_changes_the_rows_of_q() -> None:
    name = "text_encoders.clip_g.transformer.text_model.encoder.layers.1.self_attn.q_proj.weight"
    found, plain, a = made(multipliers={name: 0})[FUSED], made()[FUSED], load_file("a.safetensors")[FUSED]
    assert found[:128].equal(a[:128])
    assert found[128:].equal(plain[128:])


def test_kept_ones_come_from_the_model_that_is_named() -> None:
    found, b = made(protect=("clip_g",), keep_from="b.safetensors"), load_file("b.safetensors")
    assert all(found[name].equal(b[name]) for name in b if name.startswith(CLIP_G))


def test_groups_of_the_model_leave_them_alone() -> None:
    plain, found = made(), made(multipliers={"attention": 0})
    assert found[FUSED].equal(plain[FUSED])


def test_an_encoder_that_the_other_has_not_is_copied_and_said() -> None:
    replaced("b.safetensors", {n: t for n, t in load_file("b.safetensors").items() if not n.startswith(CLIP_G)})
    found, a = made(), load_file("a.safetensors")
    assert found[FUSED].equal(a[FUSED])
    assert not found[FC1].equal(a[FC1])
    assert reason(planned(), FUSED) == "not in b.safetensors"


def test_an_encoder_of_another_size_is_copied_and_said() -> None:
    wide = {
        n: torch.cat([t, t]) if n.endswith("position_embedding.weight") else t
        for n, t in load_file("b.safetensors").items()
    }
    replaced("b.safetensors", wide)
    name = f"{CLIP_L}text_model.embeddings.position_embedding.weight"
    assert made()[name].equal(load_file("a.safetensors")[name])
    assert reason(planned(), name) == "of another shape in b.safetensors"


def test_a_missing_encoder_comes_from_the_other_model() -> None:
    replaced("a.safetensors", {n: t for n, t in load_file("a.safetensors").items() if not n.startswith(CLIP_G)})
    found, b = made(), load_file("b.safetensors")
    assert all(found[name].equal(b[name]) for name in b if name.startswith(CLIP_G))
    assert reason(planned(), FUSED) == "bundled, copied from b.safetensors"


def test_spellings_meet() -> None:
    """SD1.5's old names, without text_model, against today's; OpenCLIP's against transformers'."""
    own = clip("clip_l", 3)
    start = "cond_stage_model.transformer."
    old = {f"{start}{n.removeprefix('text_model.')}": t for n, t in own.items() if n.startswith("text_model.")}
    new = {f"{start}{n}": t * 2 for n, t in own.items() if n.startswith("text_model.")}
    other = clip("clip_g", 4)
    comfyui = {f"text_encoders.clip_g.transformer.{n}": t * 2 for n, t in other.items()}
    replaced("a.safetensors", {**unet(0), **old, **{f"{CLIP_G}{n}": t for n, t in open_clip(other).items()}})
    replaced("b.safetensors", {**unet(1), **new, **comfyui})
    found = made()
    for name, tensor in load_file("a.safetensors").items():
        if name.startswith(("cond_stage_model.", CLIP_G)) and not name.endswith("text_projection"):
            torch.testing.assert_close(found[name], tensor * 1.25)
    assert reason(planned(), f"{CLIP_G}text_projection") == "not in b.safetensors"  # its transpose


def lora(*modules: str, columns: int = 64, rows: int = 128) -> Tensors:
    generator = torch.Generator().manual_seed(5)
    shapes = {"lora_down.weight": (2, columns), "lora_up.weight": (rows, 2)}
    return {f"{m}.{end}": torch.randn(shape, generator=generator) for m in modules for end, shape in shapes.items()}


BAKED = "'a.safetensors' + lora('lora.safetensors')"
L_FC1 = "text_model.encoder.layers.1.mlp.fc1"
SPELLINGS = (
    *(
        "lora_te1_text_model_encoder_layers_1_mlp_fc1",
        "lora_te_text_model_encoder_layers_1_mlp_fc1",
        f"text_encoder.{L_FC1}",
    ),
    *(f"text_encoders.clip_l.transformer.{L_FC1}", f"te1.{L_FC1}", "lycoris_te1_text_model_encoder_layers_1_mlp_fc1"),
)


@pytest.mark.parametrize("module", SPELLINGS)
def test_a_lora_is_baked_in_every_spelling(module: str) -> None:
    file = lora(module)
    save_file(file, "lora.safetensors")
    found, a = made(BAKED), load_file("a.safetensors")
    change = file[f"{module}.lora_up.weight"].double() @ file[f"{module}.lora_down.weight"].double()
    torch.testing.assert_close(found[FC1], (a[FC1].double() + change).half(), rtol=1e-3, atol=1e-6)
    assert all(found[name].equal(a[name]) for name in a if name != FC1)


def test_a_whole_difference_of_the_projection_is_turned() -> None:
    file = {"lora_te2_text_projection.diff": torch.randn(128, 128, generator=torch.Generator().manual_seed(1))}
    save_file({**file, **lora("lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q", rows=64)}, "lora.safetensors")
    name = f"{CLIP_G}text_projection"
    change = made(BAKED)[name].double() - load_file("a.safetensors")[name].double()
    torch.testing.assert_close(change, file["lora_te2_text_projection.diff"].double().T, rtol=0, atol=2e-3)


def test_with_keep_a_lora_of_encoders_changes_none_and_that_is_said() -> None:
    save_file(lora(SPELLINGS[0]), "lora.safetensors")
    with pytest.raises(FamilyError, match=r"changes nothing of a.safetensors that is to be merged"):
        made(BAKED, bundled="keep")
    unet_too = lora("lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q", rows=64)
    save_file({**lora(SPELLINGS[0]), **unet_too}, "lora.safetensors")
    left_out = dict(planned(BAKED, bundled="keep").left_out)
    assert left_out[f"text_encoders.clip_l.transformer.{L_FC1}.weight"] == "of a text encoder, which is not merged"


def test_a_lora_for_an_encoder_that_the_model_has_not_is_named() -> None:
    save_file({**lora("lora_te2_text_model_encoder_layers_9_mlp_fc1"), **lora(SPELLINGS[0])}, "lora.safetensors")
    plan = planned(BAKED)
    assert (
        "lora_te2_text_model_encoder_layers_9_mlp_fc1.lora_up.weight",
        "in lora.safetensors: of a text encoder",
    ) in plan.left_out
    replaced("a.safetensors", unet(0))
    with pytest.raises(DataError, match="are for a text encoder"):
        made(BAKED)


def test_a_group_of_what_a_file_bundles_is_listed() -> None:
    with open_model("a.safetensors") as opened:
        names = opened.anatomy.family.group_names(opened.anatomy)
        assert {"text_encoder", "clip_l", "clip_g"} <= set(names)
        assert set(opened.anatomy.own) == {
            name for name in opened.anatomy.parts if not name.startswith("text_encoders.")
        }
