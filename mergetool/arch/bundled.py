"""Recognise tensors beside the diffusion model in a file.

They are VAE, text encoders, EMA weights, noise schedules, and flags that say how to sample the model.

One table for every family; `arch.prefixes` applies it. Names are compared component by component. A file that holds nothing else, such as a
VAE of its own, bundles nothing: what it holds is then the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

BundledKind = Literal["VAE", "text encoder", "EMA", "schedule", "flag", "other"]

_TOP: Mapping[str, BundledKind] = {
    **dict.fromkeys(("vae", "first_stage_model", "audio_vae", "pretransform", "vocoder"), "VAE"),
    **dict.fromkeys(
        (
            *("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4", "text_encoders"),
            *("cond_stage_model", "conditioner", "clip_l", "clip_g", "t5xxl"),
        ),
        "text encoder",
    ),
    **dict.fromkeys(("model_ema", "ema", "ema_model"), "EMA"),
}
_NAMES: Mapping[str, BundledKind] = {
    **dict.fromkeys(
        (
            *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
            *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
            *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
            *("logvar", "lvlb_weights", "denoiser.sigmas", "global_step", "epoch"),
        ),
        "schedule",
    ),
    **dict.fromkeys(("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min"), "flag"),
}


def kind_of(name: str) -> BundledKind | None:
    """The kind of a bundled tensor by its ``name`` alone; None for one of the model.

    The name has no wrappers before it.
    """
    return _NAMES.get(name) or _TOP.get(name.partition(".")[0])
