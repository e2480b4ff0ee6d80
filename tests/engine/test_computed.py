"""A merge that is read instead of written: its bytes are those of the file that it would be."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergetool.checkpoint.dtypes import F8_E4M3
from mergetool.checkpoint.reader import Checkpoint
from mergetool.engine import job
from mergetool.engine.computed import ComputedCheckpoint
from mergetool.engine.inputs import open_model, opened
from mergetool.engine.memory import memory_needed
from mergetool.errors import DataError, NonFiniteError
from mergetool.options.merging import MergeOptions
from tests.families import checkpoint
from tests.hostile import models as small
from tests.quant.ggml import Q
from tests.quant.models import as_gguf, quantised

Z_IMAGE = (
    "'alk.safetensors' + 20*('a.safetensors' - 'b.safetensors')",
    "0.25*'alk.safetensors' + 0.75*('alk.safetensors' + 2*('a.safetensors' - 'b.safetensors'))",
    "ties('alk.safetensors', 'b.safetensors', base='c.safetensors')",
    "'alk.safetensors' + 0.5*slerp('a.safetensors', 'b.safetensors', t=0.25) - 0.5*'c.safetensors'",
    "'fp8.safetensors' + 3*('a.safetensors' - 'b.safetensors')",
    "'alk.safetensors' + 3*('convrot.safetensors' - 'b.safetensors')",
    "'alk.safetensors' + 0.5*('q4.gguf' - 'b.safetensors')",
    "'raw.safetensors' + 2*('a.safetensors' - 'b.safetensors')",
)
SMALL = (
    "'alk.safetensors' + 0.7*lora('lora.safetensors')",
    "'alk.safetensors' + 5*('a.safetensors' - 'b.safetensors') - 0.3*lora('lora.safetensors')",
    "'''alk.safetensors'' + 2*(''a.safetensors'' - ''b.safetensors'')' + 0.7*lora('lora.safetensors')",
)


@pytest.fixture(scope="module")
def z_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fine-tunes of one base in two layouts, and in four containers."""
    folder = tmp_path_factory.mktemp("z-image")
    for seed, name in enumerate(["alk", "a", "b", "c"]):
        checkpoint(folder / f"{name}.safetensors", variant=seed, layout="diffusers" if name == "a" else "comfyui")
    for name, container in (("fp8", "fp8"), ("convrot", "convrot")):
        quantised(folder / f"{name}.safetensors", folder / "alk.safetensors", container)
    as_gguf(folder / "q4.gguf", folder / "alk.safetensors", Q.Q4_K)
    checkpoint(folder / "raw.safetensors", variant=5, dtype=F8_E4M3)
    return folder


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few layers, one of more than one chunk, and a LoRA."""
    return small.family(tmp_path_factory.mktemp("small"))


def written(text: str, folder: Path) -> bytes:
    with job.open_merge(text) as plan:
        job.run_merge(plan, folder / "out.safetensors")
    return (folder / "out.safetensors").read_bytes()


def require_same(text: str, folder: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    whole, dice = written(text, scratch), random.Random(1)
    with opened(text) as model:
        assert isinstance(model.checkpoint, ComputedCheckpoint)
        file, _ = model.checkpoint.locate(next(iter(model.checkpoint.tensors)))
        assert file.size == len(whole)
        for _ in range(60):  # out of order, across tensors, at odd bytes
            start = dice.randrange(len(whole))
            size = dice.randrange(min(len(whole) - start, 300_000) + 1)
            assert file.read(start, size) == whole[start : start + size], (start, size)
        assert file.read(0, len(whole)) == whole
        with Checkpoint.open(scratch / "out.safetensors") as stored:
            assert model.checkpoint.fingerprint() == stored.fingerprint()


@pytest.mark.parametrize("text", Z_IMAGE)
def test_every_range_has_the_bytes_of_the_written_file(
    text: str, z_image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_same(text, z_image, tmp_path, monkeypatch)


@pytest.mark.parametrize("text", SMALL)
def test_so_has_what_loras_add(text: str, layers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_same(text, layers, tmp_path, monkeypatch)


def test_a_plan_with_any_rounding_is_read_as_it_is_written(
    layers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(layers)
    text = "'alk.safetensors' + 0.01*('a.safetensors' - 'b.safetensors')"
    for rounding, options in (("stochastic", {"seed": 7}), ("error-feedback", {})):
        asked = MergeOptions(rounding=rounding, multipliers={"layers.0": 0.5}, **options)  # type: ignore[arg-type]
        target = tmp_path / f"{rounding}.safetensors"
        with job.open_merge(text, asked) as plan:
            job.run_merge(plan, target)
            computed = ComputedCheckpoint(plan, "merge")
            raw = target.read_bytes()
            for name, info in computed.tensors.items():
                half = info.nbytes // 3 * 2
                begin = plan.header.data_start + info.begin
                assert computed.read(name, half) == raw[begin + half : begin + info.nbytes]
                assert computed.read(name, 0, half) == raw[begin : begin + half]
            computed.close()


def test_many_readers_get_the_same(layers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(layers)
    text = "ties('alk.safetensors', 'b.safetensors', base='a.safetensors')"
    whole = written(text, tmp_path)
    with opened(text) as model, ThreadPoolExecutor(8) as pool:
        file, _ = model.checkpoint.locate(small.LARGE)
        step = 70_001
        reads = [
            (start, pool.submit(file.read, start, min(step, len(whole) - start)))
            for start in range(0, len(whole), step)
        ]
        assert all(read.result() == whole[start : start + step] for start, read in reads)


def test_a_nested_expression_keeps_float32_where_a_model_is_rounded(
    layers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(layers)
    inner = "'alk.safetensors' + 0.3*('a.safetensors' - 'b.safetensors')"
    first = tmp_path / "first"
    first.mkdir()
    written(inner, first)
    outer = " + 0.3*('b.safetensors' - 'a.safetensors')"
    doubled = inner.replace("'", "''")
    by_file = load_file(_merged(f"'{first}/out.safetensors'{outer}", tmp_path / "file.safetensors"))
    in_quotes = load_file(_merged(f"'{doubled}'{outer}", tmp_path / "quotes.safetensors"))
    in_parentheses = load_file(_merged(f"({inner}){outer}", tmp_path / "parentheses.safetensors"))
    assert all(torch.equal(by_file[name], in_quotes[name]) for name in by_file)
    assert any(not torch.equal(by_file[name], in_parentheses[name]) for name in by_file)
    alk = load_file(layers / "alk.safetensors")
    assert all(torch.equal(alk[name], in_parentheses[name]) for name in alk)  # which cancels exactly


def _merged(text: str, target: Path) -> Path:
    with job.open_merge(text) as plan:
        job.run_merge(plan, target)
    return target


def test_nan_in_an_operand_is_refused_as_merging_refuses_it(layers: Path, tmp_path: Path) -> None:
    tensors = load_file(layers / "a.safetensors")
    tensors[small.LAYERS[1]][3, 5] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors")
    text = f"'{layers}/alk.safetensors' + 2*('{tmp_path}/nan.safetensors' - '{layers}/b.safetensors')"
    with opened(text) as model:
        assert model.checkpoint.read(small.LAYERS[0])
        with pytest.raises(NonFiniteError, match=r"nan.safetensors: tensor .* holds NaN") as found:
            model.checkpoint.read(small.LAYERS[1])
    assert "non_finite" not in str(found.value)  # which no reader has


def test_an_input_that_changes_is_noticed(layers: Path, tmp_path: Path) -> None:
    small.model(tmp_path / "x.safetensors", 3)
    with opened(f"'{layers}/alk.safetensors' + ('{tmp_path}/x.safetensors' - '{layers}/b.safetensors')") as model:
        model.checkpoint.check_unchanged()
        small.model(tmp_path / "x.safetensors", 4)
        with pytest.raises(DataError, match=r"x\.safetensors"):
            model.checkpoint.check_unchanged()


def test_values_beyond_fp8_are_named(z_image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(z_image)
    with opened("'raw.safetensors' + 1e6*('a.safetensors' - 'b.safetensors')") as model:
        assert isinstance(model.checkpoint, ComputedCheckpoint)
        name = "layers.0.attention.out.weight"
        assert not model.checkpoint.capped
        model.checkpoint.read(name)
        assert model.checkpoint.capped == (name,)


def test_memory_is_what_a_merge_takes_and_the_pieces_that_are_kept(
    layers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(layers)
    plain, method = (
        "'alk.safetensors' + ('a.safetensors' - 'b.safetensors')",
        "ties('alk.safetensors', 'b.safetensors', base='a.safetensors')",
    )
    with opened(plain) as model:
        assert model.plan is not None
        assert model.checkpoint.memory == memory_needed(model.plan)
    with opened(method) as model:
        assert model.plan is not None
        kept = model.checkpoint.memory - memory_needed(model.plan)
        assert kept >= 3 * model.checkpoint.tensors[small.LARGE].nbytes


def test_the_public_opener_takes_an_expression_and_closes_its_models(
    layers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(layers)
    with open_model("'alk.safetensors' + ('a.safetensors' - 'b.safetensors')") as model:
        assert small.LARGE in model.anatomy.parts
        assert len(model.checkpoint.files) == 3
        model.checkpoint.read(small.LAYERS[0])
    with pytest.raises(ValueError, match="was closed"):
        model.checkpoint.files[0].read(0, 8)
