"""A LoRA under other names is the same LoRA: read again, loaded by diffusers and PEFT, and the other way round."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergetool import models
from mergetool.adapters.convert import Converted, convert
from mergetool.adapters.formats import KEY_FORMATS, KeyFormat
from mergetool.adapters.lora_file import open_lora
from mergetool.adapters.values import dense_rows
from mergetool.errors import DataError, NonFiniteError, OutputError, UsageError
from tests.adapters.files import with_magnitudes
from tests.adapters.spellings import BLOCK, DIM, MATRICES, SPELLINGS, f64, fused, loha, lokr, random, split

PRODUCTS = [name for name in SPELLINGS if not any(kind in name for kind in ("LoKr", "LyCORIS", "LoHa", "differences"))]
ENDS = {"default": ".lora_A.weight", "diffusers": ".lora_A.weight", "comfyui": ".lora_down.weight"}


def converted(source: Path, folder: Path, key_format: KeyFormat = "default", **options: bool) -> tuple[Path, Converted]:
    target = folder / (f"to-{key_format}" if key_format == "peft" else f"to-{key_format}.safetensors")
    with open_lora(source) as file:
        return target, convert(file, target, key_format, **options)


def changes(path: Path) -> dict[str, np.ndarray]:
    """Every change in full, in float64 of the stored factors."""
    with open_lora(path) as file:
        assert file.unmatched == ()
        found = {}
        for part, (change,) in file.changes.items():
            found[part] = dense_rows(file, change, 0, change.rows).astype(np.float64)
        return found


def stored(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter_model.safetensors" if path.is_dir() else path)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


@pytest.mark.parametrize("key_format", KEY_FORMATS)
@pytest.mark.parametrize("spelling", PRODUCTS)
def test_every_format_means_the_same_change(tmp_path: Path, spelling: str, key_format: KeyFormat) -> None:
    written = SPELLINGS[spelling]()
    target, done = converted(written.save(tmp_path), tmp_path, key_format)
    found = changes(target)
    assert set(found) >= set(written.changes)
    for part, change in found.items():
        wanted = written.changes.get(part, np.zeros_like(change))  # rows of a fused module that nothing changes
        # exact but for the float32 product, unless it is said: then one rounding of bf16 in up
        limit = 2**-8 if done.rounded else 2e-6
        np.testing.assert_allclose(
            change, wanted, rtol=0, atol=limit * max(np.abs(wanted).max(), 1e-9) * 4, err_msg=part
        )


@pytest.mark.parametrize("key_format", ["comfyui", "kohya", "peft"])
@pytest.mark.parametrize("spelling", PRODUCTS)
def test_there_and_back_the_bits_are_the_same(tmp_path: Path, spelling: str, key_format: KeyFormat) -> None:
    source, _ = converted(SPELLINGS[spelling]().save(tmp_path), tmp_path)
    there, done = converted(source, tmp_path, key_format)
    (tmp_path / "back").mkdir()
    back, again = converted(there, tmp_path / "back")
    if done.rounded:  # scales of q, k and v that differ cannot lie in one module
        assert key_format == "comfyui"
        return
    assert again.rounded == {}
    before, after = stored(source), stored(back)
    assert before.keys() == after.keys()
    assert all(same(before[key], after[key]) for key in before)


DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
ALPHAS = st.one_of(st.none(), st.sampled_from([1.0, 4.0, 16.0]), st.floats(2**-7, 1024, width=32))


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ranks=st.lists(st.integers(1, 5), min_size=len(MATRICES), max_size=len(MATRICES)),
    alphas=st.lists(ALPHAS, min_size=len(MATRICES), max_size=len(MATRICES)),
    dtypes=st.lists(st.tuples(DTYPES, DTYPES), min_size=len(MATRICES), max_size=len(MATRICES)),
    key_format=st.sampled_from(["kohya", "peft", "default"]),
)
def test_any_ranks_alphas_and_dtypes_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory,
    ranks: list[int],
    alphas: list[float | None],
    dtypes: list[tuple[torch.dtype, torch.dtype]],
    key_format: KeyFormat,
) -> None:
    folder = tmp_path_factory.mktemp("random")
    tensors = {}
    for i, (module, (rows, columns)) in enumerate(MATRICES.items()):
        name = "lora_unet_" + module.replace(".", "_")
        tensors[name + ".lora_down.weight"] = random(ranks[i], columns, seed=i).to(dtypes[i][0])
        tensors[name + ".lora_up.weight"] = random(rows, ranks[i], seed=i + 50).to(dtypes[i][1])
        alpha = alphas[i]
        tensors[name + ".alpha"] = torch.tensor(ranks[i] if alpha is None else alpha, dtype=torch.float32)
    save_file(tensors, folder / "source.safetensors")
    there, done = converted(folder / "source.safetensors", folder, key_format)
    (folder / "back").mkdir()
    back, again = converted(there, folder / "back", "kohya")
    assert not done.rounded
    assert not again.rounded
    after = stored(back)
    assert after.keys() == tensors.keys()
    if key_format == "default":  # a power of two may have gone into up, exactly
        for key in tensors:
            if key.endswith("up.weight"):
                alpha_key = key.replace("lora_up.weight", "alpha")
                one, other = (found[key].double() * float(found[alpha_key]) for found in (tensors, after))
                assert torch.equal(one, other)
            elif not key.endswith("alpha"):
                assert same(tensors[key], after[key])
    else:
        assert all(torch.equal(tensors[key], after[key]) and tensors[key].dtype == after[key].dtype for key in tensors)


def test_a_scale_that_cannot_be_folded_keeps_its_alpha_in_the_default(tmp_path: Path) -> None:
    source = split("lora_unet_", ".lora_down.weight", ".lora_up.weight", alpha=8, flat=True, ranks=(3,)).save(tmp_path)
    target, done = converted(source, tmp_path)
    assert done.is_lossless
    assert float(load_file(target)[f"diffusion_model.{BLOCK}.attention.to_q.alpha"]) == 8


def test_what_was_rounded_is_named_with_its_error(tmp_path: Path) -> None:
    source = split("lora_unet_", ".lora_down.weight", ".lora_up.weight", alpha=8, flat=True, ranks=(3,)).save(tmp_path)
    target, done = converted(source, tmp_path, "diffusers")
    part = f"{BLOCK}.attention.to_q.weight"
    up = f64(
        load_file(tmp_path / "lora.safetensors")[
            f"lora_unet_{BLOCK}_attention_to_q.lora_up.weight".replace("s.1", "s_1")
        ]
    )
    exact, rounded = up * 8 / 3, f64(load_file(target)[f"transformer.{BLOCK}.attention.to_q.lora_B.weight"])
    assert done.rounded[part] == pytest.approx(np.linalg.norm(rounded - exact) / np.linalg.norm(exact), rel=1e-9)
    assert set(done.rounded) == {f"{module}.weight" for module in MATRICES}
    assert not done.is_lossless


def test_block_diagonal_factors_lose_the_columns_of_the_others(tmp_path: Path) -> None:
    target, _ = converted(SPELLINGS["musubi converted for ComfyUI"]().save(tmp_path), tmp_path)
    shapes = {key: tuple(tensor.shape) for key, tensor in load_file(target).items() if "lora_down" in key}
    assert shapes == {f"diffusion_model.{BLOCK}.attention.to_{x}.lora_down.weight": (2, DIM) for x in "qkv"}


def test_a_fused_lora_of_one_down_is_of_one_down_again(tmp_path: Path) -> None:
    source = fused("diffusion_model.", ".lora_down.weight", ".lora_up.weight", alpha=8).save(tmp_path)
    default, _ = converted(source, tmp_path)
    back, _ = converted(default, tmp_path, "comfyui")
    before, after = load_file(source), load_file(back)
    for key in before:
        if not key.endswith(("alpha", "lora_up.weight")):
            assert same(before[key], after[key]), key
    name = f"diffusion_model.{BLOCK}.attention.qkv"
    product = [f64(t[f"{name}.lora_up.weight"]) * float(t[f"{name}.alpha"]) for t in (before, after)]
    np.testing.assert_array_equal(*product)


def test_v_alone_lies_in_the_last_third_of_a_fused_module(tmp_path: Path) -> None:
    name = f"diffusion_model.{BLOCK}.attention.to_v"
    down, up = random(2, DIM, seed=1), random(DIM, 2, seed=2)
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, tmp_path / "lora.safetensors")
    target, _ = converted(tmp_path / "lora.safetensors", tmp_path, "comfyui")
    found = load_file(target)[f"diffusion_model.{BLOCK}.attention.qkv.lora_up.weight"]
    assert not found[: 2 * DIM].any()
    assert torch.equal(found[2 * DIM :], up)
    (tmp_path / "back").mkdir()
    back, done = converted(target, tmp_path / "back")
    assert set(changes(back)) == {f"{BLOCK}.attention.to_v.weight"}
    assert sorted(done.empty) == [f"{BLOCK}.attention.to_{x}.weight" for x in "kq"]


def test_an_untrained_fused_lora_keeps_its_shape(tmp_path: Path) -> None:
    written = fused("diffusion_model.", ".lora_down.weight", ".lora_up.weight")
    for key in written.tensors:
        if "lora_up" in key:
            written.tensors[key] = torch.zeros_like(written.tensors[key])
    target, done = converted(written.save(tmp_path), tmp_path)
    assert done.modules == 4
    assert done.empty == []
    assert load_file(target)[f"diffusion_model.{BLOCK}.attention.to_q.lora_A.weight"].shape == (4, DIM)


@pytest.mark.parametrize("key_format", ["default", "comfyui", "kohya"])
@pytest.mark.parametrize("spelling", ["SimpleTuner LyCORIS", "LoKr of whole factors, a huge alpha", "LoHa"])
def test_lokr_and_loha_keep_every_bit_under_another_prefix(
    tmp_path: Path, spelling: str, key_format: KeyFormat
) -> None:
    written = SPELLINGS[spelling]()
    source = written.save(tmp_path)
    target, done = converted(source, tmp_path, key_format)
    assert done.is_lossless
    before = [tensor for key, tensor in sorted(load_file(source).items(), key=lambda kv: kv[0].split(".")[-1])]
    after = [tensor for key, tensor in sorted(load_file(target).items(), key=lambda kv: kv[0].split(".")[-1])]
    factors = [tensor for tensor in before if tensor.ndim]
    assert all(torch.equal(one, other) for one, other in zip(factors, [t for t in after if t.ndim], strict=True))
    (part,) = changes(target)
    np.testing.assert_allclose(changes(target)[part], written.changes[part], rtol=2e-6, atol=1e-6)


def test_a_fused_loha_is_cut_and_a_fused_lokr_refused_with_a_way_out(tmp_path: Path) -> None:
    factors = {"w1_a": (3 * DIM, 2), "w1_b": (2, DIM), "w2_a": (3 * DIM, 2), "w2_b": (2, DIM)}
    name = f"diffusion_model.{BLOCK}.attention.qkv"
    tensors = {f"{name}.hada_{role}": random(*shape, seed=i) for i, (role, shape) in enumerate(factors.items())}
    save_file(tensors, tmp_path / "loha.safetensors")
    target, _ = converted(tmp_path / "loha.safetensors", tmp_path)
    before, after = changes(tmp_path / "loha.safetensors"), changes(target)
    assert set(before) == set(after)
    assert all(np.array_equal(before[part], after[part]) for part in before)
    save_file(
        {f"{name}.lokr_w1": random(6, 8, seed=1), f"{name}.lokr_w2": random(32, 8, seed=2)},
        tmp_path / "lokr.safetensors",
    )
    with pytest.raises(DataError, match=r"qkv.*LoKr of q, k and v.*`key_format=comfyui`"):
        converted(tmp_path / "lokr.safetensors", tmp_path / ".", overwrite=True)
    native, _ = converted(tmp_path / "lokr.safetensors", tmp_path, "comfyui")
    assert load_file(native).keys() == load_file(tmp_path / "lokr.safetensors").keys()


@pytest.mark.parametrize(
    ("written", "key_format", "way_out"),
    [
        (lambda: loha("diffusion_model."), "diffusers", "default"),
        (lambda: lokr("diffusion_model."), "peft", "default"),
        (SPELLINGS["ComfyUI differences"], "default", "comfyui"),
        (SPELLINGS["ComfyUI differences"], "peft", "comfyui"),
        (lambda: with_magnitudes(split("diffusion_model.", ".lora_A.weight", ".lora_B.weight"), ".dora_scale"), "diffusers", "default"),
    ],
)  # fmt: skip
def test_what_a_format_cannot_carry_is_refused_with_a_way_out(
    tmp_path: Path, written: object, key_format: KeyFormat, way_out: str
) -> None:
    source = written().save(tmp_path)  # type: ignore[operator]
    with pytest.raises(DataError, match=rf"{key_format}` cannot carry.*`key_format={way_out}` can.*lora bake"):
        converted(source, tmp_path, key_format)
    assert not any(path.name.startswith("to-") for path in tmp_path.iterdir())


def test_whole_differences_go_to_comfyui_with_biases_beside_matrices(tmp_path: Path) -> None:
    written = SPELLINGS["ComfyUI differences"]()
    name = f"diffusion_model.{BLOCK}.adaLN_modulation.0"  # a module with factors and a bias of its own
    down, up = random(2, DIM, seed=1), random(4 * DIM, 2, seed=2)
    written.tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    source = written.save(tmp_path)
    target, _ = converted(source, tmp_path, "comfyui")
    before, after = load_file(source), load_file(target)
    assert {key for key in after if not key.endswith("alpha")} == set(before)
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("key_format", ["default", "comfyui", "kohya", "peft"])
def test_a_dora_keeps_its_magnitudes(tmp_path: Path, key_format: KeyFormat) -> None:
    written = split("lora_unet_", ".lora_down.weight", ".lora_up.weight", alpha=4, flat=True)
    source = with_magnitudes(written, ".dora_scale").save(tmp_path)
    target, done = converted(source, tmp_path, key_format)
    assert done.is_lossless
    with open_lora(target) as file:
        keys = [adapter.tensors["dora_scale"] for adapter in file.adapters]
    assert len(keys) == len(MATRICES)
    (tmp_path / "back").mkdir()
    back, _ = converted(target, tmp_path / "back", "kohya")
    before, after = load_file(source), load_file(back)
    for key in before:
        if "dora_scale" in key:
            assert torch.equal(before[key].reshape(-1), after[key].reshape(-1)), key


def test_peft_loads_the_folder_and_computes_with_it(tmp_path: Path) -> None:
    """PeftModel on a small Z-Image: every module has a layer, with the rank, scale and bits of the file."""
    from peft import PeftModel

    from mergetool.lab.training import models as lab

    source = split("lora_unet_", ".lora_down.weight", ".lora_up.weight", alpha=8, flat=True)
    tensors = widths(source.tensors)
    save_file(tensors, tmp_path / "lora.safetensors")
    target, done = converted(tmp_path / "lora.safetensors", tmp_path, "peft")
    assert done.is_lossless
    assert sorted(path.name for path in target.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = PeftModel.from_pretrained(lab.transformer(), str(target))
    layers = {name: layer for name, layer in model.base_model.model.named_modules() if hasattr(layer, "lora_A")}
    assert set(layers) == set(MATRICES)
    for name, layer in layers.items():
        key = "lora_unet_" + name.replace(".", "_")
        rank = len(tensors[f"{key}.lora_down.weight"])
        assert layer.r["default"] == rank
        assert layer.scaling["default"] == 8 / rank
        assert torch.equal(layer.lora_A["default"].weight, tensors[f"{key}.lora_down.weight"].float())
        assert torch.equal(layer.lora_B["default"].weight, tensors[f"{key}.lora_up.weight"].float())


def widths(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Factors for the embedded family's architecture, which is 96 wide."""
    sizes = {64: 96, 170: 256}

    def size(n: int) -> int:
        return sizes.get(n, n)

    return {
        key: tensor if tensor.ndim < 2 else random(*map(size, tensor.shape), seed=i)
        for i, (key, tensor) in enumerate(tensors.items())
    }


