"""A difference by way of a device: the same file as the CPU's, whatever its memory. The device is the CPU here."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergetool.checkpoint import dtypes
from mergetool.checkpoint.inputs import InputFile
from mergetool.checkpoint.reader import Checkpoint
from mergetool.difference import on_device
from mergetool.difference.extract import Extraction, extract, open_diff
from mergetool.difference.on_device import MOST_ELEMENTS, in_batches, subtract
from mergetool.engine.device import Device
from mergetool.errors import NonFiniteError, StorageError
from mergetool.ops.tensors import TORCH
from mergetool.options.differences import DiffOptions
from tests.families import checkpoint
from tests.ops import oracle

CPU = torch.device("cpu")
OPTIONS = DiffOptions(rank_thresh=0.99, rank_max=16, exclude=("refiner",))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base (ComfyUI, bf16) and variant (diffusers shards, fp32): different layout, dtype and container."""
    folder = tmp_path_factory.mktemp("family")
    checkpoint(folder / "base.safetensors", variant=0)
    checkpoint(folder / "variant", variant=1, layout="diffusers", dtype=dtypes.F32, shard_size=10_000_000)
    return folder


@pytest.fixture(scope="module")
def reference(family: Path) -> Extraction:
    return diff(family, family / "reference.safetensors", device=None)


def diff(folder: Path, output: Path, *, device: torch.device | None = CPU, memory: int = 0) -> Extraction:
    with open_diff(str(folder / "base.safetensors"), str(folder / "variant"), OPTIONS) as pairing:
        return extract(pairing, output, OPTIONS, device=device, memory=memory)


def same_layers(found: Extraction, expected: Extraction) -> None:
    assert [(one.name, one.rank, one.capped, one.wanted) for one in found.layers] == [
        (one.name, one.rank, one.capped, one.wanted) for one in expected.layers
    ]
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert (one.energy, one.residual) == pytest.approx((other.energy, other.residual), abs=1e-5)
    assert found.skipped == expected.skipped


def test_the_file_has_the_cpus_keys_metadata_and_products(family: Path, reference: Extraction, tmp_path: Path) -> None:
    same_layers(diff(family, tmp_path / "lora.safetensors"), reference)
    with (
        Checkpoint.open(tmp_path / "lora.safetensors") as ours,
        Checkpoint.open(family / "reference.safetensors") as cpu,
    ):
        assert (dict(ours.tensors), dict(ours.metadata)) == (dict(cpu.tensors), dict(cpu.metadata))
        ours_keys, cpu_keys = list(ours.tensors), list(cpu.tensors)
    assert ours_keys == cpu_keys
    mine, theirs = load_file(tmp_path / "lora.safetensors"), load_file(family / "reference.safetensors")
    for down in (key for key in mine if ".lora_A." in key):
        up = down.replace(".lora_A.", ".lora_B.")
        product, expected = (pair[up].double() @ pair[down].double() for pair in (mine, theirs))
        assert float((product - expected).norm() / expected.norm()) < 5e-3, down


@pytest.mark.parametrize("memory", [1, 3_000_000])
def test_small_memory_makes_more_batches_and_the_same_layers(
    family: Path, reference: Extraction, tmp_path: Path, memory: int
) -> None:
    same_layers(diff(family, tmp_path / "lora.safetensors", memory=memory), reference)


