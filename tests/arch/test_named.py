"""Families with a name and no table: every class of ComfyUI's list, and every class of diffusers, is called by the right name or by none."""

from __future__ import annotations

import inspect
import re
import warnings
from dataclasses import dataclass
from math import prod
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import mergetool
from mergetool.arch import Anatomy, recognise
from mergetool.arch.families import FAMILIES, NAMED
from mergetool.quant.register import quantiser
from mergetool.recipe.quantised import is_quantised
from tests.arch.tables import table
from tests.oracles import ComfyUI
from tests.oracles.architectures import Shapes
from tests.oracles.supported import KIN, TRAINED, packed, supported, tensors_of

CLASSES = {
    "SD1.5": "SD15 SD15_instructpix2pix Stable_Zero123",
    "SDXL": "SDXL SDXL_instructpix2pix SSD1B KOALA_700M KOALA_1B Segmind_Vega",
    "SD3": "SD3",
    "Flux.1": "Flux FluxInpaint FluxSchnell",
    "Flux.2": "Flux2",
    "Chroma": "Chroma ChromaRadiance",
    "Z-Image": "ZImage Z-Image_Omni",
    "Lumina-Image 2": "Lumina2 NewBie",
    "Qwen-Image": "QwenImage",
    "Wan": "WAN22_T2V WAN21_CausalAR_T2V WAN21_T2V WAN21_I2V WAN21_FunControl2V WAN21_Vace WAN21_Camera WAN22_Camera WAN22_S2V WAN21_HuMo"
    " WAN22_Animate WAN21_FlowRVS WAN21_SCAIL WAN21_SCAIL2 WAN22_WanDancer",
    "Stable Diffusion 2": "SD20 SD21UnclipL SD21UnclipH LotusD SD_X4Upscaler",
    "SDXL refiner": "SDXLRefiner",
    "Stable Video Diffusion": "SVD_img2vid SV3D_u SV3D_p",
    "Stable Cascade": "Stable_Cascade_C Stable_Cascade_B",
    "Stable Audio": "StableAudio StableAudio3",
    "AuraFlow": "AuraFlow",
    "PixArt": "PixArtAlpha PixArtSigma",
    "HunyuanDiT": "HunyuanDiT HunyuanDiT1",
    "LongCat-Image": "LongCatImage",
    "Ovis-Image": "Ovis",
    "HunyuanImage 2.1": "HunyuanImage21 HunyuanImage21Refiner",
    "HiDream-I1": "HiDream",
    "HiDream-O1": "HiDreamO1",
    "OmniGen2": "Omnigen2",
    "Boogu-Image": "Boogu",
    "Mage-Flow": "MageFlow",
    "JoyImage": "JoyImage",
    "Ideogram 4": "Ideogram4",
    "Krea 2": "Krea2",
    "Lens": "Lens",
    "ERNIE-Image": "ErnieImage",
    "Anima": "Anima",
    "Z-Image in pixels": "ZImagePixelSpace",
    "PixelDiT": "PixelDiTT2I",
    "PiD": "PiD",
    "HunyuanVideo": "HunyuanVideo HunyuanVideoI2V HunyuanVideoSkyreelsI2V",
    "HunyuanVideo 1.5": "HunyuanVideo15 HunyuanVideo15_SR_Distilled",
    "LTX-Video": "LTXV",
    "LTX-2": "LTXAV",
    "Mochi": "GenmoMochi",
    "Cosmos": "CosmosT2V CosmosI2V",
    "Cosmos Predict2": "CosmosT2IPredict2 CosmosI2VPredict2",
    "CogVideoX": "CogVideoX_T2V CogVideoX_I2V CogVideoX_Inpaint",
    "Kandinsky 5": "Kandinsky5 Kandinsky5Image",
    "MiniMax H3": "MiniMaxH3",
    "SeedVR2": "SeedVR2",
    "ACE-Step": "ACEStep",
    "ACE-Step 1.5": "ACEStep15",
    "Hunyuan3D 2": "Hunyuan3Dv2 Hunyuan3Dv2mini",
    "Hunyuan3D 2.1": "Hunyuan3Dv2_1",
    "TripoSplat": "TripoSplat",
    "generic": "RT_DETR_v4 SAM3 SAM31 DepthAnything3",
}
FAMILY = {name.replace("_Omni", " Omni"): family for family, names in CLASSES.items() for name in names.split()}
DETECTED = {
    **dict.fromkeys(("WAN21_CausalAR_T2V", "WAN21_FlowRVS"), "WAN21_T2V"),  # told by the header's metadata
    **{name: of for name, (of, _) in KIN.items()},
}

