"""Which stock models belong together by headers, metadata and names, and what is said of a difference of two that do not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergetool.adapters.lora_file import open_lora
from mergetool.arch import recognise
from mergetool.arch.families import FAMILIES
from mergetool.arch.stock import Ancestor, ancestor_of, kinship, name_of
from mergetool.comparison import lineage
from mergetool.comparison.samples import Samples
from mergetool.engine import job
from mergetool.models import open_model
from tests.arch.published import MODELS
from tests.arch.tables import table
from tests.cli.run import mergetool

FLUX = {"dim": 32, "head": 16, "hidden": 128, "patch_in": 64, "patch_out": 64, "context": 32, "pooled": 16, "transformer_blocks": 1,
        "single_transformer_blocks": 1}  # fmt: skip


def family(name: str):  # type: ignore[no-untyped-def]
    return next(family for family in FAMILIES if family.name == name)


def told(name: str, model: str, metadata: Mapping[str, str] | None = None, **shapes: tuple[int, ...]) -> str | None:
    anatomy = recognise(table({**MODELS[name], **shapes}), source=model)
    found = ancestor_of(anatomy.family, anatomy, metadata or {}, model)
    return found and found.told


@pytest.mark.parametrize(
    ("name", "model", "wanted"),
    [
        ("Flux.1", "some-style.safetensors", "dev, Kontext or Krea by its tensors"),
        ("Flux.1", "flux1-krea-dev.safetensors", "Krea by its name"),
        ("Flux.1", "flux1-schnell.safetensors", "dev, Kontext or Krea by its tensors"),
        ("Flux.1 Fill", "flux1-dev.safetensors", "Fill by its tensors"),
        ("SDXL", "ponyDiffusionV6XL.safetensors", "Pony by its name"),
        ("SDXL", "sd_xl_base_1.0.safetensors", "1.0 by its name"),
        ("SDXL", "my-style.safetensors", None),
        ("SD3.5 Large", "sd3.5_large_turbo.safetensors", "3.5 Large Turbo by its name"),
        ("Qwen-Image", "qwen_image_edit_2509_bf16.safetensors", "Edit 2509 by its name"),
        ("Wan", "wan2.2_t2v_low_noise_14B_fp16.safetensors", "2.2 T2V A14B, low noise by its name"),
        ("Wan", "/m/Wan2.2-T2V-A14B-Diffusers/transformer_2", "2.2 T2V A14B, low noise by its name"),
        ("Wan", "/m/Wan2.2-T2V-A14B-Diffusers/transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
         "2.2 T2V A14B, high noise by its name"),
        ("Z-Image", "z_image_de_turbo_v1.safetensors", "De-Turbo by its name"),
        ("Z-Image", "models--Tongyi-MAI--Z-Image-Turbo/snapshots/0123456789012345678901234567890123456789/transformer", "Turbo by its name"),
    ],
)  # fmt: skip
def test_tensors_decide_before_names(name: str, model: str, wanted: str | None) -> None:
    assert told(name, model) == wanted


@pytest.mark.parametrize(
    "key", ["modelspec.title", "modelspec.architecture", "ss_base_model_version", "general.name", "_name_or_path"]
)
def test_metadata_decides_before_names(key: str) -> None:
    assert told("SDXL", "pony.safetensors", {key: "Illustrious-XL v0.1"}) == "Illustrious by its metadata"


def test_a_path_is_read_down_to_the_first_name_that_somebody_chose() -> None:
    assert name_of("/a/turbo/mine/unet/diffusion_pytorch_model.fp16.safetensors").startswith("mine/unet/")
    assert name_of("/a/turbo/mine.safetensors") == "mine.safetensors"


def test_every_row_names_rows_of_its_family_and_variants_of_its_headers() -> None:
    for one in FAMILIES:
        names = [row.name for row in one.stock]
        variants = {variant.name for variant in one.variants}
        assert len(names) == len(set(names))
        for row in one.stock:
            assert {*row.of} <= {*names}, row
            assert {*row.variants} <= variants, row


KIN = [
    ("Flux.1", "dev", "schnell", "strangers"),
    ("Flux.1", "Kontext", "dev", "child"),
    ("Flux.1", "Fill", "dev", "extended"),
    ("Flux.1", "dev", "Fill", "parent"),
    ("SDXL", "NoobAI", "1.0", "child"),
    ("SDXL", "Pony", "Illustrious", "strangers"),
    ("SDXL", "inpainting", "1.0", "extended"),
    ("Qwen-Image", "Edit 2511", "Qwen-Image", "extended"),
    ("Qwen-Image", "2512", "Edit", "strangers"),
    ("Wan", "2.2 T2V A14B, high noise", "2.2 T2V A14B, low noise", "strangers"),
    ("SD3", "3.5 Large Turbo", "3.5 Large", "child"),
    ("SD3", "3.5 Medium", "3.5 Large", "strangers"),
    ("Z-Image", "De-Turbo", "Base", "child"),
]


@pytest.mark.parametrize(("name", "x", "y", "wanted"), KIN)
def test_stock_models_are_kin_as_their_publishers_tell(name: str, x: str, y: str, wanted: str) -> None:
    one = next(
        each for each in FAMILIES if each.name.startswith(name.split()[0]) and any(r.name == x for r in each.stock)
    )
    rows = {row.name: row for row in one.stock}
    assert kinship(one, Ancestor((rows[x],), "name", x), Ancestor((rows[y],), "name", y)) == wanted


# -- in commands -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models of Flux.1: with guidance and without, related by 2 %."""
    folder = tmp_path_factory.mktemp("models")
    flux = family("Flux.1")
    random = torch.Generator().manual_seed(0)
    wide = flux.shapes(flux.derived({**FLUX, "guidance": 32}), "comfyui")
    base = {name: 0.03 * torch.randn(shape, generator=random) for name, shape in wide.items()}
    tuned = {name: value + 6e-4 * torch.randn(value.shape, generator=random) for name, value in base.items()}
    for name, tensors in {"mine": tuned, "guided": base}.items():
        save_file({key: value.bfloat16() for key, value in tensors.items()}, folder / f"{name}.safetensors")
    fast = {key: value.bfloat16() for key, value in base.items() if not key.startswith("guidance_in")}
    save_file(fast, folder / "fast.safetensors")
    return folder