def test_a_peft_folder_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = split("diffusion_model.", ".lora_A.weight", ".lora_B.weight").save(tmp_path)
    from mergetool.checkpoint.writer import CheckpointWriter

    monkeypatch.setattr(CheckpointWriter, "commit", lambda _: (_ for _ in ()).throw(OutputError("the disk is full")))
    with pytest.raises(OutputError, match="full"):
        converted(source, tmp_path, "peft")
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    source = split("diffusion_model.", ".lora_A.weight", ".lora_B.weight").save(tmp_path)
    target, _ = converted(source, tmp_path, "peft")
    before = (target / "adapter_model.safetensors").read_bytes()
    with pytest.raises(OutputError, match="`overwrite`"):
        converted(source, tmp_path, "peft")
    converted(source, tmp_path, "peft", overwrite=True)
    assert (target / "adapter_model.safetensors").read_bytes() == before


def test_a_folder_is_not_named_like_a_file_and_a_file_gets_its_ending(tmp_path: Path) -> None:
    source = split("diffusion_model.", ".lora_A.weight", ".lora_B.weight").save(tmp_path)
    with open_lora(source) as file:
        with pytest.raises(UsageError, match="a folder"):
            convert(file, tmp_path / "x.safetensors", "peft")
        convert(file, tmp_path / "x", "default")
    assert (tmp_path / "x.safetensors").is_file()


