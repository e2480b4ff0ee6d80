"""What families say of fp16, against ComfyUI's own list of dtypes and the capping in ComfyUI's and diffusers' models."""

from __future__ import annotations

import importlib
import inspect

import pytest

from mergetool.arch import recognise
from mergetool.arch.families import FAMILIES, chroma, flux, flux2, lumina2, qwen_image, sd3, wan, z_image
from mergetool.arch.families.sd15 import SD15
from mergetool.arch.families.sdxl import SDXL_UNET
from mergetool.arch.signs import Fp16
from mergetool.engine import job
from mergetool.options.merging import MergeOptions
from tests.arch.tables import table
from tests.oracles import ComfyUI
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
CAPPED = {"Flux.1": "flux", "Flux.2": "flux2", "Chroma": "chroma"}


def told(name: str) -> Fp16:
    found = recognise(table(MODELS[name]), source="f")
    return found.family.in_fp16(found)


@pytest.mark.parametrize("name", MODELS)
def test_a_family_avoids_fp16_where_comfyui_does(comfyui: ComfyUI, name: str) -> None:
    answer = comfyui.ask("recognise", shapes={n: list(s) for n, s in MODELS[name].items()}, dtypes_only=True)
    assert ("float16" in answer["dtypes"]) == (told(name) != "avoided")  # the witness has no spread here


def test_every_family_is_among_them() -> None:
    assert {recognise(table(MODELS[name]), source="f").family for name in MODELS} >= {*FAMILIES, SDXL_UNET}


@pytest.mark.parametrize("name", [name for name in MODELS if told(name) in ("computed", "capped")])
def test_a_family_is_capped_where_diffusers_model_caps_it(name: str) -> None:
    modules = {"SD1.5": "unets.unet_2d_condition", "SDXL": "unets.unet_2d_condition", "SD3": "transformers.transformer_sd3",
               "SD3.5 Large": "transformers.transformer_sd3", "Wan": "transformers.transformer_wan"}  # fmt: skip
    path = modules.get(name) or f"transformers.transformer_{CAPPED[name]}"
    module = importlib.import_module(f"diffusers.models.{path}")
    assert ("65504" in inspect.getsource(module)) == (told(name) == "capped")


@pytest.mark.parametrize(("dtype", "warned"), [("fp16", True), ("bf16", False), (None, False)])
def test_an_fp16_output_is_warned_of_with_what_programs_do(dtype: str | None, warned: bool) -> None:
    with job.open_merge("lab.base", MergeOptions(dtype=dtype), fingerprints=False) as plan:
        assert any("only where the spread of one norm is small" in text for text in plan.warnings) == warned
