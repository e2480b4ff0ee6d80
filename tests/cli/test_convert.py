"""``mergetool convert`` and quantised files in the other commands, run as a user runs them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.run import mergetool
from tests.families import TINY, checkpoint
from tests.quant.ggml import Q
from tests.quant.models import as_gguf, quantised

WIDE = {**TINY, "dim": 256, "n_heads": 8}


def values(path: Path) -> dict[str, np.ndarray]:
    return {name: tensor.float().numpy() for name, tensor in load_file(path).items()}


def test_a_quantised_file_becomes_bf16_without_scales_or_markers(family: Path) -> None:
    q = quantised(family / "q.safetensors", family / "alk.safetensors", "nvfp4")
    ran = mergetool("convert", "q.safetensors", "-o", "out.safetensors", cwd=family)
    assert ran.code == 0, ran.err
    assert "rounding noise, 11 % of those weights" in ran.out
    converted = load_file(family / "out.safetensors")
    assert converted.keys() == q.keys()
    for name, tensor in converted.items():
        assert torch.equal(tensor, torch.from_numpy(q[name]).bfloat16()), name


def test_the_error_table_is_that_of_the_stored_values(family: Path) -> None:
    ran = mergetool("convert", "alk.safetensors", "-o", "out.safetensors", "--quant", "int8", "--json", cwd=family)
    assert ran.code == 0, ran.err
    wanted, stored = load_file(family / "alk.safetensors"), load_file(family / "out.safetensors")
    errors = ran.json["errors"]
    assert len(errors) == 10
    for name, found in errors.items():
        exact = wanted[name].double()
        back = (stored[name].float() * stored[f"{name.removesuffix('.weight')}.weight_scale"]).double()
        relative = float((back - exact).norm() / exact.norm())
        assert found["relative_frobenius"] == pytest.approx(relative, rel=1e-6)
        assert found["worst"] == pytest.approx(float((back - exact).abs().max()), rel=1e-6)
        assert found["snr_db"] == pytest.approx(-20 * np.log10(relative), rel=1e-6)


def test_layout_shards_and_prefix_go_there_and_back_without_a_changed_bit(family: Path) -> None:
    steps = [
        ("alk.safetensors", "-o", "folder", "--layout", "diffusers", "--shard-size", "300kB"),
        ("folder", "-o", "wrapped.safetensors", "--layout", "comfyui", "--prefix", "model.diffusion_model."),
        ("wrapped.safetensors", "-o", "back.safetensors", "--prefix", ""),
    ]
    for step in steps:
        ran = mergetool("convert", *step, cwd=family)
        assert ran.code == 0, ran.err
    assert len(list((family / "folder").glob("*.safetensors"))) > 1
    assert all(name.startswith("model.diffusion_model.") for name in load_file(family / "wrapped.safetensors"))
    before, after = load_file(family / "alk.safetensors"), load_file(family / "back.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_fp16_overflow_is_refused_with_its_count(family: Path) -> None:
    tensors = load_file(family / "alk.safetensors")
    tensors["layers.0.feed_forward.w1.weight"][0, :3] = 70000.0
    save_file(tensors, family / "large.safetensors")
    ran = mergetool("convert", "large.safetensors", "-o", "out.safetensors", "--dtype", "fp16", cwd=family)
    assert ran.code == 65
    assert "3 of" in ran.err
    assert "fp16's largest value 65504" in ran.err


def test_a_bare_cast_to_fp8_says_what_it_cost(family: Path) -> None:
    ran = mergetool("convert", "alk.safetensors", "-o", "out.safetensors", "--dtype", "fp8_e4m3", cwd=family)
    assert ran.code == 0, ran.err
    assert "relative error" in ran.out
    assert {tensor.dtype for tensor in load_file(family / "out.safetensors").values()} == {torch.float8_e4m3fn}


@pytest.mark.parametrize("kind", [Q.Q8_0, Q.Q4_K], ids=lambda kind: kind.name)
def test_a_gguf_is_inspected_converted_and_compared(tmp_path: Path, kind: Q) -> None:
    for seed, name in enumerate(["a", "b"]):
        checkpoint(tmp_path / f"{name}.safetensors", variant=seed, config=WIDE)
    stored = as_gguf(tmp_path / "a.gguf", tmp_path / "a.safetensors", kind)

    shown = mergetool("inspect", "a.gguf", cwd=tmp_path)
    assert "Z-Image, comfyui layout" in shown.out
    assert f"GGUF {kind.name}" in shown.out

    ran = mergetool("convert", "a.gguf", "-o", "back.safetensors", "--dtype", "bf16", cwd=tmp_path)
    assert ran.code == 0, ran.err
    back = load_file(tmp_path / "back.safetensors")
    assert back["cap_pad_token"].shape == (1, 256)
    for name, tensor in back.items():
        wanted = torch.from_numpy(np.array(stored[name])).reshape(tensor.shape).bfloat16()
        assert torch.equal(tensor, wanted), name

    ran = mergetool("diff", "--base", "a.gguf", "--variant", "b.safetensors", "-o", "d.safetensors", cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert (tmp_path / "d.safetensors").exists()


def test_inspect_counts_the_quantised_weights(family: Path) -> None:
    quantised(family / "q.safetensors", family / "alk.safetensors", "convrot")
    ran = mergetool("inspect", "q.safetensors", "--json", cwd=family)
    assert ran.json["quantised"] == {"int8 rotated by 16 (ConvRot)": 16, "int8": 4}
    assert ran.json["parameters"] == sum(tensor.numel() for tensor in load_file(family / "alk.safetensors").values())


def test_merge_keeps_a_container_on_request_and_says_what_is_in_it(family: Path) -> None:
    quantised(family / "q.safetensors", family / "alk.safetensors", "fp8", refiners=False)
    text = "'q.safetensors' + 2*('a.safetensors' - 'b.safetensors')"
    plain = mergetool("merge", text, "--dry-run", cwd=family)
    assert "--quant fp8-scaled writes its container" in plain.out
    ran = mergetool("merge", text, "--quant", "fp8-scaled", "--scale-search", "-o", "out.safetensors", cwd=family)
    assert ran.code == 0, ran.err
    assert "the weights that q.safetensors has quantised" in ran.out
    assert "less squared error than amax" in ran.out
    recorded = mergetool("inspect", "out.safetensors", "--json", cwd=family).json["metadata"]["mergetool.recipe"]
    assert json.loads(recorded)["quant"] == "fp8-scaled"


def test_inspect_says_which_groups_are_in_which_container_and_how_many_bits_they_take(family: Path) -> None:
    quantised(family / "q.safetensors", family / "alk.safetensors", "convrot", refiners=False)
    stored = load_file(family / "q.safetensors")
    told = json.loads(mergetool("inspect", "q.safetensors", "--json", cwd=family).out)
    rotated, plain = "int8 rotated by 16 (ConvRot)", "int8"
    assert told["quantised"] == {rotated: 8, plain: 2}
    assert told["quantised_groups"] == {rotated: {"attention": 4, "ffn": 4}, plain: {"ffn": 2}}
    mine = [
        name for name in stored if name.startswith("layers.") and name.endswith("w2.weight")
    ]  # 16 does not divide their width
    nbytes = sum(
        stored[name.replace(".weight", leaf)].nbytes
        for name in mine
        for leaf in (".weight", ".weight_scale", ".comfy_quant")
    )
    elements = sum(stored[name].numel() for name in mine)
    assert told["quantised_bits"][plain] == round(8 * nbytes / elements, 2)
    shown = mergetool("inspect", "q.safetensors", cwd=family).out
    assert f"2 weights quantised: int8, {told['quantised_bits'][plain]:g} bits an element, 2 in ffn" in shown


def test_diffusers_reads_an_old_scaled_file_wrongly_and_its_conversion_rightly(family: Path) -> None:
    """The container's reason to be refused elsewhere: no error, and weights without their scales."""
    from diffusers import ZImageTransformer2DModel

    q = quantised(family / "q.safetensors", family / "alk.safetensors", "old fp8")
    assert mergetool("convert", "q.safetensors", "-o", "out.safetensors", cwd=family).code == 0
    (family / "transformer").mkdir()
    (family / "transformer" / "config.json").write_text(json.dumps(TINY))

    def loaded(name: str) -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = ZImageTransformer2DModel.from_single_file(
                str(family / name), config=str(family), subfolder="transformer", torch_dtype=torch.float32
            )
        return model.state_dict()["layers.0.feed_forward.w1.weight"]

    exact = torch.from_numpy(q["layers.0.feed_forward.w1.weight"])
    assert torch.equal(loaded("out.safetensors"), exact.bfloat16().float())
    assert float((loaded("q.safetensors") - exact).norm() / exact.norm()) > 10


def test_a_quantised_transformer_is_sampled_with_its_scales(pipelines: Path, tmp_path: Path) -> None:
    from mergetool.sampler.load import load_transformer

    source = tmp_path / "plain.safetensors"
    ran = mergetool("convert", pipelines / "base", "-o", source, "--layout", "comfyui", cwd=tmp_path)
    assert ran.code == 0, ran.err
    q = quantised(tmp_path / "q.safetensors", source, "fp8")
    built = load_transformer(str(tmp_path / "q.safetensors"), dtype=torch.float32, device="cpu").state_dict()
    name = "layers.0.feed_forward.w1.weight"
    assert torch.equal(built[name], torch.from_numpy(q[name]))
