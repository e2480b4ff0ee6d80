"""A difference LoRA from real files: what is in it, what it says it holds, and who loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from safetensors.torch import load_file, save_file

from mergetool.checkpoint import dtypes
from mergetool.checkpoint.reader import Checkpoint
from mergetool.difference.delta import DeltaReader
from mergetool.difference.extract import Extraction, extract, open_diff
from mergetool.errors import DataError, FamilyError, NonFiniteError, OutputError, PatternError, UsageError
from mergetool.options.differences import DiffOptions
from tests.families import checkpoint
from tests.ops import oracle

RENAMES = {
    "to_out.0": "out",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
    "all_x_embedder.2-1": "x_embedder",
    "all_final_layer.2-1": "final_layer",
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base (ComfyUI, bf16) and variant (diffusers shards, fp32): different layout, dtype and container."""
    folder = tmp_path_factory.mktemp("family")
    checkpoint(folder / "base.safetensors", variant=0)
    checkpoint(folder / "variant", variant=1, layout="diffusers", dtype=dtypes.F32, shard_size=10_000_000)
    return folder


def diff(folder: Path, output: Path, **options: object) -> Extraction:
    chosen = DiffOptions(**options)  # type: ignore[arg-type]
    with open_diff(str(folder / "base.safetensors"), str(folder / "variant"), chosen) as pairing:
        return extract(pairing, output, chosen)


def delta(folder: Path, part: str) -> np.ndarray:
    """variant - base of one parameter in float64, from the raw bytes."""
    stored, row = part, 0
    for i, letter in enumerate("qkv"):
        if f".to_{letter}." in part:
            stored, row = part.replace(f"to_{letter}", "qkv"), i
    for diffusers, comfyui in RENAMES.items():
        stored = stored.replace(diffusers, comfyui)
    with Checkpoint.open(folder / "variant") as opened:
        shape = opened.tensors[part].shape
        variant = oracle.decode(opened.read(part), dtypes.F32)
    with Checkpoint.open(folder / "base.safetensors") as opened:
        base = oracle.decode(opened.read(stored), dtypes.BF16)
    return (variant - base[row * variant.size :][: variant.size]).reshape(shape)


def product(lora: Path, module: str) -> np.ndarray:
    tensors = load_file(lora)
    up, down = (tensors[f"diffusion_model.{module}.lora_{x}.weight"].double().numpy() for x in "BA")
    return up @ down


def test_the_stored_pair_has_the_stated_residual(family: Path, tmp_path: Path) -> None:
    found = diff(family, tmp_path / "lora.safetensors", rank_thresh=0.9, rank_max=16)
    for layer in found.layers:
        truth = delta(family, layer.name)
        residual = np.linalg.norm(truth - product(tmp_path / "lora.safetensors", layer.name.removesuffix(".weight")))
        assert residual / np.linalg.norm(truth) == pytest.approx(layer.residual, abs=1e-5), layer.name


def test_the_rank_and_energy_are_those_of_the_whole_spectrum(family: Path, tmp_path: Path) -> None:
    found = diff(family, tmp_path / "lora.safetensors", rank_thresh=0.9, rank_max=0, exclude=("refiner",))
    for layer in found.layers:
        energies = np.linalg.svd(delta(family, layer.name), compute_uv=False) ** 2
        share = np.cumsum(energies) / energies.sum()
        assert layer.rank == 1 + np.searchsorted(share, 0.9), layer.name
        assert layer.energy == pytest.approx(share[layer.rank - 1], abs=1e-5), layer.name


def test_a_cap_below_the_threshold_is_said_for_each_matrix(family: Path, tmp_path: Path) -> None:
    found = diff(family, tmp_path / "lora.safetensors", rank_thresh=0.999, rank_max=2)
    assert all(layer.capped and layer.rank == 2 for layer in found.layers)
    assert all(layer.wanted is None or layer.wanted > 2 for layer in found.layers)


def test_a_fixed_rank_is_every_matrixs_rank(family: Path, tmp_path: Path) -> None:
    found = diff(family, tmp_path / "lora.safetensors", rank=5, rank_max=0)
    assert {layer.rank for layer in found.layers} == {5}


