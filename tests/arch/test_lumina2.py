"""Lumina-Image 2's names, shapes and rows, against diffusers' model and ComfyUI's class; which LoRAs diffusers' converter takes."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
import torch
from diffusers import Lumina2Transformer2DModel
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lumina2_lora_to_diffusers as converted

from mergetool.adapters.in_diffusers import Rejected
from mergetool.adapters.lumina2_in_diffusers import modules
from mergetool.arch import recognise
from mergetool.arch.families.lumina2 import LUMINA2, PUBLISHED
from mergetool.arch.families.z_image import reference_shapes
from tests.arch.tables import table
from tests.oracles import ComfyUI

NEWBIE = LUMINA2.derived({**PUBLISHED, "caption": 2560, "pooled": 1024})


def of_diffusers(config: dict[str, object]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        made = Lumina2Transformer2DModel(**config)
    return {name: tuple(value.shape) for name, value in made.state_dict().items()}


def test_names_and_shapes_are_those_of_the_diffusers_model() -> None:
    shapes = LUMINA2.shapes(PUBLISHED, "diffusers")
    assert shapes == of_diffusers({"cap_feat_dim": 2304})
    assert (len(LUMINA2.shapes(PUBLISHED, "comfyui")), len(shapes)) == (399, 459)
    assert sum(map(prod, shapes.values())) == 2_609_769_152


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_comfyui_takes_a_whole_newbie_by_its_names_and_shapes(comfyui: ComfyUI, prefix: str) -> None:
    shapes = {prefix + name: list(shape) for name, shape in LUMINA2.shapes(NEWBIE, "comfyui").items()}
    answer = comfyui.ask("recognise", shapes=shapes)
    count = len(shapes)
    assert answer == {"config": "Lumina2", "missing": [], "unexpected": [], "parameters": count, "log": []}


@pytest.mark.parametrize("layout", LUMINA2.layouts)
def test_a_model_is_written_back_under_its_own_names_and_diffusers_builds_it(layout: str) -> None:
    found = recognise(table(LUMINA2.shapes(PUBLISHED, layout)), source="f")
    assert (found.family, found.layout, LUMINA2.variant(found)) == (LUMINA2, layout, "Lumina-Image 2")
    assert dict(found.outputs(layout)) == found.stored_parts()
    config = LUMINA2.config(found)
    assert config is not None
    assert config.pop("_class_name") == "Lumina2Transformer2DModel"
    assert of_diffusers(config) == of_diffusers({"cap_feat_dim": 2304})


def test_newbie_is_told_and_has_no_config_since_diffusers_has_no_class_for_it() -> None:
    found = recognise(table(LUMINA2.shapes(NEWBIE, "comfyui")), source="f")
    assert (found.family, LUMINA2.variant(found), LUMINA2.config(found)) == (LUMINA2, "NewBie", None)


def test_q_k_and_v_are_not_thirds() -> None:
    parts = recognise(table(LUMINA2.shapes(PUBLISHED, "comfyui")), source="f").parts
    windows = [parts[f"layers.7.attn.to_{letter}.weight"].stored for letter in "qkv"]
    assert [(w.tensor, w.row, w.rows) for w in windows] == [
        ("layers.7.attention.qkv.weight", row, rows) for row, rows in ((0, 2304), (2304, 768), (3072, 768))
    ]


@pytest.mark.parametrize("layout", ["comfyui", "diffusers"])
def test_z_image_is_not_lumina(layout: str) -> None:
    assert not LUMINA2.shows(table(reference_shapes({}, layout)))


@pytest.mark.parametrize(
    ("group", "parts"), [("refiner", 2 * 15 + 2 * 13), ("attention", 30 * 6), ("k", 30), ("adaln", 28 * 2 + 2)]
)
def test_groups(group: str, parts: int) -> None:
    for layout in LUMINA2.layouts:
        anatomy = recognise(table(LUMINA2.shapes(PUBLISHED, layout)), source="f")
        found = [part for part in anatomy.parts.values() if group in LUMINA2.groups(part.name, part.shape)]
        assert len(found) == parts
        assert all(LUMINA2.groups(part.name, part.shape) for part in anatomy.parts.values())


# -- LoRAs under ComfyUI's names, which diffusers' converter knows at the published width alone -------------------------------------


def lora(blocks: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Factors of rank 1 of every matrix of blocks."""
    generator = np.random.default_rng(0)
    found = {}
    for name, (rows, *columns) in LUMINA2.shapes(PUBLISHED, "comfyui").items():
        if name.startswith(tuple(f"{block}." for block in blocks)) and columns:
            module = f"diffusion_model.{name.removesuffix('.weight')}"
            found[f"{module}.lora_A.weight"] = torch.from_numpy(generator.standard_normal((1, columns[0])))
            found[f"{module}.lora_B.weight"] = torch.from_numpy(generator.standard_normal((rows, 1)))
    return found


WHOLE = ("layers.0", "layers.1", "context_refiner.0")


def test_the_modules_of_whole_blocks_are_those_that_the_converter_makes() -> None:
    tensors = lora(WHOLE)
    theirs = {key.removeprefix("transformer.").rpartition(".lora_")[0] for key in converted(dict(tensors))}
    assert modules(tensors).keys() == theirs
    assert {key for keys in modules(tensors).values() for key in keys} == tensors.keys()


@pytest.mark.parametrize(
    ("blocks", "dropped", "extra"),
    [
        (("layers.1",), "", ""),  # no first
        (WHOLE, "feed_forward.w2", ""),
        (WHOLE, "", "diffusion_model.cap_embedder.1"),
        (WHOLE, "", "lora_unet_layers_0_attention_out"),
    ],
)
def test_what_the_converter_rejects_is_said_to_be(blocks: tuple[str, ...], dropped: str, extra: str) -> None:
    tensors = {key: value for key, value in lora(blocks).items() if not dropped or dropped not in key}
    tensors |= {f"{extra}.lora_A.weight": torch.zeros(1, 1)} if extra else {}
    with pytest.raises((KeyError, ValueError)):
        converted(dict(tensors))
    with pytest.raises(Rejected):
        modules(tensors)
