"""What families say of fp16, against ComfyUI's own list of dtypes and the capping in ComfyUI's and diffusers' models."""

from __future__ import annotations

import importlib
import inspect

import pytest

from mergetool.arch import recognise
from mergetool.arch.signs import Fp16
from mergetool.engine import job
from mergetool.options.merging import MergeOptions
from tests.arch.published import MODELS
from tests.arch.tables import table
from tests.oracles import ComfyUI

CAPPED = {"Flux.1": "flux", "Flux.2": "flux2", "Chroma": "chroma"}


def told(name: str) -> Fp16:
    found = recognise(table(MODELS[name]), source="f")
    return found.family.in_fp16(found)


@pytest.mark.parametrize("name", MODELS)
def test_a_family_avoids_fp16_where_comfyui_does(comfyui: ComfyUI, name: str) -> None:
    answer = comfyui.ask("recognise", shapes={n: list(s) for n, s in MODELS[name].items()}, dtypes_only=True)
    assert ("float16" in answer["dtypes"]) == (told(name) != "avoided")  # the witness has no spread here


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