def test_excluded_groups_are_not_in_the_file_and_are_measured(family: Path, tmp_path: Path) -> None:
    found = diff(family, tmp_path / "lora.safetensors", exclude=("refiner",))
    assert not any("refiner" in key for key in load_file(tmp_path / "lora.safetensors"))
    energies = found.skipped["excluded: refiner"]
    name = "noise_refiner.0.attention.to_v.weight"
    assert energies[name] == pytest.approx((delta(family, name) ** 2).sum(), rel=1e-5)


def test_everything_is_accounted_for(family: Path, tmp_path: Path) -> None:
    """The energies of decomposed and skipped parameters add up to the whole difference of the two models."""
    found = diff(family, tmp_path / "lora.safetensors", exclude=("refiner",))
    with Checkpoint.open(family / "variant") as opened:
        names = list(opened.tensors)
    skipped = [name for energies in found.skipped.values() for name in energies]
    assert sorted([layer.name for layer in found.layers] + skipped) == sorted(names)
    assert found.total == pytest.approx(sum((delta(family, name) ** 2).sum() for name in names), rel=1e-5)


def test_include_takes_only_what_it_names(family: Path, tmp_path: Path) -> None:
    found = diff(family, tmp_path / "lora.safetensors", include=("layers.1",), exclude=("ffn",))
    assert {layer.name.split(".")[1] for layer in found.layers} == {"1"}
    assert not any("feed_forward" in layer.name for layer in found.layers)