def test_two_runs_give_the_same_bytes_and_metadata_has_no_path(tmp_path: Path) -> None:
    written = split("lora_unet_", ".lora_down.weight", ".lora_up.weight", alpha=8, flat=True)
    written.metadata = {"ss_network_module": "networks.lora_zimage", "ss_tag_frequency": '{"cat": 3}'}
    source = written.save(tmp_path)
    found = set()
    for _ in range(2):
        target, _done = converted(source, tmp_path, overwrite=True)
        found.add(target.read_bytes())
    assert len(found) == 1
    with safe_open(target, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_tag_frequency"] == '{"cat": 3}'  # how it was trained is part of what it is
    assert json.loads(metadata["mergetool.lora.convert"]) == {"key_format": "default", "lora": "lora"}
    assert str(tmp_path) not in json.dumps(metadata)


def test_an_alpha_in_the_header_is_not_left_there(tmp_path: Path) -> None:
    target, _ = converted(SPELLINGS["diffusers header"]().save(tmp_path), tmp_path)
    with safe_open(target, "pt") as opened:
        header = json.loads(opened.metadata()["lora_adapter_metadata"])
    ranks = {module: (4, 2, 3)[i % 3] for i, module in enumerate(MATRICES)}
    # an alpha of 6 cannot be folded into rank 4: all have alphas beside the factors, which diffusers multiplies in
    assert header["transformer.lora_alpha"] == header["transformer.r"] == 4
    assert header["transformer.alpha_pattern"] == {m: rank for m, rank in ranks.items() if rank != 4}


def test_the_header_has_the_rank_of_every_module_for_diffusers(tmp_path: Path) -> None:
    target, _ = converted(split("", ".lora_A.weight", ".lora_B.weight", ranks=(4, 2)).save(tmp_path), tmp_path)
    with safe_open(target, "pt") as opened:
        header = json.loads(opened.metadata()["lora_adapter_metadata"])
    ranks = {module: 4 - 2 * (i % 2) for i, module in enumerate(MATRICES)}
    assert sorted(header["transformer.target_modules"]) == sorted(MATRICES)
    assert header["transformer.rank_pattern"] == {module: 2 for module, rank in ranks.items() if rank == 2}


def test_where_one_module_needs_an_alpha_all_have_one(tmp_path: Path) -> None:
    written = split("diffusion_model.", ".lora_A.weight", ".lora_B.weight", ranks=(3,))
    written.tensors[f"diffusion_model.{BLOCK}.attention.to_q.alpha"] = torch.tensor(2.0)
    target, done = converted(written.save(tmp_path), tmp_path)
    alphas = {key: float(value) for key, value in load_file(target).items() if key.endswith(".alpha")}
    assert done.is_lossless
    assert len(alphas) == len(MATRICES)
    assert alphas.pop(f"diffusion_model.{BLOCK}.attention.to_q.alpha") == 2
    assert set(alphas.values()) == {3}


FOREIGN = {
    "AuraFlow, underscored": ("lora_unet_", "double_layers_0_attn_w1q", {"kohya"}),
    "LTX, diffusers' names": ("transformer.", "transformer_blocks.0.attn1.to_q", {"diffusers", "peft"}),
    "LTX, diffusers' names in the wrong place": ("diffusion_model.", "transformer_blocks.0.attn1.to_q", set()),
    "AuraFlow, ComfyUI's names of one block": ("diffusion_model.", "single_layers.0.mlp.c_fc1", {"comfyui", "kohya"}),
    "PixArt, diffusers' names": ("diffusion_model.", "transformer_blocks.0.ff.net.2", set()),
    "AuraFlow, ComfyUI's names": ("diffusion_model.", "double_layers.0.attn.w1q", {"comfyui", "kohya"}),
    "SDXL, underscored, a text encoder": ("lora_te1_", "text_model_encoder_layers_0_mlp_fc1", set()),
    "PEFT": ("base_model.model.", "transformer_blocks.0.attn.to_q", {"peft"}),
    "no prefix": ("", "transformer_blocks.0.attn.to_q", set()),
}


@pytest.mark.parametrize("key_format", KEY_FORMATS)
@pytest.mark.parametrize("case", FOREIGN)
def test_of_another_family_only_names_that_stay_are_written(tmp_path: Path, case: str, key_format: KeyFormat) -> None:
    prefix, module, formats = FOREIGN[case]
    ends = (".lora_down.weight", ".lora_up.weight")
    save_file({prefix + module + end: random(4, 4, seed=1) for end in ends}, tmp_path / "lora.safetensors")
    if key_format not in formats:
        with pytest.raises(DataError):
            converted(tmp_path / "lora.safetensors", tmp_path, key_format)
        assert len(list(tmp_path.iterdir())) == 1
        return
    target, _ = converted(tmp_path / "lora.safetensors", tmp_path, key_format)
    start = {
        "comfyui": "diffusion_model.",
        "kohya": "lora_unet_",
        "diffusers": "transformer.",
        "peft": "base_model.model.",
    }
    stem = start[key_format] + (module.replace(".", "_") if key_format == "kohya" else module)
    assert all(key.startswith(stem + ".") for key in stored(target))


def test_what_another_family_is_refused_says_what_can_be_written(tmp_path: Path) -> None:
    save_file({f"transformer.x.lora_{x}.weight": random(4, 4, seed=1) for x in "AB"}, tmp_path / "lora.safetensors")
    with pytest.raises(
        DataError,
        match=r"names are not known here.*in `key_format=comfyui`; `key_format=diffusers` or `key_format=peft` keeps",
    ):
        converted(tmp_path / "lora.safetensors", tmp_path, "comfyui")


def test_a_nan_is_refused_by_name(tmp_path: Path) -> None:
    written = split("diffusion_model.", ".lora_A.weight", ".lora_B.weight")
    written.tensors[f"diffusion_model.{BLOCK}.attention.to_q.lora_B.weight"][3, 1] = torch.nan
    with pytest.raises(NonFiniteError, match=r"to_q\.lora_B"):
        converted(written.save(tmp_path), tmp_path)


def test_keys_that_are_not_understood_are_an_error_or_named(tmp_path: Path) -> None:
    written = split("diffusion_model.", ".lora_A.weight", ".lora_B.weight")
    written.tensors["diffusion_model.layers.1.attention.to_q.oft_blocks"] = torch.zeros(2, 2)
    source = written.save(tmp_path)
    with pytest.raises(DataError, match=r"oft_blocks.*OFT.*`skip_unmatched`"):
        converted(source, tmp_path)
    _, done = converted(source, tmp_path, skip_unmatched=True)
    assert [key for key, _ in done.unmatched] == ["diffusion_model.layers.1.attention.to_q.oft_blocks"]
    assert not done.is_lossless


def test_underscored_names_of_an_unknown_model_need_the_model(tmp_path: Path) -> None:
    save_file(
        {f"lora_unet_down_blocks_0_proj.lora_{x}.weight": random(4, 4, seed=1) for x in ("up", "down")},
        tmp_path / "lora.safetensors",
    )
    with pytest.raises(DataError, match="`model`"):
        converted(tmp_path / "lora.safetensors", tmp_path, "comfyui")
    target, _ = converted(tmp_path / "lora.safetensors", tmp_path, "kohya")
    assert "lora_unet_down_blocks_0_proj.lora_up.weight" in load_file(target)


@pytest.mark.parametrize("key_format", ["comfyui", "kohya"])
def test_a_locon_of_a_known_model_keeps_its_three_factors(tmp_path: Path, key_format: KeyFormat) -> None:
    factors = {"up": random(8, 3, 1, 1, seed=1), "down": random(3, 4, 1, 1, seed=2), "mid": random(3, 3, 3, 3, seed=3)}
    tensors = {f"lora_unet_input_blocks_0_conv.lora_{role}.weight": tensor for role, tensor in factors.items()}
    save_file(tensors | {"lora_unet_input_blocks_0_conv.alpha": torch.tensor(6.0)}, tmp_path / "lora.safetensors")
    save_file({"input_blocks.0.conv.weight": torch.zeros(8, 4, 3, 3)}, tmp_path / "model.safetensors")
    target = tmp_path / "out.safetensors"
    with models.open_model(str(tmp_path / "model.safetensors")) as model:
        with open_lora(tmp_path / "lora.safetensors", anatomy=model.anatomy) as file:
            convert(file, target, key_format, names_known=True)
            (before,) = (dense_rows(file, change, 0, 8) for (change,) in file.changes.values())
        with open_lora(target, anatomy=model.anatomy) as file:
            assert set(file.changes) == {"input_blocks.0.conv.weight"}
            (after,) = (dense_rows(file, change, 0, 8) for (change,) in file.changes.values())
    np.testing.assert_array_equal(after, before)
    exact = 2 * np.einsum("or,rpxy,pi->oixy", *(f64(factors[role]).reshape(shape) for role, shape in
                          (("up", (8, 3)), ("mid", (3, 3, 3, 3)), ("down", (3, 4)))))  # fmt: skip
    np.testing.assert_allclose(after, exact.reshape(8, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("key_format", ["default", "kohya", "peft"])
def test_the_scale_of_an_rslora_is_kept_to_its_last_bit(tmp_path: Path, key_format: KeyFormat) -> None:
    """8 / sqrt(3) times 3 is no float32, so its alpha is a float64."""
    written = split("base_model.model.", ".lora_A.weight", ".lora_B.weight", ranks=(3,))
    written.config = {"peft_type": "LORA", "lora_alpha": 8, "r": 3, "use_rslora": True}
    target, done = converted(written.save(tmp_path), tmp_path, key_format)
    assert done.is_lossless
    with open_lora(target) as file:
        assert {adapter.scale for adapter in file.adapters} == {8 / math.sqrt(3)}
