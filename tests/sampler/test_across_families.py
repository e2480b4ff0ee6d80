"""Pictures of other families by diffusers' pipelines, alone and as one of two stages, against the same pipelines run by hand."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FluxImg2ImgPipeline,
    FluxTransformer2DModel,
    ZImageImg2ImgPipeline,
    ZImagePipeline,
)
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

import mergetool
from mergetool import models
from mergetool.api.pictures import Picture, Sample
from mergetool.arch.families import FAMILIES
from mergetool.arch.sampling import SamplingDefaults
from mergetool.cli.sample import _stage_line
from mergetool.errors import DataError, FamilyError, UsageError
from mergetool.sampler import settings
from mergetool.sampler.denoise import bring_to, starting_noise
from mergetool.sampler.diffusers_studio import DiffusersStudio, StageResult
from mergetool.sampler.parts import Components
from mergetool.sampler.pipeline_folder import PipelineFolder
from mergetool.sampler.request import PipelineRefinement, Refinement, Shot
from mergetool.sampler.studio import Studio
from tests import foreign_pipelines

PROMPT = "a blue circle on a gold background"
# diffusers' own: of its Chroma, of how its schedulers make arrays
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Future", "Deprecation")]
MAKERS = {
    "flux": foreign_pipelines.flux,
    "chroma": foreign_pipelines.chroma,
    "sdxl": foreign_pipelines.sdxl,
    "sd3": foreign_pipelines.sd3,
    "qwen_image": foreign_pipelines.qwen_image,
}

SCALES = {"FluxImg2ImgPipeline": 3.5}
"""The scales of the families where diffusers has others, of 7, for pictures that start from pictures."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("foreign")
    return {name: make(root / name) for name, make in (MAKERS | {"sd15": foreign_pipelines.sd15}).items()}


def by_hand(pipeline: Any, seed: int, **given: Any) -> np.ndarray[Any, Any]:
    return np.array(drawn(pipeline, seed, **given)[0])


def drawn(pipeline: Any, seed: int, **given: Any) -> Any:
    """Qwen-Image's guidance does nothing in diffusers without a negative prompt; its own example gives a blank."""
    pipeline.set_progress_bar_config(disable=True)
    if type(pipeline).__name__ in SCALES:
        given = {"guidance_scale": SCALES[type(pipeline).__name__], **given}
    blank = {"negative_prompt": " "} if "QwenImage" in type(pipeline).__name__ else {}
    return pipeline(prompt=PROMPT, generator=torch.Generator().manual_seed(seed), **blank, **given).images


def loaded(folder: Path, **given: Any) -> Any:
    return DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, **given)


def sampled(base: object, **given: Any) -> Picture:
    (picture,) = mergetool.sample(PROMPT, base=str(base), **given)
    return picture


@pytest.mark.parametrize("name", MAKERS)
def test_one_stage_is_the_pipelines_own_picture(folders: Mapping[str, Path], name: str) -> None:
    wanted = by_hand(loaded(folders[name]), 7, num_inference_steps=3, width=64, height=48)
    found = sampled(folders[name], seeds=7, steps=3, size=(64, 48))
    assert np.array_equal(np.asarray(found.image), wanted)


@pytest.mark.parametrize("name", MAKERS)
def test_turbo_goes_on_from_another_familys_picture_as_its_image_pipeline_does(
    folders: Mapping[str, Path], name: str
) -> None:
    first = by_hand(loaded(folders[name]), 7, num_inference_steps=3, width=64, height=64)
    found = sampled(folders[name], refiner="lab.turbo", seeds=7, steps=3, size=(64, 64), strength=0.4, refine_steps=8,
                    strength_as="diffusers", refine_scheduler="diffusers")  # fmt: skip

    studio = Studio(Components.find("lab.turbo"))
    stage = Refinement("lab.turbo", 8, shift=3.0, strength=0.4, strength_as="diffusers", scheduler="diffusers")
    turbo = ZImagePipeline.from_pretrained(models.EMBEDDED / "turbo", torch_dtype=torch.float32)
    noise = starting_noise([8], (16, 16, 16))
    image = ZImageImg2ImgPipeline(**turbo.components)
    wanted = by_hand(
        image,
        8,
        image=torch.zeros(1, 3, 64, 64),
        latents=bring_to(studio.encode(first[None]), noise, stage.levels()[0]),
        strength=0.4,
        num_inference_steps=8,
        guidance_scale=0.0,
        height=64,
        width=64,
    )
    # Captions are padded to 512 there: a float32 product of another shape differs in its last bits.
    assert np.abs(np.asarray(found.image).astype(int) - wanted).max() <= 1


