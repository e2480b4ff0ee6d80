"""Spellings of keys that were met in the field and not read: each is the same LoRA as under the usual names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergetool.adapters.lora_file import open_lora
from mergetool.adapters.values import dense_rows
from mergetool.arch import recognise
from mergetool.checkpoint.reader import Checkpoint
from mergetool.errors import DataError
from tests.adapters.spellings import BLOCK, DIM, DOWN, UP, A, B, Written, f64, random, split
from tests.adapters.test_traps import bake, close, moved

PREFIXES = [
    "lora_unet__", "lora_unet_lora_unet_", "lora_unet_diffusion_model_", "lora_unet_transformer_", "lycoris__",
    "lora_transformer__",
    "diffusion_model.diffusion_model.", "transformer.transformer.", "transformer.diffusion_model.",
    "base_model.model.transformer.diffusion_model.", "base_model.model.base_model.model.", "net.", "module.", "_orig_mod.",
    "pipe.dit.", "diffusion_model._orig_mod.", "model.diffusion_model.transformer.",
]  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_that_stands_twice_or_beside_another_is_no_part_of_the_name(tmp_path: Path, prefix: str) -> None:
    flat = prefix.endswith("_")
    written = split(prefix, DOWN, UP, alpha=8, flat=flat) if flat else split(prefix, A, B)
    lora = written.save(tmp_path)
    with open_lora(lora) as file:
        assert (file.family.name, set(file.changes), file.unmatched) == ("Z-Image", set(written.changes), ())
    found = moved(tmp_path, lora)
    assert all(close(found[part], change) for part, change in written.changes.items())


def test_a_compiled_module_in_the_middle_of_a_name_is_no_part_of_it(tmp_path: Path) -> None:
    written = split("diffusion_model.", A, B)
    written.tensors = {key.replace(".layers.1.", ".layers.1._orig_mod."): held for key, held in written.tensors.items()}
    with open_lora(written.save(tmp_path)) as file:
        assert set(file.changes) == set(written.changes)


TEXT_ENCODER = [
    "lora_te_model_layers_0_mlp", "lora_te1_text_model_layers_0_mlp", "lora_te2_x", "lora_te3_encoder_block_0", "text_encoder.x",
    "text_encoder_2.x", "text_encoders.qwen3_4b.transformer.model.layers.0.mlp", "base_model.model.text_encoder.x",
]  # fmt: skip


@pytest.mark.parametrize("name", TEXT_ENCODER)
def test_keys_of_a_text_encoder_are_left_aside_and_named(tmp_path: Path, name: str) -> None:
    written = split("lora_unet_", DOWN, UP, alpha=8, flat=True)
    mine = {f"{name}{end}": random(2, 2, seed=1) for end in (DOWN, UP, ".alpha")}
    written.tensors |= mine
    with open_lora(written.save(tmp_path)) as file:
        assert (set(file.text_encoder), file.unmatched) == (set(mine), ())
        assert set(file.changes) == set(written.changes)
    found = moved(tmp_path, tmp_path / "lora.safetensors")
    assert all(close(found[part], change) for part, change in written.changes.items())


def test_a_bias_of_the_up_factor_is_a_change_of_the_bias_at_the_same_scale(tmp_path: Path) -> None:
    """PEFT's ``lora_bias``: the up factor is a layer with a bias, whose output is scaled (peft/tuners/lora/layer.py)."""
    name = f"diffusion_model.{BLOCK}.adaLN_modulation.0"
    down, up, bias = random(2, DIM, seed=1), random(4 * DIM, 2, seed=2), random(4 * DIM, seed=3)
    tensors = {f"{name}{A}": down, f"{name}{B}": up, f"{name}.lora_B.bias": bias, f"{name}.alpha": torch.tensor(6.0)}
    save_file(tensors, tmp_path / "lora.safetensors")
    found = moved(tmp_path, tmp_path / "lora.safetensors")
    assert close(found[f"{BLOCK}.adaLN_modulation.0.weight"], 3 * f64(up) @ f64(down))
    assert close(found[f"{BLOCK}.adaLN_modulation.0.bias"], 3 * f64(bias))