def found(expression: str) -> list[tuple[str, str]]:
    with job.open_merge(expression, fingerprints=False) as plan:
        return [(each.level, each.text) for each in lineage.of(plan, Samples(plan.inputs)).findings()]


def test_the_wrong_variant_is_told_from_tensors_alone(models: Path) -> None:
    mine, guided, fast = (f"'{models / name}.safetensors'" for name in ("mine", "guided", "fast"))
    ((level, text),) = found(f"{guided} + 0.5*({mine} - {fast})")
    assert level == "warn"
    assert "is dev, Kontext or Krea by its tensors" in text
    assert "schnell by its tensors" in text
    assert "subtract the model that" in text
    assert found(f"{guided} + 0.5*({mine} - {guided})") == []


@pytest.mark.parametrize("command", [["diff", "--dry-run", "--skip-unmatched"], ["compare"]])
def test_diff_and_compare_tell_it_too_and_go_on(models: Path, command: list[str], tmp_path: Path) -> None:
    result = mergetool(*command, models / "fast.safetensors", models / "mine.safetensors", cwd=tmp_path)
    assert "schnell by its tensors" in " ".join(result.out.split())
    assert result.code == 0


def test_a_name_alone_is_a_note(models: Path) -> None:
    for name in ("flux1-krea-dev", "flux1-dev"):
        (models / f"{name}.safetensors").unlink(missing_ok=True)
        (models / f"{name}.safetensors").hardlink_to(
            models / ("mine.safetensors" if "krea" in name else "guided.safetensors")
        )
    krea, dev = (f"'{models / name}.safetensors'" for name in ("flux1-krea-dev", "flux1-dev"))
    ((level, text),) = found(f"{dev} + 0.5*({krea} - {dev})")
    assert (level, "is Krea by its name" in text) == ("note", True)


def test_a_pipeline_of_two_models_says_so_of_each(models: Path, tmp_path: Path) -> None:
    for name, model in (("transformer", "guided"), ("transformer_2", "fast")):
        (tmp_path / "pair" / name).mkdir(parents=True)
        (tmp_path / "pair" / name / "diffusion_pytorch_model.safetensors").hardlink_to(models / f"{model}.safetensors")
    with open_model(str(tmp_path / "pair" / "transformer")) as opened:
        (note,) = opened.notes
        assert "one of 2 models of its pipeline that denoise" in note
        assert str(tmp_path / "pair" / "transformer_2") in note
    # What was trained from the second is nearer to it than to the first, which a file beside it is enough to tell.
    tuned = tmp_path / "tuned.safetensors"
    second = models / "fast.safetensors"
    save_file(
        {key: value + 1e-3 * torch.randn(value.shape).bfloat16() for key, value in load_file(second).items()}, tuned
    )
    first = tmp_path / "pair" / "transformer" / "diffusion_pytorch_model.safetensors"
    far = {key: value + 5e-3 * torch.randn(value.shape).bfloat16() for key, value in load_file(first).items()}
    first.unlink()
    save_file(far, first)
    texts = [text for _, text in found(f"'{tuned}' + 0.1*('{tuned}' - '{tmp_path / 'pair' / 'transformer'}')")]
    assert any("transformer_2 lies nearer to" in text for text in texts), texts


def test_lora_inspect_names_the_model_that_a_lora_is_for(tmp_path: Path) -> None:
    stem = "diffusion_model.blocks.0.self_attn.q"
    factors = {f"{stem}.lora_A.weight": torch.ones(4, 64), f"{stem}.lora_B.weight": torch.ones(64, 4)}
    for name, noise in (("style_high_noise", "high"), ("style-LN", "low")):
        save_file(factors, tmp_path / f"{name}.safetensors")
        with open_lora(tmp_path / f"{name}.safetensors") as file:
            assert file.made_for is not None
            assert file.made_for.told == f"2.2 T2V A14B, {noise} noise or 2.2 I2V A14B, {noise} noise by its name"
