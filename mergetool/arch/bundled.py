"""What a file holds beside its diffusion model: VAE, text encoders, EMA weights, noise schedules, and flags that say how to sample it.

One table for every family. Names are compared component by component, as stored. A file that holds nothing else, such as a VAE of its own,
bundles nothing: what it holds is then the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

Kind = Literal["VAE", "text encoder", "EMA", "schedule", "flag", "other"]

MODEL_PREFIXES = ("model.diffusion_model.", "model.model.")
"""Where all-in-one checkpoints keep the diffusion model: everything else in such a file is bundled with it (ComfyUI ``model_detection``)."""

_TOP: Mapping[str, Kind] = {
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
_NAMES: Mapping[str, Kind] = {
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


def kind_of(stored: str) -> Kind | None:
    """What the tensor ``stored`` is bundled as by its name alone; None for one of the model."""
    return _NAMES.get(stored) or _TOP.get(stored.partition(".")[0])


def bundled(names: Iterable[str]) -> dict[str, Kind]:
    """The tensors of a file that are bundled with its model, in the file's order; empty where no model would be left.

    Under a prefix of `MODEL_PREFIXES` the model is what has the prefix; in other files the table decides.
    """
    stored = list(names)
    prefix = next((p for p in MODEL_PREFIXES if any(name.startswith(p) for name in stored)), None)
    if prefix is not None:
        return {name: kind_of(name) or "other" for name in stored if not name.startswith(prefix)}
    found = {name: kind for name in stored if (kind := kind_of(name)) is not None}
    return found if any("." in name for name in stored if name not in found) else {}
