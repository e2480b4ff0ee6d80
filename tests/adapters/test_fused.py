"""Changes of tensors that one layout has fused or in another order: biases, whole differences, DoRA, LoKr, and parts of which some are missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergetool.adapters.convert import convert
from mergetool.adapters.lora_file import open_lora
from mergetool.arch import recognise
from mergetool.arch.families.lumina2 import LUMINA2
from mergetool.checkpoint.reader import Checkpoint
from mergetool.errors import DataError
from tests.adapters.lumina2 import SMALL
from tests.adapters.spellings import DOWN, UP, A, B, random

D = 8
DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"


def pair(module: str, rows: int, columns: int = D) -> dict[str, torch.Tensor]:
    return {module + A: random(4, columns, seed=rows), module + B: random(rows, 4, seed=rows + 1)}


def written(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA after it was converted to ComfyUI's names."""
    save_file(tensors, folder / "lora.safetensors")
    with open_lora(folder / "lora.safetensors") as file:
        assert not file.unmatched
        convert(file, folder / "written.safetensors", "comfyui")
    return load_file(folder / "written.safetensors")


def test_a_bias_of_a_fused_module_stays_one(tmp_path: Path) -> None:
    bias = random(3 * D, seed=1)
    module = "double_blocks.0.img_attn.qkv"
    found = written(tmp_path, pair(module, 3 * D) | {f"{module}.lora_B.bias": bias})
    assert torch.equal(found[f"diffusion_model.{module}.diff_b"], bias)


def test_a_bias_of_one_part_is_scaled_and_stands_among_zeros(tmp_path: Path) -> None:
    module, bias = f"transformer.{DOUBLE}.attn.to_k", random(D, seed=1)
    others = pair(f"transformer.{SINGLE}.proj_out", D, 5 * D)
    found = written(
        tmp_path, pair(module, D) | others | {f"{module}.lora_B.bias": bias, f"{module}.alpha": torch.tensor(2.0)}
    )
    zeros = torch.zeros(D, dtype=bias.dtype)
    assert torch.equal(
        found["diffusion_model.double_blocks.0.img_attn.qkv.diff_b"], torch.cat([zeros, bias / 2, zeros])
    )


def test_the_biases_of_linear1_are_divided_as_its_weight(tmp_path: Path) -> None:
    module = "diffusion_model.single_blocks.0.linear1"
    save_file(pair(module, 7 * D) | {f"{module}.diff_b": random(7 * D, seed=1)}, tmp_path / "lora.safetensors")
    with open_lora(tmp_path / "lora.safetensors") as file:
        rows = {part: changes[0].rows for part, changes in file.changes.items() if part.endswith(".bias")}
    assert rows == {f"{SINGLE}.attn.to_{x}.bias": D for x in "qkv"} | {f"{SINGLE}.proj_mlp.bias": 4 * D}


def test_rows_that_only_the_model_tells_are_asked_of_it(tmp_path: Path) -> None:
    dim = SMALL["dim"]
    save_file(pair("transformer.layers.0.attn.to_q", dim, dim), tmp_path / "lora.safetensors")
    with open_lora(tmp_path / "lora.safetensors") as file:
        assert file.family is LUMINA2
        with pytest.raises(
            DataError, match=r"attn\.to_k\.weight\", with which it is one tensor .* name it with `model`"
        ):
            convert(file, tmp_path / "written.safetensors", "comfyui")
    save_file({n: torch.zeros(s) for n, s in LUMINA2.shapes(SMALL, "comfyui").items()}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path / "model.safetensors") as model:
        anatomy = recognise(model.tensors, source="model")
        with open_lora(tmp_path / "lora.safetensors", anatomy=anatomy) as file:
            convert(file, tmp_path / "written.safetensors", "comfyui")
        up = load_file(tmp_path / "written.safetensors")[f"diffusion_model.layers.0.attention.qkv{UP}"]
        assert len(up) == model.tensors["layers.0.attention.qkv.weight"].shape[0]


def halves(lora: torch.Tensor) -> torch.Tensor:
    return torch.cat(list(lora.chunk(2))[::-1])


def test_a_dora_by_rows_has_them_in_the_order_of_the_layout(tmp_path: Path) -> None:
    """The final modulation of Flux.1 is (scale, shift) in diffusers, (shift, scale) elsewhere."""
    tensors = pair("transformer.norm_out.linear", 2 * D)
    scale = random(2 * D, 1, seed=3).abs()
    others = pair(f"transformer.{SINGLE}.proj_out", D, 5 * D)
    found = written(tmp_path, tensors | others | {"transformer.norm_out.linear.dora_scale": scale})
    module = "diffusion_model.final_layer.adaLN_modulation.1"
    assert torch.equal(found[f"{module}.dora_scale"], halves(scale))
    assert torch.equal(found[f"{module}{UP}"], halves(tensors[f"transformer.norm_out.linear{B}"]))
    assert torch.equal(found[f"{module}{DOWN}"], tensors[f"transformer.norm_out.linear{A}"])


def test_a_lokr_in_another_order_is_refused(tmp_path: Path) -> None:
    tensors = {
        "transformer.norm_out.linear.lokr_w1": random(4, 4, seed=1),
        "transformer.norm_out.linear.lokr_w2": random(D // 2, D // 4, seed=2),
    }
    with pytest.raises(
        DataError, match=r"is a LoKr of scale and shift together, which cannot be taken apart; `mergetool lora bake`"
    ):
        written(tmp_path, tensors | pair(f"transformer.{SINGLE}.proj_out", D, 5 * D))


def test_the_family_of_most_names_is_taken_and_of_as_many_that_whose_own_they_are(tmp_path: Path) -> None:
    """LyCORIS calls modules of Flux.1 what Flux.2's are called."""
    found = written(
        tmp_path, pair(f"transformer.{DOUBLE}.ff.linear_in", 6 * D) | pair(f"transformer.{DOUBLE}.attn.to_out.0", D)
    )
    assert f"diffusion_model.double_blocks.0.img_mlp.0{UP}" in found
    with open_lora(tmp_path / "lora.safetensors") as file:
        assert file.family.name == "Flux.2"


def test_a_lora_without_a_module_of_the_model_is_not_converted(tmp_path: Path) -> None:
    save_file({"blocks.0.q.weight": torch.ones(D, D)}, tmp_path / "model.safetensors")
    save_file(pair("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", D), tmp_path / "lora.safetensors")
    with Checkpoint.open(tmp_path / "model.safetensors") as model:
        anatomy = recognise(model.tensors, source="model")
        with (
            open_lora(tmp_path / "lora.safetensors", anatomy=anatomy) as file,
            pytest.raises(DataError, match=r"none of its 2 keys"),
        ):
            convert(file, tmp_path / "written.safetensors", "kohya", skip_unmatched=True, names_known=True)