def test_a_norm_of_lycoris_is_a_whole_difference(tmp_path: Path) -> None:
    norm, bias = random(DIM, seed=1), random(4 * DIM, seed=2)
    tensors = {
        f"lycoris_{BLOCK.replace('.', '_')}_attention_norm1.w_norm": norm,
        f"lycoris_{BLOCK.replace('.', '_')}_adaLN_modulation_0.b_norm": bias,
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    found = moved(tmp_path, tmp_path / "lora.safetensors")
    assert close(found[f"{BLOCK}.attention_norm1.weight"], f64(norm))
    assert close(found[f"{BLOCK}.adaLN_modulation.0.bias"], f64(bias))


@pytest.mark.parametrize("shape", [(DIM,), (1, DIM), (1, 1, DIM)])
def test_a_pad_token_is_changed_by_a_vector_of_any_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    change = random(DIM, seed=1)
    save_file({"diffusion_model.x_pad_token.diff": change.reshape(shape)}, tmp_path / "lora.safetensors")
    found = moved(tmp_path, tmp_path / "lora.safetensors")
    assert close(found["x_pad_token"].reshape(-1), f64(change))


def test_fp8_factors_are_the_values_of_their_codes(tmp_path: Path) -> None:
    written = split("diffusion_model.", A, B)
    written.tensors = {key: held.to(torch.float8_e4m3fn) for key, held in written.tensors.items()}
    found = moved(tmp_path, written.save(tmp_path))
    values = {key: held.double().numpy() for key, held in load_file(tmp_path / "lora.safetensors").items()}
    for part in written.changes:
        name = f"diffusion_model.{part.removesuffix('.weight')}"
        assert close(found[part], values[name + B] @ values[name + A])


@pytest.mark.parametrize("scale", ["lora_A.weight_scale", "lora_up.scale", "scale_weight", "lora_A.scale_reciprocal"])
def test_a_scale_beside_fp8_factors_is_refused_and_not_skipped(tmp_path: Path, scale: str) -> None:
    written = split("diffusion_model.", A, B)
    written.tensors = {key: held.to(torch.float8_e4m3fn) for key, held in written.tensors.items()}
    written.tensors[f"diffusion_model.{BLOCK}.attention.to_q.{scale}"] = torch.tensor(3.0)
    lora = written.save(tmp_path)
    with pytest.raises(DataError, match=r"stands beside factors of 8 bits"):
        bake(tmp_path, lora, skip=True)


def test_factors_that_are_no_floats_are_refused(tmp_path: Path) -> None:
    written = split("diffusion_model.", A, B)
    written.tensors = {key: held.to(torch.int8) for key, held in written.tensors.items()}
    with pytest.raises(DataError, match=r"stored as int8, where a float is wanted"), open_lora(written.save(tmp_path)):
        pass


def generic(folder: Path, **shapes: tuple[int, ...]) -> Path:
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, folder / "base.safetensors")
    return folder / "base.safetensors"


def test_factors_of_a_convolution_over_time_have_five_dimensions(tmp_path: Path) -> None:
    base = generic(tmp_path, **{"patch_embedding.weight": (6, 4, 1, 2, 2), "blocks.0.q.weight": (4, 4)})
    down, up = random(2, 4, 1, 2, 2, seed=1), random(6, 2, 1, 1, 1, seed=2)
    name = "diffusion_model.patch_embedding"
    save_file({f"{name}{A}": down, f"{name}{B}": up}, tmp_path / "lora.safetensors")
    after, _ = bake(tmp_path, tmp_path / "lora.safetensors", base=base)
    exact = f64(up.reshape(6, 2)) @ f64(down.reshape(2, -1))
    np.testing.assert_allclose(f64(after["patch_embedding.weight"]).reshape(6, -1), exact, rtol=1e-6, atol=1e-6)


