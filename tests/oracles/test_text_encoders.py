"""Text encoders of all-in-one files beside ComfyUI's own loader, LoRA node and merge nodes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergetool
from mergetool.engine import job
from mergetool.options.merging import MergeOptions
from tests.oracles import ComfyUI
from tests.oracles.diffusers import Diffusers
from tests.sdxl import SMALL
from tests.text_encoders import SIZES, Tensors, all_in_one, clip

LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    for seed, name in enumerate("ab"):
        all_in_one(folder / f"{name}.safetensors", seed)
    return folder


def shown(comfyui: ComfyUI, command: str, out: Path, **asked: object) -> tuple[Tensors, dict[str, object]]:
    answer = comfyui.ask(command, sizes=SIZES, out=str(out), **asked)
    return load_file(out), answer


def equal(found: Tensors, wanted: Tensors, tolerance: float = 2e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def lora(path: Path, *, projection: bool = True) -> Path:
    """A LoRA of kohya-type trainers for the UNet and both encoders, with an alpha of half the rank."""
    generator = torch.Generator().manual_seed(7)
    tensors: Tensors = {}

    def add(name: str, rows: int, columns: int) -> None:
        tensors[f"{name}.lora_down.weight"] = torch.randn((4, columns), generator=generator) * 0.1
        tensors[f"{name}.lora_up.weight"] = torch.randn((rows, 4), generator=generator) * 0.1
        tensors[f"{name}.alpha"] = torch.tensor(2.0)

    add("lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q", 128, 128)
    for start, encoder in (("lora_te1", "clip_l"), ("lora_te2", "clip_g")):
        for name, tensor in clip(encoder, 0).items():
            module = name.removesuffix(".weight")
            if module != name and module.endswith(LINEAR):
                add(f"{start}_{module.replace('.', '_')}", *tensor.shape)
    if projection:
        add("lora_te2_text_projection", 128, 128)
    save_file(tensors, path)
    return path


def test_a_merge_is_that_of_comfyuis_two_nodes(place: Path, comfyui: ComfyUI) -> None:
    a, b, merged = (place / f"{name}.safetensors" for name in ("a", "b", "merged"))
    mergetool.merge(f"'{a}' + 0.75*('{b}' - '{a}')", merged, force=True)
    found, answer = shown(comfyui, "encoders", place / "found.safetensors", model=str(merged))
    assert answer["log"] == []
    wanted, _ = shown(comfyui, "encoders_merge", place / "wanted.safetensors", one=str(a), other=str(b), ratio=0.25)
    wanted["text_encoders.clip_g.logit_scale"] = found["text_encoders.clip_g.logit_scale"]  # which its node leaves
    equal(found, wanted)


def test_block_weights_base_is_the_encoders_too(place: Path) -> None:
    a, b = place / "a.safetensors", place / "b.safetensors"
    options = MergeOptions(multipliers={"BASE": 0})
    with job.open_merge(f"'{a}' + 0.5*('{b}' - '{a}')", options, fingerprints=False) as plan:
        merged = plan.reasons()["merged"]
    assert not any(name.startswith("conditioner.") for name in merged)
    assert any(".input_blocks.4." in name for name in merged)


def test_a_lora_is_baked_into_both_encoders_as_comfyui_adds_it(place: Path, comfyui: ComfyUI) -> None:
    a, baked, file = place / "a.safetensors", place / "baked.safetensors", lora(place / "lora.safetensors")
    done = mergetool.merge(f"'{a}' + 0.8*lora('{file}')", baked, force=True)
    assert not done.left_out
    found, _ = shown(comfyui, "encoders", place / "found.safetensors", model=str(baked))
    wanted, answer = shown(
        comfyui, "encoders_patch", place / "wanted.safetensors", model=str(a), lora=str(file), strength=0.8
    )
    assert (len(answer["patched"]), answer["log"]) == (2 * 3 * len(LINEAR) + 1, [])
    equal(found, wanted)


def test_a_difference_holds_the_encoders_and_comfyui_adds_all_of_it(place: Path, comfyui: ComfyUI) -> None:
    a, b, out = place / "a.safetensors", place / "b.safetensors", place / "diff.safetensors"
    done = mergetool.diff(a, b, out, rank=128, dtype="fp32", include=("text_encoder", "M00.q"))
    found, answer = shown(comfyui, "encoders_patch", place / "found.safetensors", model=str(a), lora=str(out))
    assert (len(answer["patched"]), answer["log"]) == (2 * 3 * len(LINEAR), [])
    wanted, _ = shown(comfyui, "encoders", place / "wanted.safetensors", model=str(b))
    modules = list(answer["patched"])
    equal(
        {name: found[f"text_encoders.{name}"] for name in modules},
        {name: wanted[f"text_encoders.{name}"] for name in modules},
        2e-5,
    )
    assert done


def test_diffusers_adds_the_encoders_of_a_difference(place: Path) -> None:
    a, b, out = place / "a.safetensors", place / "b.safetensors", place / "for_diffusers.safetensors"
    mergetool.diff(a, b, out, rank=48, dtype="fp32", include=("text_encoder", "M00.q"))
    asked = {"pipeline": "StableDiffusionXLPipeline", "model": "UNet2DConditionModel", "config": SMALL}
    with Diffusers("0.42.1") as diffusers:
        changed = place / "changed.safetensors"
        diffusers.ask("load_encoders", lora=place, name=out.name, out=changed, sizes=list(SIZES.values()), **asked)
    found = {name.replace("text_model.", ""): tensor for name, tensor in load_file(changed).items()}
    wanted = {}
    for start, encoder, seed in (("text_encoder", "clip_l", 0), ("text_encoder_2", "clip_g", 50)):
        base, variant = clip(encoder, seed), clip(encoder, seed + 1)
        for name in (name for name in base if name.endswith(tuple(f"{module}.weight" for module in LINEAR))):
            up, values, down = torch.linalg.svd((variant[name] - base[name]).double(), full_matrices=False)
            wanted[f"{start}.{name.removeprefix('text_model.')}"] = (up[:, :48] * values[:48] @ down[:48]).float()
    equal(found, wanted, 1e-4)
