"""Transformers of every layout and dtype, their LoRAs, and the parts beside them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from safetensors.torch import load_file, save_file

from mergetool import models
from mergetool.engine import job
from mergetool.errors import DataError, FamilyError, InputMissing
from mergetool.options.merging import MergeOptions
from mergetool.sampler import load
from mergetool.sampler.load import load_text_encoder, load_transformer, load_vae
from mergetool.sampler.parts import Components, WeightedLora
from tests.adapters.spellings import SPELLINGS
from tests.families import checkpoint
from tests.pipelines import as_single_file


@pytest.fixture
def base(pipelines: Path) -> Path:
    return pipelines / "base"


def stored(base: Path) -> dict[str, torch.Tensor]:
    return load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")


def loaded(model: str | Path, dtype: torch.dtype = torch.float32, *loras: WeightedLora) -> dict[str, torch.Tensor]:
    return load_transformer(str(model), dtype=dtype, device="cpu", loras=loras).state_dict()


def merged(base: Path, out: Path, **options: object) -> Path:
    with job.open_merge(f"1 * '{base}'", MergeOptions(**options)) as plan:  # type: ignore[arg-type]
        job.run_merge(plan, out)
    return out


def require_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name].float(), tensor.float()), name


def test_a_pipeline_folder_loads_as_diffusers_loads_it(base: Path) -> None:
    theirs = ZImageTransformer2DModel.from_pretrained(base, subfolder="transformer", dtype=torch.float32)
    require_equal(loaded(str(base)), theirs.state_dict())


def test_a_comfyui_file_loads_without_its_config(base: Path, tmp_path: Path) -> None:
    require_equal(loaded(merged(base, tmp_path / "fused.safetensors", layout="comfyui")), stored(base))


def test_a_prefixed_file_loads(base: Path, tmp_path: Path) -> None:
    fused = load_file(merged(base, tmp_path / "fused.safetensors", layout="comfyui"))
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in fused.items()}, tmp_path / "all.safetensors")
    require_equal(loaded(tmp_path / "all.safetensors"), stored(base))


def test_an_fp8_file_loads_as_the_values_it_holds(base: Path, tmp_path: Path) -> None:
    cast = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in stored(base).items()}
    save_file(cast, tmp_path / "fp8.safetensors")
    require_equal(loaded(tmp_path / "fp8.safetensors"), cast)


def test_a_lora_is_added_at_its_strength(base: Path, tmp_path: Path) -> None:
    weights, name = stored(base), "layers.1.attention.to_q"
    down, up = torch.randn(4, 96), torch.randn(96, 4)
    save_file(
        {f"diffusion_model.{name}.lora_A.weight": down, f"diffusion_model.{name}.lora_B.weight": up},
        tmp_path / "lora.safetensors",
    )
    found = loaded(str(base), torch.float32, WeightedLora(tmp_path / "lora.safetensors", -0.7))
    wanted = weights[f"{name}.weight"].double() - 0.7 * up.double() @ down.double()
    torch.testing.assert_close(found[f"{name}.weight"].double(), wanted, rtol=1e-5, atol=1e-5)
    other = "layers.1.attention.to_k.weight"
    assert torch.equal(found[other], weights[other].float())


@pytest.mark.parametrize(
    ("key", "shape", "sentence"),
    [
        ("layers.99.attention.to_q", (96, 96), r"layers\.99.*LoRA for another model"),
        ("layers.1.attention.to_q", (128, 96), r"changes \[128, 96\] values.*where the model has \[96, 96\]"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused(
    base: Path, tmp_path: Path, key: str, shape: tuple[int, int], sentence: str
) -> None:
    pair = {
        f"diffusion_model.{key}.lora_A.weight": torch.zeros(4, shape[1]),
        f"diffusion_model.{key}.lora_B.weight": torch.zeros(shape[0], 4),
    }
    save_file(pair, tmp_path / "lora.safetensors")
    with pytest.raises(DataError, match=sentence):
        loaded(str(base), torch.float32, WeightedLora(tmp_path / "lora.safetensors", 1.0))


@pytest.mark.parametrize("spelling", [name for name in SPELLINGS if name != "embedders"])
def test_a_lora_of_any_spelling_is_added(tmp_path: Path, spelling: str) -> None:
    model = checkpoint(tmp_path / "model.safetensors", layout="diffusers")
    written = SPELLINGS[spelling]()
    before = loaded(model)
    after = loaded(model, torch.float32, WeightedLora(written.save(tmp_path), 0.5))
    for part, weight in before.items():
        wanted = weight.double()
        if part in written.changes:
            wanted = wanted + 0.5 * torch.from_numpy(written.changes[part]).view(weight.shape)
        torch.testing.assert_close(after[part].double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_lora_of_one_factor_is_refused_by_its_key(base: Path, tmp_path: Path) -> None:
    save_file(
        {"lora_unet_layers_0_attention_to_q.lora_down.weight": torch.zeros(4, 96)}, tmp_path / "kohya.safetensors"
    )
    with pytest.raises(DataError, match="lora_unet_layers_0"):
        loaded(str(base), torch.float32, WeightedLora(tmp_path / "kohya.safetensors", 1.0))


def test_a_missing_tensor_is_named(base: Path, tmp_path: Path) -> None:
    weights = stored(base)
    del weights["layers.3.feed_forward.w2.weight"]
    save_file(weights, tmp_path / "torn.safetensors")
    with pytest.raises(FamilyError, match=r"lacks \"layers\.3\.feed_forward\.w2\.weight\""):
        loaded(tmp_path / "torn.safetensors")


def test_a_single_file_of_the_embedded_family_finds_the_embedded_parts(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "EMBEDDED", base.parent)
    assert Components.find(str(merged(base, tmp_path / "merged.safetensors"))) == Components.find("lab.base")


def test_parts_that_are_named_are_taken(base: Path, tmp_path: Path) -> None:
    found = Components.find(str(base), text_encoder=base / "text_encoder", vae=base / "vae")
    assert (found.text_encoder, found.tokenizer, found.vae) == (base / "text_encoder", base / "tokenizer", base / "vae")


@pytest.mark.parametrize(
    ("option", "words"), [("vae", "the VAE is missing"), ("text_encoder", "the text encoder is missing")]
)
def test_a_missing_part_is_one_sentence_that_names_the_option(
    base: Path, tmp_path: Path, option: str, words: str
) -> None:
    with pytest.raises(InputMissing, match=words):
        Components.find(str(base), **{option: tmp_path / "nothing"})  # type: ignore[arg-type]


def test_a_folder_that_holds_something_else_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    parts = Components(tmp_path, tmp_path, tmp_path)
    for loading in (load_text_encoder, load_vae):
        with pytest.raises(DataError, match="is not a readable"):
            loading(parts, dtype=torch.float32)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_text_encoder_of_one_file_writes_what_its_folder_does(base: Path, tmp_path: Path, prefix: str) -> None:
    whole = load_file(base / "text_encoder" / "model.safetensors")
    save_file(
        {prefix + name.removeprefix("model."): tensor for name, tensor in whole.items()}, tmp_path / "qwen.safetensors"
    )
    shutil.copy(base / "text_encoder" / "config.json", tmp_path)
    words = torch.tensor([[5, 6, 7]])
    single, folder = (
        load_text_encoder(Components(place, base / "tokenizer", base / "vae"), dtype=torch.float32)[0]
        for place in (tmp_path / "qwen.safetensors", base / "text_encoder")
    )
    found, wanted = (
        encoder(input_ids=words, output_hidden_states=True).hidden_states[-2] for encoder in (single, folder)
    )
    assert torch.equal(found, wanted)


def test_a_text_encoder_of_one_file_without_its_config_is_taken_for_the_real_one(base: Path, tmp_path: Path) -> None:
    shutil.copy(base / "text_encoder" / "model.safetensors", tmp_path / "qwen.safetensors")
    with pytest.raises(DataError, match=r"no config\.json beside it, so it is taken for the published one"):
        load_text_encoder(
            Components(tmp_path / "qwen.safetensors", base / "tokenizer", base / "vae"), dtype=torch.float32
        )


def test_a_vae_of_one_file_decodes_as_its_folder_does(base: Path, tmp_path: Path) -> None:
    folder = load_vae(Components.find(str(base)), dtype=torch.float32)
    save_file(as_single_file(folder.state_dict(), blocks=3), tmp_path / "ae.safetensors")
    shutil.copy(base / "vae" / "config.json", tmp_path)
    single = load_vae(Components(base, base, tmp_path / "ae.safetensors"), dtype=torch.float32)
    latents = torch.randn(1, 16, 4, 4)
    assert torch.equal(single.decode(latents).sample, folder.decode(latents).sample)


@pytest.mark.long
def test_the_bundled_config_is_that_of_the_real_vae(base: Path, tmp_path: Path) -> None:
    config = AutoencoderKL.load_config(Path(load.__file__).parent / "configs" / "vae")
    torch.manual_seed(0)
    built = AutoencoderKL.from_config(config)
    assert sum(parameter.numel() for parameter in built.parameters()) == 83_819_683
    save_file(as_single_file(built.state_dict(), blocks=4), tmp_path / "ae.safetensors")
    found = load_vae(Components(base, base, tmp_path / "ae.safetensors"), dtype=torch.float32)
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in built.state_dict().items())