def test_xlabs_processors_change_both_streams_of_flux(tmp_path: Path) -> None:
    shapes = {
        f"double_blocks.0.{s}_attn.{m}.weight": (n, 8) for s in ("img", "txt") for m, n in (("qkv", 24), ("proj", 8))
    }
    base = generic(tmp_path, **shapes)
    tensors, wanted = {}, {}
    for i, (name, module) in enumerate((("qkv", 24), ("proj", 8))):
        for j, stream in enumerate(("img", "txt"), 1):
            down, up = random(2, 8, seed=4 * i + j), random(module, 2, seed=40 * i + j)
            key = f"double_blocks.0.processor.{name}_lora{j}"
            tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
            wanted[f"double_blocks.0.{stream}_attn.{name}.weight"] = f64(up) @ f64(down)
    save_file(tensors, tmp_path / "lora.safetensors")
    after, _ = bake(tmp_path, tmp_path / "lora.safetensors", base=base)
    assert all(close(f64(after[part]), change) for part, change in wanted.items())


def test_xlabs_processors_change_q_k_and_v_of_a_single_block(tmp_path: Path) -> None:
    down, up = random(2, 8, seed=1), random(24, 2, seed=2)
    key = "single_blocks.0.processor.qkv_lora"
    save_file({f"{key}.down.weight": down, f"{key}.up.weight": up}, tmp_path / "lora.safetensors")
    with open_lora(tmp_path / "lora.safetensors") as file:
        found = {part: dense_rows(file, change, 0, change.rows) for part, (change,) in file.changes.items()}
    assert list(found) == [f"single_transformer_blocks.0.attn.to_{x}.weight" for x in "qkv"]
    assert close(np.concatenate(list(found.values())), f64(up) @ f64(down))


LUMINA2 = {
    "2304 columns": (Written({f"diffusion_model.layers.0.feed_forward.w1{end}": random(*shape, seed=1)
                              for end, shape in ((A, (1, 2304)), (B, (9216, 1)))}), {}),
    "k and v of 8 heads": (Written({f"lora_unet_layers_0_attention_qkv{end}": random(*shape, seed=1)
                                    for end, shape in ((DOWN, (2, 96)), (UP, (160, 2)))}), {}),
    "the header": (split("diffusion_model.", A, B), {"ss_network_module": "networks.lora_lumina"}),
}  # fmt: skip


@pytest.mark.parametrize("told_by", LUMINA2)
def test_a_lora_of_lumina2_is_not_taken_for_one_of_z_image(tmp_path: Path, told_by: str) -> None:
    written, metadata = LUMINA2[told_by]
    save_file(written.tensors, tmp_path / "lora.safetensors", metadata)
    with open_lora(tmp_path / "lora.safetensors") as file:
        has_its_names = told_by != "the header"  # which has q, k and v apart under names that only Z-Image has
        assert file.family.name == ("Lumina-Image 2" if has_its_names else "generic")
        assert has_its_names or any("Lumina-Image 2" in warning for warning in file.warnings)


def test_a_header_does_not_outweigh_the_width_of_z_image(tmp_path: Path) -> None:
    factors = {f"diffusion_model.layers.0.feed_forward.w1{end}": random(*shape, seed=1)
               for end, shape in ((A, (1, 3840)), (B, (10240, 1)))}  # fmt: skip
    save_file(factors, tmp_path / "lora.safetensors", {"modelspec.architecture": "lumina-2"})
    with open_lora(tmp_path / "lora.safetensors") as file:
        assert file.family.name == "Z-Image"


def test_modules_of_omni_are_of_z_image(tmp_path: Path) -> None:
    names = [f"{block}.0.attention.to_q" for block in ("layers", "siglip_refiner")]
    save_file({f"diffusion_model.{name}{end}": random(4, 4, seed=1) for name in names for end in (A, B)},
              tmp_path / "lora.safetensors")  # fmt: skip
    with open_lora(tmp_path / "lora.safetensors") as file:
        assert (file.family.name, set(file.changes)) == ("Z-Image", {f"{name}.weight" for name in names})


UNREAD = {
    "OFT": {f"transformer.{BLOCK}.attention.to_q.oft_R.weight": (8, 28), f"transformer.{BLOCK}.attention.to_q.alpha": ()},
    "BOFT": {f"diffusion_model.{BLOCK}.attention.to_q.oft_blocks": (2, 16, 4, 4)},
    "VeRA": {f"base_model.model.{BLOCK}.attention.to_q.vera_lambda_b": (DIM,)},
}  # fmt: skip


