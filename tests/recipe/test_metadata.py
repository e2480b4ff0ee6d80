"""The first model's metadata travels with its weights; what would be false of the output is left out, and named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import mergetool
from mergetool.engine import job
from mergetool.options.merging import MergeOptions
from mergetool.recipe import metadata

CONFIG = json.dumps({"transformer": {"num_layers": 3}, "vae": {"_class_name": "CausalVideoAutoencoder"}})
THEIRS = {"config": CONFIG, "modelspec.title": "My LTXV", "modelspec.license": "CC-BY-NC-4.0", "license": "other"}
MERGE = "'a.safetensors' + 0.5*('b.safetensors' - 'a.safetensors')"
OURS = {"format", "mergetool.recipe", "mergetool.inputs", "mergetool.version"}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def model(name: str, stored: dict[str, str], **tensors: torch.Tensor) -> None:
    weights = torch.randn(8, 8, generator=torch.Generator().manual_seed(len(name) + ord(name[0])))
    save_file({"blocks.0.attn.to_q.weight": weights, **tensors}, f"{name}.safetensors", metadata=stored)


def written(expression: str = "'a.safetensors'", **options: str) -> dict[str, str]:
    mergetool.merge(expression, "out.safetensors", force=True, overwrite=True, **options)  # type: ignore[arg-type]
    with safe_open("out.safetensors", "pt") as file:
        return dict(file.metadata())


def warnings(expression: str) -> str:
    with job.open_merge(expression, MergeOptions(), fingerprints=False) as plan:
        return "\n".join(plan.warnings)


@pytest.mark.parametrize("expression", ["'a.safetensors'", MERGE])
def test_all_of_it_is_there_and_ours_beside(expression: str) -> None:
    model("a", {"format": "pt", **THEIRS})
    model("b", THEIRS)
    found = written(expression, dtype="fp16")
    assert {key: found[key] for key in THEIRS} == THEIRS
    assert found.keys() == THEIRS.keys() | OURS
    assert warnings(expression) == ""


def test_what_is_false_of_other_bytes_is_left_out_and_named() -> None:
    model("a", {**THEIRS, "modelspec.hash_sha256": "0xabc", "sshs_model_hash": "12", "format": "mlx"})
    found = written()
    assert "modelspec.hash_sha256" not in found
    assert "sshs_model_hash" not in found
    assert found["format"] == "pt"
    assert 'without "modelspec.hash_sha256", "sshs_model_hash" (of other bytes)' in warnings("'a.safetensors'")


def test_how_the_input_was_made_travels_with_a_copy_and_not_with_a_merge() -> None:
    model("a", {"workflow": "{}", "prompt": "{}"})
    model("b", {})
    assert {"workflow", "prompt"} <= written().keys()
    assert not {"workflow", "prompt"} & written(MERGE).keys()
    assert '"prompt", "workflow" (how a.safetensors was made)' in warnings(MERGE)


def test_models_that_disagree_are_named_and_the_first_holds() -> None:
    model("a", THEIRS)
    model("b", {**THEIRS, "modelspec.license": "MIT", "license_link": "https://example.org"})
    assert written(MERGE)["modelspec.license"] == "CC-BY-NC-4.0"
    said = warnings(MERGE)
    assert 'a.safetensors and b.safetensors differ ("modelspec.license")' in said
    assert 'b.safetensors has metadata that the output does not: "license_link"' in said


def test_values_beyond_a_bound_are_left_out_and_named() -> None:
    model("a", {"big": "x" * (metadata.LARGEST_VALUE + 1), "small": "y"})
    assert written().keys() == {"small"} | OURS
    assert '"big" (1048580 bytes, too long)' in warnings("'a.safetensors'")


def test_an_earlier_recipe_is_replaced_by_ours() -> None:
    model("a", {"mergetool.recipe": '{"expression": "old"}', "mergetool.spectra": "[]"})
    found = written()
    assert found.keys() == OURS
    assert json.loads(found["mergetool.recipe"])["expression"] == "a"


def test_quantisation_metadata_keeps_the_layers_that_are_copied() -> None:
    encoder, mine = "text_encoders.t5xxl.mlp", "model.diffusion_model.blocks.0.mlp"
    codes = torch.ones(8, 8).to(torch.float8_e4m3fn)
    layers = {layer: {"format": "float8_e4m3fn"} for layer in (encoder, mine)}
    tensors = {
        f"{layer}.{leaf}": t for layer in layers for leaf, t in (("weight", codes), ("weight_scale", torch.ones(())))
    }
    stored = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    save_file({n: t.clone() for n, t in tensors.items()}, "a.safetensors", metadata=stored)
    found = json.loads(written()["_quantization_metadata"])
    assert found == {"format_version": "1.0", "layers": {encoder: {"format": "float8_e4m3fn"}}}
    assert "_quantization_metadata" not in written(bundled="drop")


def test_a_replay_finds_the_same_bytes() -> None:
    model("a", {**THEIRS, "modelspec.hash_sha256": "0xabc"})
    model("b", {})
    written(MERGE)
    assert mergetool.replay("out.safetensors").same


def test_a_title_takes_the_place_of_the_first_models_and_is_derived_again() -> None:
    model("a", THEIRS)
    assert written(title="Artshoot on Alkahest")["modelspec.title"] == "Artshoot on Alkahest"
    assert mergetool.replay("out.safetensors").same