def test_two_runs_give_the_same_bytes(family: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        diff(family, tmp_path / f"{name}.safetensors", rank_thresh=0.9)
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("method", ["mmap", "pread"])
def test_bytes_do_not_depend_on_threads_or_reading(
    family: Path, tmp_path: Path, threads: int, method: Literal["mmap", "pread"]
) -> None:
    diff(family, tmp_path / "reference.safetensors", rank_thresh=0.9)
    options = DiffOptions(rank_thresh=0.9)
    torch.set_num_threads(3 - min(threads, 2))
    try:
        with open_diff(str(family / "base.safetensors"), str(family / "variant"), options) as pairing:
            extract(pairing, tmp_path / "lora.safetensors", options, threads=threads, reader=method)
    finally:
        torch.set_num_threads(2)
    assert (tmp_path / "lora.safetensors").read_bytes() == (tmp_path / "reference.safetensors").read_bytes()


def test_diffusers_uses_every_key_and_reproduces_the_variant(family: Path, tmp_path: Path) -> None:
    lora = tmp_path / "lora.safetensors"
    found = diff(family, lora, rank_thresh=0.99, rank_max=0, exclude=("refiner", "embedder", "final"), dtype=dtypes.F32)
    pipeline = pipeline_on(family)
    pipeline.load_lora_weights(str(tmp_path), weight_name=lora.name)
    loaded = [name for name, _ in pipeline.transformer.named_modules() if name.endswith("lora_A.default_0")]
    assert len(loaded) == len(found.layers) == len(load_file(lora)) // 2
    before = {
        name.replace(".base_layer", ""): value.clone() for name, value in pipeline.transformer.state_dict().items()
    }
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    after = pipeline.transformer.state_dict()
    for layer in found.layers:
        moved = (after[layer.name] - before[layer.name]).double().numpy()
        truth = delta(family, layer.name)
        residual = np.linalg.norm(truth - moved) / np.linalg.norm(truth)
        assert residual == pytest.approx(layer.residual, abs=2e-4), layer.name


def test_diffusers_takes_the_embedders_too(family: Path, tmp_path: Path) -> None:
    found = diff(family, tmp_path / "lora.safetensors", rank=4)
    pipeline = pipeline_on(family)
    pipeline.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    loaded = {name for name, _ in pipeline.transformer.named_modules() if name.endswith("lora_A.default_0")}
    assert {name.removesuffix(".lora_A.default_0") + ".weight" for name in loaded} == {
        layer.name for layer in found.layers
    }


def pipeline_on(family: Path) -> ZImagePipeline:
    """A pipeline with the base's transformer, in float32, and nothing else."""
    transformer = ZImageTransformer2DModel.from_single_file(
        str(family / "base.safetensors"),
        config=str(family / "variant"),
        torch_dtype=torch.float32,
        local_files_only=True,
    )
    return ZImagePipeline(None, None, None, None, transformer)  # type: ignore[arg-type]


def test_a_target_that_exists_is_refused_before_any_work(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lora.safetensors").write_bytes(b"precious")
    monkeypatch.setattr(DeltaReader, "read", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(OutputError, match="`overwrite`"):
        diff(family, tmp_path / "lora.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


def test_an_output_without_an_ending_gets_one(family: Path, tmp_path: Path) -> None:
    assert diff(family, tmp_path / "lora").layers
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


def test_the_output_must_be_named_as_a_file(family: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r'would be GGUF.*name it ".*lora\.safetensors"'):
        diff(family, tmp_path / "lora.gguf")
    (tmp_path / "lora").mkdir()
    with pytest.raises(OutputError, match="is a folder; name a file in it"):
        diff(family, tmp_path / "lora")


def test_equal_models_have_nothing_to_write(tmp_path: Path) -> None:
    checkpoint(tmp_path / "x.safetensors")
    options = DiffOptions()
    with (
        open_diff(str(tmp_path / "x.safetensors"), str(tmp_path / "x.safetensors"), options) as pairing,
        pytest.raises(DataError, match="do not differ"),
    ):
        extract(pairing, tmp_path / "lora.safetensors", options)
    assert not (tmp_path / "lora.safetensors").exists()


def test_an_unchanged_matrix_is_named_and_not_stored(family: Path, tmp_path: Path) -> None:
    base = load_file(family / "base.safetensors")
    changed = dict(base)
    name = "layers.0.feed_forward.w1.weight"
    changed[name] = base[name] + torch.randn(base[name].shape).bfloat16()
    save_file(changed, tmp_path / "variant.safetensors")
    options = DiffOptions()
    with open_diff(str(family / "base.safetensors"), str(tmp_path / "variant.safetensors"), options) as pairing:
        found = extract(pairing, tmp_path / "lora.safetensors", options)
    assert [layer.name for layer in found.layers] == [name]
    assert "layers.0.feed_forward.w2.weight" in found.skipped["unchanged"]
    assert len(load_file(tmp_path / "lora.safetensors")) == 2


def test_a_nan_names_the_tensor(family: Path, tmp_path: Path) -> None:
    tensors = load_file(family / "base.safetensors")
    tensors["layers.0.feed_forward.w1.weight"][3, 4] = torch.nan
    save_file(tensors, tmp_path / "variant.safetensors")
    options = DiffOptions()
    with (
        open_diff(str(family / "base.safetensors"), str(tmp_path / "variant.safetensors"), options) as pairing,
        pytest.raises(NonFiniteError, match=r"layers\.0\.feed_forward\.w1\.weight"),
    ):
        extract(pairing, tmp_path / "lora.safetensors", options)


@pytest.mark.parametrize("options", [{"rank_thresh": 0.0}, {"rank_thresh": 1.5}, {"rank": -1}, {"rank_max": -1}])
def test_impossible_numbers_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        DiffOptions(**options)  # type: ignore[arg-type]


def test_excluding_everything_is_refused(family: Path) -> None:
    with pytest.raises(UsageError, match="no matrix is left"), open_pair(family, DiffOptions(exclude=("*",))):
        pass


def test_a_pattern_that_matches_nothing_is_refused(family: Path) -> None:
    with pytest.raises(PatternError), open_pair(family, DiffOptions(exclude=("refinery",))):
        pass


def test_clashing_shapes_are_refused(family: Path, tmp_path: Path) -> None:
    tensors = load_file(family / "base.safetensors")
    tensors["layers.0.feed_forward.w1.weight"] = torch.zeros(8, 64, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "variant.safetensors")
    with (
        pytest.raises(FamilyError, match=r"\[8, 64\]"),
        open_diff(str(family / "base.safetensors"), str(tmp_path / "variant.safetensors"), DiffOptions()),
    ):
        pass


def open_pair(family: Path, options: DiffOptions) -> object:
    return open_diff(str(family / "base.safetensors"), str(family / "variant"), options)
