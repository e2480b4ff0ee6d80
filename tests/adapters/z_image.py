"""Z-Image as the oracles are asked for it; `files` has its LoRAs."""

from __future__ import annotations

from collections.abc import Mapping

from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers

from mergetool.arch.families.z_image import Z_IMAGE
from tests.oracles.case import Case

_DEEP = {"patch": 64, "noise_refiner": 2, "context_refiner": 2}
PUBLISHED: Mapping[str, int] = Z_IMAGE.derived({**_DEEP, "dim": 3840, "head": 128, "caption": 2560, "layers": 30})
SMALL: Mapping[str, int] = Z_IMAGE.derived({**_DEEP, "dim": 96, "head": 32, "caption": 64, "layers": 2})
CONFIG = {"dim": 96, "n_layers": 2, "n_heads": 3, "n_kv_heads": 3, "cap_feat_dim": 64, "axes_dims": [8, 12, 12]}
"""The same model as a config of diffusers."""

CASE = Case(
    family=Z_IMAGE,
    small=SMALL,
    published={"base": PUBLISHED},
    configs={"base": "ZImage"},
    pipeline="ZImagePipeline",
    model="ZImageTransformer2DModel",
    config=CONFIG,
    matrices=52,
    renamed=True,
    converter=convert_z_image_transformer_checkpoint_to_diffusers,
    stack="layers.",
    kept=("adaLN", "refiner"),
    unmerged=("x_pad_token", "cap_pad_token"),
)
