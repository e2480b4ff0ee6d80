"""Parts bundled with a model: left alone bit for bit, left out on request, merged when asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mergetool
from mergetool.checkpoint import dtypes
from mergetool.engine import job
from mergetool.errors import PatternError, UsageError
from mergetool.models import EMBEDDED
from mergetool.options.merging import MergeOptions
from mergetool.recipe.plan import Plan
from tests.quant.files import marker
from tests.quant.ggml import Q, packed, write
from tests.recipe.all_in_one import BESIDE, UNET, sdxl

MERGE = "'a.safetensors' + 0.5*('b.safetensors' - 'a.safetensors')"
COPY = "'a.safetensors'"


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sdxl(Path("a.safetensors"), 1)
    sdxl(Path("b.safetensors"), 2)


def made(expression: str, **options: Any) -> dict[str, torch.Tensor]:
    mergetool.merge(expression, "out.safetensors", force=True, overwrite=True, **options)
    return load_file("out.safetensors")


def planned(expression: str, **options: Any) -> Plan:
    with job.open_merge(expression, MergeOptions(**options), fingerprints=False) as plan:
        return plan


def beside(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, tensor) for name, tensor in tensors.items() if name.startswith(BESIDE))


@pytest.mark.parametrize("expression", [COPY, MERGE])
@pytest.mark.parametrize(
    "options", [{}, {"dtype": "fp8_e4m3"}, {"dtype": "fp32"}, {"quant": "fp8-scaled"}, {"quant": "int8"}], ids=str
)
def test_no_dtype_and_no_container_changes_a_bit_of_them(expression: str, options: dict[str, Any]) -> None:
    found, expected = made(expression, bundled="keep", **options), dict(beside(load_file("a.safetensors")))
    assert {name for name, _ in beside(found)} == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))


def test_the_model_itself_is_quantised_beside_them() -> None:
    weight = f"{UNET}middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    assert made(COPY, quant="fp8-scaled")[weight].dtype is torch.float8_e4m3fn


def test_dropped_they_are_named_and_the_flags_stay() -> None:
    merged = mergetool.merge(MERGE, "out.safetensors", bundled="drop", force=True)
    expected = {name for name, _ in beside(load_file("a.safetensors"))}
    assert {name for name, _ in beside(load_file("out.safetensors"))} == {"v_pred", "ztsnr"}
    assert merged.left_out["first_stage_model.decoder.mid.attn_1.q.weight"] == "bundled VAE: `bundled=drop`"
    assert expected - {"v_pred", "ztsnr"} == set(merged.left_out)


def test_ema_weights_can_be_left_out_alone() -> None:
    found, first = made(MERGE, bundled="drop-ema"), load_file("a.safetensors")
    assert first.keys() - found.keys() == {"model_ema.decay", "model_ema.diffusion_modelinput_blocks00weight"}


def test_merged_when_asked_they_are_the_average_in_the_wanted_dtype() -> None:
    found = made(MERGE, bundled="merge", dtype="fp32")
    a, b = load_file("a.safetensors"), load_file("b.safetensors")
    for name in ("first_stage_model.decoder.mid.attn_1.q.weight", "conditioner.embedders.1.model.logit_scale"):
        torch.testing.assert_close(found[name], (0.5 * a[name].float() + 0.5 * b[name].float()))
    assert found["alphas_cumprod"].dtype is torch.float64
    assert found["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"].dtype is torch.int64


def test_merged_they_are_not_quantised() -> None:
    found = made(MERGE, bundled="merge", quant="fp8-scaled")
    assert found["conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.weight"].dtype is torch.float16
    assert not [name for name in found if name.startswith("conditioner") and name.endswith("comfy_quant")]


def test_a_quantised_encoder_is_copied_with_its_scales_and_merged_by_its_values() -> None:
    layer = "text_encoders.t5xxl.layers.0.mlp"
    codes = torch.tensor([[1.0, -2.0], [4.0, 8.0]]).to(torch.float8_e4m3fn)
    for name, scale in (("a.safetensors", 0.5), ("b.safetensors", 1.5)):
        tensors = {n: t for n, t in load_file(name).items() if n.startswith(UNET)}
        tensors |= {f"{layer}.weight": codes, f"{layer}.weight_scale": torch.tensor(scale)}
        save_file({**tensors, f"{layer}.comfy_quant": marker({"format": "float8_e4m3fn"})}, name)
    for kept in (made(MERGE, bundled="keep"), made(COPY)):
        assert kept[f"{layer}.weight"].view(torch.uint8).equal(codes.view(torch.uint8))
        assert {f"{layer}.weight_scale", f"{layer}.comfy_quant"} <= kept.keys()
    for merged, dtype in ((made(MERGE), torch.bfloat16), (made(MERGE, bundled="merge", dtype="fp32"), torch.float32)):
        assert merged[f"{layer}.weight"].equal(codes.to(dtype))
        assert f"{layer}.weight_scale" not in merged


def test_ggufs_bundled_blocks_are_decoded() -> None:
    values = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
    encoder = "text_encoders.qwen3_4b.layers.0.mlp.weight"
    write(Path("a.gguf"), {f"{UNET}layers.0.weight": (values, Q.Q8_0), encoder: (values * 2, Q.Q8_0)})
    found = made("'a.gguf'")
    expected = torch.from_numpy(gguf.quants.dequantize(packed(values * 2, Q.Q8_0), Q.Q8_0)).bfloat16()
    assert found[encoder].equal(expected)


def test_stale_ema_weights_are_explained_for_a_merge_and_not_for_a_copy() -> None:
    assert any("EMA weights are copied from a.safetensors and are not" in text for text in planned(MERGE).warnings)
    assert not any("EMA" in text for text in planned(COPY).warnings)
    assert not any("are not those" in text for text in planned(MERGE, bundled="drop-ema").warnings)


@pytest.mark.parametrize(("has", "lacks"), [("a", "b"), ("b", "a")])
def test_a_flag_that_one_model_lacks_is_explained(has: str, lacks: str) -> None:
    sdxl(Path(f"{lacks}.safetensors"), 3, flags=False)
    text = " ".join(planned(MERGE).warnings)
    assert f"{has}.safetensors has the flag 'v_pred'" in text
    assert "sampled as a.safetensors is" in text


def test_another_models_parts_that_go_nowhere_are_named() -> None:
    assert any(
        "what b.safetensors bundles with its model (2 EMA, 1 VAE tensors) is not in the output" in t
        for t in planned(MERGE).warnings
    )


def test_a_model_alone_takes_encoders_and_vae_from_the_other_and_says_so() -> None:
    save_file({n: t for n, t in load_file("a.safetensors").items() if n.startswith(UNET)}, "a.safetensors")
    found, other = dict(beside(made(MERGE))), load_file("b.safetensors")
    assert found.keys() == {name for name in other if name.startswith(("conditioner", "first_stage_model"))}
    assert all(tensor.equal(other[name]) for name, tensor in found.items())
    assert len(planned(MERGE).reasons()["bundled, copied from b.safetensors"]) == len(found)
    assert any("(2 EMA tensors) is not in the output; a.safetensors's file has" in t for t in planned(MERGE).warnings)
    assert not list(beside(made(MERGE, bundled="keep")))


def test_a_pattern_that_means_a_bundled_part_says_so() -> None:
    with pytest.raises(PatternError, match="matches only what is bundled with the model"):
        planned(MERGE, exclude=("first_stage_model",))


def test_another_word_is_refused() -> None:
    with pytest.raises(UsageError, match="one of encoders, keep, drop, drop-ema, merge"):
        MergeOptions(bundled="ignore")


def test_the_choice_is_recorded_and_read_again() -> None:
    mergetool.merge(MERGE, "out.safetensors", bundled="drop-ema", force=True)
    assert mergetool.replay("out.safetensors").same


def test_fp8_of_the_zimage_kind_leaves_its_parts_alone(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in load_file("a.safetensors").items() if not name.startswith(UNET)}
    base = load_file(str(lab_base()))
    save_file({**{f"{UNET}{name}": t.clone() for name, t in base.items()}, **tensors}, "z.safetensors")
    plan = planned("'z.safetensors'", dtype=dtypes.output_dtype("fp8_e4m3"))
    assert plan.inputs[0].anatomy.family.name == "Z-Image"
    stored = {tensor.name: tensor.dtype for tensor in plan.tensors if tensor.name in tensors}
    assert set(stored) == set(tensors)
    assert dtypes.F8_E4M3 not in stored.values()


def lab_base() -> Path:
    return next((EMBEDDED / "base" / "transformer").glob("*.safetensors"))