IN_DIFFUSERS = {
    "Stable Video Diffusion": ("UNetSpatioTemporalConditionModel",),
    "Stable Audio": ("StableAudioDiTModel", "StableAudio3DiTModel"),
    "AuraFlow": ("AuraFlowTransformer2DModel",),
    "PixArt": ("PixArtTransformer2DModel",),
    "LongCat-Image": ("LongCatImageTransformer2DModel",),
    "Ovis-Image": ("OvisImageTransformer2DModel",),
    "HunyuanImage 2.1": ("HunyuanImageTransformer2DModel",),
    "HunyuanVideo": ("HunyuanVideoTransformer3DModel", "HunyuanVideoFramepackTransformer3DModel"),
    "HunyuanVideo 1.5": ("HunyuanVideo15Transformer3DModel",),
    "JoyImage": ("JoyImageEditTransformer3DModel",),
    "Ideogram 4": ("Ideogram4Transformer2DModel",),
    "Krea 2": ("Krea2Transformer2DModel",),
    "ERNIE-Image": ("ErnieImageTransformer2DModel",),
    "LTX-Video": ("LTXVideoTransformer3DModel",),
    "LTX-2": ("LTX2VideoTransformer3DModel",),
    "Mochi": ("MochiTransformer3DModel",),
    "Cosmos": ("CosmosTransformer3DModel",),
    "CogVideoX": ("CogVideoXTransformer3DModel",),
    "Kandinsky 5": ("Kandinsky5Transformer3DModel",),
    "MiniMax H3": ("MiniMaxH3Transformer3DModel",),
    "ACE-Step 1.5": ("AceStepTransformer1DModel",),
    "Wan": ("SkyReelsV2Transformer3DModel", "ChronoEditTransformer3DModel", "WanAnimateTransformer3DModel"),
    # which have names in common with others
    "generic": (
        *("AllegroTransformer3DModel", "CogView4Transformer2DModel", "CogView3PlusTransformer2DModel", "SanaTransformer2DModel"),
        *("SanaVideoTransformer3DModel", "Kandinsky6Transformer3DModel", "Kandinsky6SRTransformer3DModel", "QwenImage21Transformer2DModel"),
        *("NucleusMoEImageTransformer2DModel", "MotifVideoTransformer3DModel", "BriaTransformer2DModel", "BriaFiboTransformer2DModel"),
        *("BriaFibo2Transformer2DModel", "Flux3Transformer2DModel", "GlmImageTransformer2DModel", "UNet2DConditionModel", "UNet3DConditionModel"),
        *("MiniMaxMusic3Transformer1DModel", "HeliosTransformer3DModel", "PRXTransformer2DModel", "SanaWMTransformer3DModel"),
    ),
}  # fmt: skip
CONFIGURED = {
    "Stable Diffusion 2": ("UNet2DConditionModel", {"cross_attention_dim": 1024, "use_linear_projection": True}),
    "SDXL refiner": (
        "UNet2DConditionModel",
        {"cross_attention_dim": 1280, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
         "projection_class_embeddings_input_dim": 2560},
    ),
    "Cosmos Predict2": ("CosmosTransformer3DModel", {"extra_pos_embed_type": None, "num_layers": 2}),
    "HunyuanDiT": ("HunyuanDiT2DModel", {"sample_size": 32, "in_channels": 4, "patch_size": 2, "hidden_size": 1408, "num_layers": 2}),
    "HiDream-I1": (
        "HiDreamImageTransformer2DModel",
        {"patch_size": 2, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 20, "caption_channels": [64, 64], "text_emb_dim": 64,
         "axes_dims_rope": [8, 8], "max_resolution": [8, 8], "llama_layers": [0, 1]},
    ),
}  # fmt: skip
SMALL = (
    "num_layers",
    "num_single_layers",
    "n_layers",
    "num_refiner_layers",
    "n_refiner_layers",
    "num_visual_blocks",
    "num_text_blocks",
)


@dataclass(frozen=True)
class Trained:
    """Two models of one family in a folder, beside their difference."""

    family: str
    folder: Path
    values: dict[str, torch.Tensor]
    changed: dict[str, torch.Tensor]

    @property
    def matrices(self) -> list[str]:
        """The tensors that differ."""
        return [name for name, tensor in self.changed.items() if not torch.equal(tensor, self.values[name])]


def read(tensors: Shapes, prefix: str = "") -> Anatomy:
    return recognise(table(tensors, prefix=prefix), source="model.safetensors")


def shown(tensors: Shapes) -> list[str]:
    """The families whose recognisers take a model, of which one would be enough."""
    known = [family.name for family in FAMILIES if family.shows(table(tensors))]
    return known + [family.name for family in NAMED if family.shows(tensors)] or ["generic"]


def test_every_class_of_comfyui_is_of_one_family(comfyui: ComfyUI) -> None:
    models = supported(comfyui)
    assert {name: one.detected for name, one in models.items()} == {name: DETECTED.get(name, name) for name in FAMILY}
    assert {name: shown(dict(one.tensors)) for name, one in models.items()} == {
        name: [of] for name, of in FAMILY.items()
    }


def test_a_model_without_a_table_keeps_the_names_that_comfyui_gives(comfyui: ComfyUI) -> None:
    """A wrapper of one program is a module of another's model; nothing of a model is taken for a bundled one."""
    prefix = "model.diffusion_model."
    for name, one in supported(comfyui).items():
        found = read(dict(one.tensors), prefix)
        assert (found.family.name, found.outside) == (FAMILY[name], {}), name
        if found.family.keeps_names:
            assert {part.stored.tensor for part in found.parts.values()} == {prefix + own for own in one.tensors}
            assert {re.sub(r"\.scale$", ".weight", own) for own in one.tensors} == set(found.parts)