@pytest.mark.parametrize("kind", UNREAD)
@pytest.mark.parametrize("skip", [False, True])
def test_an_adapter_that_is_not_read_is_refused_by_its_kind(tmp_path: Path, kind: str, skip: bool) -> None:
    save_file({key: torch.zeros(shape) for key, shape in UNREAD[kind].items()}, tmp_path / "lora.safetensors")
    with pytest.raises(DataError, match=rf"adds nothing to .*{kind} \(1\), which is not read"):
        bake(tmp_path, tmp_path / "lora.safetensors", skip=skip)
    with open_lora(tmp_path / "lora.safetensors") as file:
        assert (file.unread, len(file.unmatched)) == ({kind: 1}, len(UNREAD[kind]))


def test_a_lora_of_which_nothing_meets_the_model_is_never_done(tmp_path: Path) -> None:
    stranger = {f"diffusion_model.blocks.0.q{end}": random(4, 4, seed=1) for end in (A, B)}
    save_file(stranger, tmp_path / "lora.safetensors")
    with pytest.raises(DataError, match=r'adds nothing to .*: none of its 2 keys, "diffusion_model\.blocks\.0\.q'):
        bake(tmp_path, tmp_path / "lora.safetensors", skip=True)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_lora_for_the_text_encoder_alone_is_never_done(tmp_path: Path) -> None:
    save_file({f"lora_te1_x{end}": random(4, 4, seed=1) for end in (DOWN, UP)}, tmp_path / "lora.safetensors")
    base = generic(tmp_path, **{"blocks.0.q.weight": (4, 4)})
    with pytest.raises(DataError, match=r"all of its 2 keys are for a text encoder"):
        bake(tmp_path, tmp_path / "lora.safetensors", base=base)


@pytest.mark.parametrize(("strangers", "warns"), [(0, False), (1, False), (4, True)])
def test_a_large_share_that_does_not_meet_is_a_warning_with_the_share(
    tmp_path: Path, strangers: int, warns: bool
) -> None:
    from mergetool.adapters.unmatched import remarks

    written = split("diffusion_model.", A, B)  # 14 keys
    written.tensors |= {f"diffusion_model.layers.{i}.attention.to_z{A}": random(2, 2, seed=1) for i in range(strangers)}
    with open_lora(written.save(tmp_path)) as file:
        assert [f"{strangers} of {14 + strangers} keys" in text for text in remarks(file)] == [True] * warns


def test_names_of_the_model_itself_may_have_a_prefix(tmp_path: Path) -> None:
    base = generic(tmp_path, **{"transformer.blocks.0.q.weight": (4, 4), "net.blocks.1.q.weight": (4, 4)})
    factors = {f"lora_unet_blocks_{i}_q{end}": random(4, 4, seed=i) for i in (0, 1) for end in (DOWN, UP)}
    save_file(factors, tmp_path / "lora.safetensors")
    with Checkpoint.open(base) as checkpoint:
        anatomy = recognise(checkpoint.tensors, source="base")
    with open_lora(tmp_path / "lora.safetensors", anatomy=anatomy) as file:
        assert len(file.changes) == 2


def test_text_encoders_of_an_unknown_model_are_counted_among_its_modules(tmp_path: Path) -> None:
    names = ("lora_unet_double_layers_0_attn_w1q", "lora_te1_text_model_encoder_layers_0_mlp_fc1")
    save_file(
        {f"{name}{end}": random(4, 4, seed=1) for name in names for end in (DOWN, UP)}, tmp_path / "lora.safetensors"
    )
    with open_lora(tmp_path / "lora.safetensors") as file:
        assert len(file.changes) == 2
        assert any("1 of 2 changed modules are of text encoders" in warning for warning in file.warnings)


def test_embeddings_that_onetrainer_bundles_are_for_the_text_encoder(tmp_path: Path) -> None:
    written = split("transformer.", DOWN, UP, alpha=1)
    written.tensors["bundle_emb.token.qwen"] = random(4, 8, seed=1)
    with open_lora(written.save(tmp_path)) as file:
        assert (file.text_encoder, file.unmatched) == (("bundle_emb.token.qwen",), ())