def test_a_second_stage_of_another_family_is_its_image_pipeline(folders: Mapping[str, Path]) -> None:
    first = sampled("lab.turbo", seeds=7, steps=2, guidance=0)
    found = sampled(
        "lab.turbo", seeds=7, steps=2, guidance=0, refiner=str(folders["flux"]), strength=0.5, refine_steps=4
    )
    flux = FluxImg2ImgPipeline.from_pretrained(folders["flux"], torch_dtype=torch.float32)
    wanted = by_hand(flux, 8, image=first.image, strength=0.5, num_inference_steps=8, width=64, height=64)
    assert np.array_equal(np.asarray(found.image), wanted)


@pytest.fixture(scope="module")
def refiner(folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foreign_pipelines.sdxl_refiner(tmp_path_factory.mktemp("refiner") / "refiner", folders["sdxl"])


@pytest.mark.parametrize("name", ["flux", "sd15", "sd3", "qwen_image", "sdxl"])
def test_two_models_of_one_family_hand_latents_over(folders: Mapping[str, Path], refiner: Path, name: str) -> None:
    second = refiner if name == "sdxl" else folders[name]
    found = sampled(folders[name], refiner=str(second), seeds=7, steps=3, size=(64, 48), refine_steps=2, strength=0.5)
    pipeline = loaded(folders[name])
    latents = by_hand_latents(pipeline, 7, num_inference_steps=3, width=64, height=48)
    image = loaded(refiner) if name == "sdxl" else from_pictures(pipeline)
    wanted = by_hand(image, 8, image=latents, strength=0.5, num_inference_steps=4, width=64, height=48)
    assert np.array_equal(np.asarray(found.image), wanted)
    assert found.parameters["handoff"] == "latent"


def from_pictures(pipeline: Any) -> Any:
    """The image-to-image form of a pipeline."""
    return getattr(diffusers, type(pipeline).__name__.replace("Pipeline", "Img2ImgPipeline")).from_pipe(pipeline)


def by_hand_latents(pipeline: Any, seed: int, **given: Any) -> torch.Tensor:
    """What a pipeline ends in, as its image-to-image form takes it."""
    made = drawn(pipeline, seed, output_type="latent", **given)
    if made.ndim == 3:
        made = pipeline._unpack_latents(made, given["height"], given["width"], pipeline.vae_scale_factor)
    return made[:, :, 0] if made.ndim == 5 else made


def test_chroma_takes_latents_for_what_they_are(folders: Mapping[str, Path]) -> None:
    """Its image processor knows latents of 4 channels alone unless it is told, and resizes others as if they were pictures."""
    found = sampled(folders["chroma"], refiner=str(folders["chroma"]), seeds=7, steps=2, size=(64, 64), refine_steps=2)
    assert found.parameters["handoff"] == "latent"
    pipeline = loaded(folders["chroma"])
    latents = by_hand_latents(pipeline, 7, num_inference_steps=2, width=64, height=64)
    image = from_pictures(pipeline)
    image.image_processor = VaeImageProcessor(vae_scale_factor=16, vae_latent_channels=latents.shape[1])
    strength = found.parameters["second"]["strength"]
    steps = int(2 / strength)
    wanted = by_hand(image, 8, image=latents, strength=strength, num_inference_steps=steps, width=64, height=64)
    assert np.array_equal(np.asarray(found.image), wanted)


def test_a_vae_of_its_own_takes_pictures(folders: Mapping[str, Path], tmp_path: Path) -> None:
    other = foreign_pipelines.flux(tmp_path / "other", seed=5)
    given = {"seeds": 7, "steps": 1, "size": (64, 64), "refine_steps": 1, "strength": 0.5}
    found = sampled(folders["flux"], refiner=str(other), **given)
    assert found.parameters["handoff"] == "pixels"
    start = sampled(folders["flux"], seeds=7, steps=1, size=(64, 64)).image
    wanted = by_hand(
        from_pictures(loaded(other)), 8, image=start, num_inference_steps=2, strength=0.5, width=64, height=64
    )
    assert np.array_equal(np.asarray(found.image), wanted)
    with pytest.raises(UsageError, match="one family with one VAE"):
        sampled(folders["flux"], refiner=str(other), handoff="latent", **given)
    shutil.rmtree(other / "vae")
    shutil.copytree(folders["flux"] / "vae", other / "vae")
    assert sampled(folders["flux"], refiner=str(other), **given).parameters["handoff"] == "latent"


def test_a_second_stage_stays_in_its_dtype(folders: Mapping[str, Path]) -> None:
    folder = PipelineFolder.of(str(folders["flux"]), None)
    assert folder is not None
    studio = DiffusersStudio(folder, dtype=torch.bfloat16)
    stage = PipelineRefinement(str(folders["flux"]), folder.kind, 1)
    studio.second_stage(stage, [Shot(PROMPT)], StageResult(np.zeros((1, 32, 32, 3), np.uint8)))
    assert studio._pipeline.transformer.dtype == studio._pipeline.vae.dtype == torch.bfloat16


def test_a_refiner_cannot_draw_alone(refiner: Path) -> None:
    with pytest.raises(UsageError, match="draws from pictures alone; name it with `refiner`"):
        sampled(refiner)


def test_a_pipeline_of_videos_draws_one_frame(tmp_path: Path) -> None:
    folder = foreign_pipelines.wan(tmp_path / "wan")
    found = sampled(folder, seeds=7, steps=2, size=(64, 48))
    pipeline = loaded(folder)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    made = pipeline(
        prompt=PROMPT, generator=generator, num_inference_steps=2, width=64, height=48, num_frames=1
    ).frames[0]
    assert np.array_equal(np.asarray(found.image), (made[0] * 255).round().astype(np.uint8))


@pytest.mark.filterwarnings("ignore:.*pictures may turn to noise")
@pytest.mark.filterwarnings("ignore:.*are averaged although")  # both are random
def test_a_merge_of_another_family_draws_with_the_folders_other_parts(
    folders: Mapping[str, Path], tmp_path: Path
) -> None:
    other = foreign_pipelines.flux(tmp_path / "other", seed=5)
    middle = f"0.5*'{folders['flux'] / 'transformer'}' + 0.5*'{other / 'transformer'}'"
    mergetool.merge(middle, tmp_path / "merged.safetensors", layout="comfyui")
    parents = [FluxTransformer2DModel.from_pretrained(folder / "transformer") for folder in (folders["flux"], other)]
    mean = {name: (value + parents[1].state_dict()[name]) / 2 for name, value in parents[0].state_dict().items()}
    parents[0].load_state_dict(mean)
    wanted = by_hand(loaded(folders["flux"], transformer=parents[0]), 7, num_inference_steps=3, width=64, height=64)
    for model in (tmp_path / "merged.safetensors", middle):
        found = sampled(model, pipeline=str(folders["flux"]), seeds=7, steps=3, size=(64, 64))
        assert np.array_equal(np.asarray(found.image), wanted)


def test_a_picture_carries_both_stages(folders: Mapping[str, Path], tmp_path: Path) -> None:
    with pytest.warns(match="usual across families"):
        sampled(folders["chroma"], refiner="lab.turbo", steps=2, size=(64, 64), cfg=3, output=tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        info = picture.info
    record = json.loads(info["mergetool"])
    assert record["first"] == {
        "model": str(folders["chroma"]),
        "pipeline": "ChromaPipeline",
        "steps": 2,
        "evaluations": 2,
        "cfg": 3.0,
    }
    assert (record["second"]["steps"], record["second"]["strength"], record["handoff"]) == (10, 0.5, "pixels")
    assert "Sampler: diffusers' ChromaPipeline, CFG scale: 3" in info["parameters"]


def test_a_stage_takes_its_familys_settings_and_prints_them(
    folders: Mapping[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schnell = foreign_pipelines.flux(tmp_path / "schnell", guidance=False)
    wanted = {
        folders["flux"]: "28 evaluations, guidance 3.5, shift 1, diffusers' FluxPipeline",
        schnell: "4 evaluations, no guidance, shift 1, diffusers' FluxPipeline",
        folders["chroma"]: "35 evaluations, cfg 5, shift 1, diffusers' ChromaPipeline",
        folders["sdxl"]: "50 evaluations, cfg 5, diffusers' StableDiffusionXLPipeline",
        folders["sd15"]: "50 evaluations, cfg 7.5, diffusers' StableDiffusionPipeline",
        folders["sd3"]: "28 evaluations, cfg 7, shift 3, diffusers' StableDiffusion3Pipeline",
        folders["qwen_image"]: "50 evaluations, cfg 4, shift 1, diffusers' QwenImagePipeline",
    }
    for folder, told in wanted.items():
        plan = settings.prepare(Sample(PROMPT, base=str(folder)))
        assert plan.request.first is not None
        assert _stage_line(plan.request.first) == f"{folder}: {told}"
    second = settings.prepare(Sample(PROMPT, base=str(folders["flux"]), refiner=str(schnell))).request.refinements[0]
    assert (second.steps, second.strength, second.guidance) == (4, 0.3, None)
    across = settings.prepare(Sample(PROMPT, base="lab.base", refiner=str(folders["flux"]))).request.refinements[0]
    assert (across.steps, across.strength, across.guidance) == (10, 0.5, 3.5)
    assert any(
        note.startswith("`guidance` has no effect: this model takes none")
        for note in settings.prepare(Sample(PROMPT, base=str(schnell), guidance=3)).notes
    )


PUBLISHED = [settings for family in FAMILIES for settings in family.sampling]


@pytest.mark.parametrize("found", PUBLISHED, ids=lambda each: f"{each.pipeline} {each.name}")
def test_settings_of_families_are_diffusers_own(found: SamplingDefaults) -> None:
    """But those of models that are distilled to few steps, which diffusers has no settings for."""
    takes = inspect.signature(getattr(diffusers, f"{found.pipeline}Pipeline").__call__).parameters
    if found.guidance == "none":
        assert found.signs
        assert (found.steps, found.scale, found.source) == (4, None, "the model's card")
        return
    scale = "true_cfg_scale" if found.guidance == "cfg" and "true_cfg_scale" in takes else "guidance_scale"
    assert (takes["num_inference_steps"].default, takes[scale].default) == (found.steps, found.scale)


@pytest.mark.parametrize(
    ("kind", "index", "config", "steps", "unit"),
    [
        ("Flux2KleinPipeline", {"is_distilled": True}, {}, 4, 16),
        ("Flux2KleinPipeline", {"is_distilled": False}, {}, 50, 16),
        ("Lumina2Pipeline", {}, {}, 30, 16),
        ("WanPipeline", {}, {"in_channels": 48}, 50, 32),
        ("WanPipeline", {}, {"in_channels": 16}, 50, 16),
        ("SanaPipeline", {}, {}, 30, 16),
    ],
)
def test_variants_are_told_by_the_configs(
    kind: str, index: dict[str, Any], config: dict[str, Any], steps: int, unit: int, tmp_path: Path
) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": kind}))
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    found = PipelineFolder(tmp_path, kind, "transformer", None)
    assert (found.defaults.steps, found.picture_unit) == (steps, unit)


@pytest.mark.parametrize("strength", [0.15, 0.4, 0.5, 1.0])
def test_strength_as_comfyui_counts_takes_every_step(strength: float) -> None:
    stage = PipelineRefinement("m", "FluxPipeline", 10, strength=strength)
    assert stage.evaluations in (9, 10)  # diffusers rounds its product down
    assert PipelineRefinement("m", "FluxPipeline", 10, strength=strength, strength_as="diffusers").evaluations == int(
        10 * strength
    )


def test_what_the_pipeline_decides_itself_is_named(folders: Mapping[str, Path]) -> None:
    with pytest.warns(match="`sampler` has no effect: FluxPipeline brings its own"):
        sampled(folders["flux"], steps=1, size=(64, 64), sampler="euler")


def test_loras_and_latents_are_refused_with_a_way(folders: Mapping[str, Path], tmp_path: Path) -> None:
    flux = str(folders["flux"])
    with pytest.raises(UsageError, match="write the LoRA into the model"):
        mergetool.sample(PROMPT, base=flux, loras=["style.safetensors"])
    with pytest.raises(UsageError, match="one family with one VAE"):
        mergetool.sample(PROMPT, base=flux, refiner="lab.turbo", handoff="latent")


def test_a_folder_that_is_not_whole_is_refused_before_anything_is_loaded(
    folders: Mapping[str, Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(folders["flux"], tmp_path / "copy")
    shutil.rmtree(copy / "text_encoder_2")
    with pytest.raises(DataError, match='lacks the folder "text_encoder_2"'):
        mergetool.sample(PROMPT, base=str(copy))
    (copy / "text_encoder_2").mkdir()
    (copy / "text_encoder_2" / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(DataError, match="pickles are never loaded"):
        mergetool.sample(PROMPT, base=str(copy))


def test_code_of_a_models_folder_is_never_run(folders: Mapping[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(folders["flux"], tmp_path / "copy")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "evil.py").write_text("raise SystemExit('run')")
    (copy / "model_index.json").write_text(json.dumps(index | {"transformer": ["evil", "Transformer"]}))
    with pytest.raises(DataError, match="code of a model's folder is never run"):
        mergetool.sample(PROMPT, base=str(copy))


def test_weights_of_another_shape_are_refused(folders: Mapping[str, Path], tmp_path: Path) -> None:
    mergetool.convert(str(folders["flux"]), tmp_path / "flux.safetensors", layout="comfyui")
    with pytest.raises(FamilyError, match=r"flux\.safetensors lacks .* that its architecture needs"):
        sampled(tmp_path / "flux.safetensors", pipeline=str(folders["chroma"]), size=(64, 64))
