"""Models of different layout, prefix, dtype and container in one expression, and outputs that diffusers itself loads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ZImageTransformer2DModel

from mergetool.checkpoint import dtypes
from mergetool.checkpoint.reader import Checkpoint
from mergetool.engine import job
from mergetool.options.merging import MergeOptions
from tests.families import TINY, checkpoint
from tests.ops import oracle

MERGE = "'comfy.safetensors' + 20*('official' - 'prefixed.safetensors')"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 ComfyUI file, fp32 diffusers shards, and a bf16 file with ComfyUI's save prefix."""
    folder = tmp_path_factory.mktemp("zoo")
    checkpoint(folder / "comfy.safetensors", variant=0)
    checkpoint(folder / "official", variant=1, layout="diffusers", dtype=dtypes.F32, shard_size=300_000)
    checkpoint(folder / "prefixed.safetensors", variant=2, prefix="model.diffusion_model.")
    return folder


@pytest.fixture
def here(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(zoo)
    return zoo


def merge(output: Path, options: MergeOptions | None = None, text: str = MERGE, shard_size: int | None = None) -> Path:
    with job.open_merge(text, options) as plan:
        job.run_merge(plan, output, shard_size=shard_size)
    return output


def expected_q(folder: Path, block: str) -> np.ndarray:
    """The merge of one q matrix, by numpy from the raw bytes of the three differently stored files."""
    with Checkpoint.open(folder / "comfy.safetensors") as comfy:
        fused = oracle.decode(comfy.read(f"{block}.attention.qkv.weight"), dtypes.BF16)
    with Checkpoint.open(folder / "official") as official:
        split = oracle.decode(official.read(f"{block}.attention.to_q.weight"), dtypes.F32)
    with Checkpoint.open(folder / "prefixed.safetensors") as prefixed:
        other = oracle.decode(prefixed.read(f"model.diffusion_model.{block}.attention.qkv.weight"), dtypes.BF16)
    third = split.size
    base, a, b = (x[:third].astype(np.float32) for x in (fused, split, other))
    return base + np.float32(20) * (a - b)


def test_mixed_layouts_and_dtypes_are_the_same_parameters(here: Path, tmp_path: Path) -> None:
    out = merge(tmp_path / "out.safetensors")
    with Checkpoint.open(out) as merged:
        found = merged.read("layers.1.attention.qkv.weight")
    expected = oracle.encode(expected_q(here, "layers.1"), dtypes.BF16)
    assert found[: len(expected)] == expected


def test_comfyui_output_loads_with_from_single_file(here: Path, tmp_path: Path) -> None:
    out = merge(tmp_path / "out.safetensors", MergeOptions(protect=("refiner",)))
    loaded = load_single(out, here)
    found = loaded.state_dict()["layers.1.attention.to_q.weight"].float().numpy().ravel()
    assert oracle.encode(found, dtypes.BF16) == oracle.encode(expected_q(here, "layers.1"), dtypes.BF16)


def test_prefixed_output_loads_with_from_single_file(here: Path, tmp_path: Path) -> None:
    text = "'prefixed.safetensors' + 2*('official' - 'comfy.safetensors')"
    out = merge(tmp_path / "out.safetensors", text=text)
    with Checkpoint.open(out) as merged:
        assert all(name.startswith("model.diffusion_model.") for name in merged.tensors)
    load_single(out, here)


def load_single(path: Path, zoo: Path) -> ZImageTransformer2DModel:
    return ZImageTransformer2DModel.from_single_file(
        str(path), config=str(zoo / "official"), torch_dtype=torch.bfloat16, local_files_only=True
    )


@pytest.mark.parametrize("shard_size", [None, 200_000])
def test_diffusers_output_loads_with_from_pretrained(here: Path, tmp_path: Path, shard_size: int | None) -> None:
    out = merge(tmp_path / "out", MergeOptions(layout="diffusers"), shard_size=shard_size)
    loaded, report = ZImageTransformer2DModel.from_pretrained(
        out, output_loading_info=True, torch_dtype=torch.bfloat16, local_files_only=True
    )
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    found = loaded.state_dict()["layers.1.attention.to_q.weight"].float().numpy().ravel()
    assert oracle.encode(found, dtypes.BF16) == oracle.encode(expected_q(here, "layers.1"), dtypes.BF16)
    assert (len(list(out.glob("*.safetensors"))) == 1) == (shard_size is None)


def test_both_layouts_hold_the_same_numbers(here: Path, tmp_path: Path) -> None:
    one = merge(tmp_path / "one.safetensors", MergeOptions(layout="comfyui"))
    other = merge(tmp_path / "other.safetensors", MergeOptions(layout="diffusers"))
    with Checkpoint.open(one) as fused, Checkpoint.open(other) as split:
        for block in ("layers.0", "noise_refiner.0", "context_refiner.0"):
            parts = b"".join(split.read(f"{block}.attention.to_{x}.weight") for x in "qkv")
            assert fused.read(f"{block}.attention.qkv.weight") == parts


def test_the_first_models_dtype_is_the_outputs(here: Path, tmp_path: Path) -> None:
    out = merge(tmp_path / "out.safetensors", text="'official' + 2*('comfy.safetensors' - 'prefixed.safetensors')")
    with Checkpoint.open(out) as merged:
        assert {info.dtype.name for info in merged.tensors.values()} == {"fp32"}
        assert "layers.0.attention.to_q.weight" in merged.tensors


def test_the_config_travels_with_a_folder_output(here: Path, tmp_path: Path) -> None:
    out = merge(tmp_path / "out", MergeOptions(layout="diffusers"))
    with Checkpoint.open(out) as opened:
        assert opened.config is not None
        assert {key: opened.config[key] for key in ("dim", "axes_dims", "axes_lens")} == {
            key: TINY[key] for key in ("dim", "axes_dims", "axes_lens")
        }


def test_a_one_dimensional_pad_token_meets_a_two_dimensional_one(zoo: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(zoo / "comfy.safetensors")
    tensors["x_pad_token"] = tensors["x_pad_token"].reshape(-1)
    save_file(tensors, tmp_path / "flat.safetensors")
    text = f"'{tmp_path}/flat.safetensors' + 2*('{zoo}/prefixed.safetensors' - '{zoo}/comfy.safetensors')"
    out = merge(tmp_path / "out.safetensors", text=text)
    with Checkpoint.open(out) as merged:
        assert merged.tensors["x_pad_token"].shape == (1, 64)
