"""The register of families: one file each, and its line in `FAMILIES`. No other room names one.

A family is a subclass of `KnownFamily` that is mostly data: ``names``, a table of `Named` rows in canonical order (which is diffusers' naming); ``signatures``,
the tensors that show such a model in each layout; ``measures``, where its sizes stand; groups, presets, and what may be quantised. Its test holds the
table against diffusers' class and converter and ComfyUI's own maps, as tests/arch/test_z_image.py does, and ``python -m tests.reference`` writes its section of
docs/reference/families.md.

Models of `NAMED` families are recognised, and nothing more: a row in `named` has a family's name and its signs. They merge as generic ones do.
"""

from __future__ import annotations

from collections.abc import Mapping

from mergetool.arch.families.chroma import CHROMA
from mergetool.arch.families.controlnet import SD15_CONTROLNET, SDXL_CONTROLNET
from mergetool.arch.families.flux import FLUX
from mergetool.arch.families.flux2 import FLUX2
from mergetool.arch.families.lumina2 import LUMINA2
from mergetool.arch.families.named import NAMED
from mergetool.arch.families.qwen_image import QWEN_IMAGE
from mergetool.arch.families.sd3 import SD3
from mergetool.arch.families.sd15 import SD15
from mergetool.arch.families.sdxl import SDXL_UNET
from mergetool.arch.families.wan import WAN
from mergetool.arch.families.z_image import Z_IMAGE
from mergetool.arch.generic import NamedFamily
from mergetool.arch.known import KnownFamily
from mergetool.arch.sampling import SamplingDefaults
from mergetool.checkpoint.header import TensorInfo

FAMILIES: tuple[KnownFamily, ...] = (
    *(Z_IMAGE, FLUX2, CHROMA, FLUX, SDXL_UNET, SD15, SD3, LUMINA2, WAN, QWEN_IMAGE),
    *(SDXL_CONTROLNET, SD15_CONTROLNET),
)
"""Every family that is known by name; of two that would take a file the first does."""


def sampling_of(pipeline: str, config: Mapping[str, object]) -> SamplingDefaults | None:
    """The settings for a pipeline with these entries of its configs, None for one of no family."""
    every = (settings for family in FAMILIES for settings in family.sampling)
    return next((settings for settings in every if settings.fits(pipeline, config)), None)


def shown_by(tensors: Mapping[str, TensorInfo]) -> KnownFamily | None:
    """The family of ``tensors`` under the model's own names; None where none is known."""
    return next((family for family in FAMILIES if family.shows(tensors)), None)


def named_by(tensors: Mapping[str, TensorInfo]) -> NamedFamily | None:
    """The family of `NAMED` of ``tensors`` under the model's own names; None where none is."""
    shapes = {name: info.shape for name, info in tensors.items()}
    return next((family for family in NAMED if family.shows(shapes)), None)
