"""The tensors of published models of every family, in ComfyUI's layout."""

from __future__ import annotations

from mergetool.arch.families import chroma, flux, flux2, lumina2, qwen_image, sd3, wan, z_image
from mergetool.arch.families.sd15 import SD15
from tests.sdxl import PUBLISHED, Shapes, shapes

SD1 = {"width0": 320, "width1": 640, "width2": 1280, "input": 4, "output": 4}


def _sd15() -> Shapes:
    stacks = {".".join(s.path[:i]): 1 for s in SD15.table.spots for i, c in enumerate(s.path) if c == "{i}"}
    return SD15.shapes(SD15.derived(SD1 | stacks), "comfyui")


MODELS: dict[str, Shapes] = {
    "SD1.5": _sd15(),
    "SDXL": shapes(PUBLISHED, "comfyui"),
    "SD3": sd3.SD3.shapes(sd3.SD3.derived(dict(sd3.MEDIUM)), "comfyui"),
    "SD3.5 Large": sd3.SD3.shapes(sd3.SD3.derived(dict(sd3.LARGE)), "comfyui"),
    "Flux.1": flux.FLUX.shapes(flux.DEV, "comfyui"),
    "Flux.1 Fill": flux.FLUX.shapes({**flux.DEV, "patch_in": 384}, "comfyui"),
    "Flux.2": flux2.FLUX2.shapes(flux2.DEV, "comfyui"),
    "Chroma": chroma.CHROMA.shapes(chroma.HD, "comfyui"),
    "Lumina-Image 2": lumina2.LUMINA2.shapes(lumina2.PUBLISHED, "comfyui"),
    "Qwen-Image": qwen_image.QWEN_IMAGE.shapes(qwen_image.PUBLISHED, "comfyui"),
    "Wan": wan.WAN.shapes(wan.T2V_14B, "comfyui"),
    "Z-Image": z_image.reference_shapes({}, "comfyui"),
}