@pytest.mark.parametrize("room", [0, 1, 2])
def test_what_the_device_has_no_memory_for_is_halved_and_at_last_done_by_the_cpu(
    family: Path, reference: Extraction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    decompose, refused = on_device.decompose_batch, 0

    def cramped(deltas: torch.Tensor, *rest: object, **options: object) -> object:
        nonlocal refused
        if len(deltas) > room:
            refused += 1
            raise torch.OutOfMemoryError("no room")
        return decompose(deltas, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(on_device, "decompose_batch", cramped)
    same_layers(diff(family, tmp_path / "lora.safetensors"), reference)
    assert refused > 3
    same = (tmp_path / "lora.safetensors").read_bytes() == (family / "reference.safetensors").read_bytes()
    assert same == (room == 0)


def test_two_runs_give_the_same_bytes(family: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        diff(family, tmp_path / f"{name}.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_a_nan_names_the_tensor_and_leaves_no_file(family: Path, tmp_path: Path) -> None:
    name = "layers.0.feed_forward.w1.weight"
    tensors = load_file(family / "base.safetensors")
    tensors[name][3, 4] = torch.nan
    save_file(tensors, tmp_path / "base.safetensors")
    (tmp_path / "variant").symlink_to(family / "variant")
    with pytest.raises(NonFiniteError, match=name.replace(".", r"\.")):
        diff(tmp_path, tmp_path / "lora.safetensors")
    assert not (tmp_path / "lora.safetensors").exists()


@pytest.mark.parametrize("at", [0, 7, 60])
def test_a_disk_that_fails_ends_the_run_with_its_error(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    read, calls = InputFile.read_into, itertools.count()

    def failing(file: InputFile, buffer: memoryview, offset: int) -> None:
        if next(calls) == at:
            raise StorageError("the disk failed")
        read(file, buffer, offset)

    monkeypatch.setattr(InputFile, "read_into", failing)
    with pytest.raises(StorageError, match="the disk failed"):
        diff(family, tmp_path / "lora.safetensors")
    assert not (tmp_path / "lora.safetensors").exists()


@pytest.mark.parametrize("memory", [1, 20_000_000, 1 << 40])
def test_batches_hold_every_pair_once_and_one_shape_each(family: Path, memory: int) -> None:
    with open_diff(str(family / "base.safetensors"), str(family / "variant"), OPTIONS) as pairing:
        batches = in_batches(pairing.decomposed, memory)
        assert sorted(pair.name for batch in batches for pair in batch.pairs) == sorted(
            pair.name for pair in pairing.decomposed
        )
    for batch in batches:
        assert len({pair.base.shape for pair in batch.pairs}) == 1
        assert memory > 1 or len(batch.pairs) == 1
        assert sum(pair.base.numel for pair in batch.pairs) <= MOST_ELEMENTS
        edges = sorted(
            (start, start + part.nbytes)
            for pair, places in zip(batch.pairs, batch.places, strict=True)
            for part, start in zip((pair.base, pair.variant), places, strict=True)
        )
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(edges))
        assert edges[-1][1] <= batch.size


@pytest.mark.parametrize("base", TORCH)
@pytest.mark.parametrize("variant", TORCH)
def test_the_difference_is_one_float32_subtraction(base: dtypes.DType, variant: dtypes.DType) -> None:
    values = torch.randn(2, 64, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stored = [one.to(TORCH[dtype]) for one, dtype in zip(values, (base, variant), strict=True)]
    out = torch.empty(64, 8)
    subtract(stored[0], stored[1], out=out)
    exact = [
        oracle.decode(one.view(torch.uint8).numpy().tobytes(), dtype).astype(np.float32).reshape(64, 8)
        for one, dtype in zip(stored, (base, variant), strict=True)
    ]
    np.testing.assert_array_equal(out.numpy(), exact[1] - exact[0])


def test_a_chosen_gpu_is_the_one_that_decomposes() -> None:
    assert on_device.of(Device(("cuda:1",))) == torch.device("cuda", 1)
    assert on_device.of(Device()) is None


@pytest.mark.gpu
def test_a_gpu_finds_the_layers_of_the_cpu(family: Path, reference: Extraction, tmp_path: Path) -> None:
    found = diff(family, tmp_path / "lora.safetensors", device=torch.device("cuda"))
    same_layers(found, reference)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bytes_twice(family: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        diff(family, tmp_path / f"{name}.safetensors", device=torch.device("cuda"))
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