def test_what_is_quantised_is_what_comfyui_reads_so(comfyui: ComfyUI) -> None:
    """Only matrices of linear layers, and none whose stored size ComfyUI takes for one of the model's."""
    few = {}
    for name, one in supported(comfyui).items():
        if FAMILY[name] not in {family.name for family in NAMED}:
            continue
        found = read(dict(one.tensors))
        takes = is_quantised(found, quantiser("nvfp4"))
        chosen = {part.stored.tensor for part in found.parts.values() if takes([part])}
        assert chosen <= one.linear, name
        assert packed(comfyui, name, chosen), name
        kept = {own for own in chosen if re.search(r"embed|refiner|modulat|adaln|norm", own, re.IGNORECASE)}
        assert not kept, (name, kept)
        few[name] = sum(prod(one.tensors[own]) for own in chosen) / sum(map(prod, one.tensors.values()))
    assert min(few.values()) > 0.05, few


def of_diffusers(name: str, config: dict[str, object] | None = None) -> Shapes:
    """The tensors of a class of diffusers, by default as its own defaults are, with few blocks."""
    built = getattr(diffusers, name, None) or getattr(diffusers.models.transformers, name)
    few = {key: 2 for key in SMALL if key in inspect.signature(built).parameters}
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = built(**(few if config is None else config))
    return {key: tuple(tensor.shape) for key, tensor in made.state_dict().items()}


def test_the_readme_counts_the_named_families() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    assert f"[{len(NAMED)} more](docs/reference/families.md#named-families)" in readme
    assert all(family.name in readme for family in FAMILIES if not family.copy_of)


def test_a_class_of_diffusers_is_of_the_same_family() -> None:
    found = {name: shown(of_diffusers(name)) for names in IN_DIFFUSERS.values() for name in names}
    assert found == {name: [family] for family, names in IN_DIFFUSERS.items() for name in names}
    assert {family: shown(of_diffusers(*of)) for family, of in CONFIGURED.items()} == {
        family: [family] for family in CONFIGURED
    }


@pytest.fixture(scope="module", params=TRAINED)
def trained(request: pytest.FixtureRequest, comfyui: ComfyUI, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A small model of a class of ComfyUI's, one trained from it, and their difference."""
    family: str = request.param
    of, config = TRAINED[family]
    folder = tmp_path_factory.mktemp("trained")
    shapes = tensors_of(comfyui, of, config)
    values = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(index))
        for index, (name, shape) in enumerate(shapes.items())
    }
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in values.items()}, folder / "base.safetensors")
    changed = {
        name: tensor + (0.1 if tensor.ndim == 2 and min(tensor.shape) >= 32 else 0) for name, tensor in values.items()
    }
    save_file(
        {f"model.diffusion_model.{name}": tensor for name, tensor in changed.items()}, folder / "variant.safetensors"
    )
    mergetool.diff(
        str(folder / "base.safetensors"),
        str(folder / "variant.safetensors"),
        str(folder / "lora.safetensors"),
        rank=2,
        dtype="fp32",
    )
    return Trained(family, folder, values, changed)


def test_comfyui_loads_every_module_of_a_difference(comfyui: ComfyUI, trained: Trained) -> None:
    answer = comfyui.ask(
        "loaded_lora",
        of=TRAINED[trained.family][0],
        config=TRAINED[trained.family][1],
        lora=trained.folder / "lora.safetensors",
    )
    assert answer["loaded"] == sorted(f"diffusion_model.{name}" for name in trained.matrices)
    assert (len(trained.matrices) > 10, answer["log"]) == (True, [])


@pytest.mark.parametrize("trained", ["Krea 2", "Stable Audio"], indirect=True)
@pytest.mark.parametrize("spelling", ["diffusion_model.{}", "transformer.{}", "lora_unet_{}"])
def test_a_lora_is_baked_by_its_tensors_names(trained: Trained, spelling: str) -> None:
    lora = load_file(trained.folder / "lora.safetensors")
    respelled = {}
    for key, tensor in lora.items():
        module, end = re.fullmatch(r"diffusion_model\.(.+)(\.lora_[AB]\.weight)", key).groups()  # type: ignore[union-attr]
        flat = spelling.startswith("lora_unet")
        respelled[spelling.format(module.replace(".", "_") if flat else module) + end] = tensor
    save_file(respelled, trained.folder / "respelled.safetensors")
    out = trained.folder / "baked.safetensors"
    mergetool.bake(
        str(trained.folder / "base.safetensors"),
        [str(trained.folder / "respelled.safetensors")],
        str(out),
        overwrite=True,
    )
    baked = load_file(out)
    for name in trained.matrices:
        torch.testing.assert_close(baked[f"model.diffusion_model.{name}"], trained.changed[name], rtol=0, atol=1e-4)
