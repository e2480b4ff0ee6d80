"""Which tensors of a file are bundled with its model, by the names that published files give them."""

from __future__ import annotations

import pytest

from mergetool.arch.prefixes import bundled

SDXL = {
    "first_stage_model.decoder.conv_in.weight": "VAE",
    "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": "text encoder",
    "conditioner.embedders.1.model.logit_scale": "text encoder",
    "model_ema.diffusion_modelinput_blocks00weight": "EMA",
    "alphas_cumprod": "schedule",
    "denoiser.sigmas": "schedule",
    "v_pred": "flag",
    "model.never_seen": "other",
}


def test_beside_a_prefixed_model_everything_is_bundled() -> None:
    names = ["model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.vae.weight", *SDXL]
    assert bundled(names) == SDXL


def test_beside_a_bare_model_the_table_decides() -> None:
    model = ["layers.0.attention.qkv.weight", "x_pad_token", "conditioner_proj.weight", "denoiser.0.weight"]
    parts = {"vae.decoder.conv_in.bias": "VAE", "text_encoders.qwen3_4b.logit_scale": "text encoder", "ztsnr": "flag"}
    assert bundled([*model, *parts]) == parts


@pytest.mark.parametrize(
    "names",
    [
        ["first_stage_model.encoder.conv_in.weight", "betas"],
        ["text_encoders.t5xxl.transformer.shared.weight", "spiece_model"],
        ["decoder.conv_in.weight"],
    ],
)
def test_what_is_alone_in_its_file_is_the_model(names: list[str]) -> None:
    assert bundled(names) == {}
