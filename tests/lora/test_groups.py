"""Gradients of ``--set`` over LoRAs: added to a model, added to each other, against float64 on the factors."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergetool.engine import job
from mergetool.lora.combine import combine
from mergetool.lora.gathering import gather, opened
from mergetool.lora.selection import Exact
from mergetool.options.merging import MergeOptions
from mergetool.options.multipliers import parse_setting
from tests.cli.run import mergetool
from tests.families import TINY, checkpoint

DIM, RANK, LAYERS = 64, 2, 5
SETTING = parse_setting("layers=linear(1,0)")


@pytest.fixture
def lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[int, torch.Tensor]:
    """``lora.safetensors`` changes to_q of blocks 1 to 3 of five; its change by block, float64."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for block in (1, 2, 3):
        for factor, shape in (("A", (RANK, DIM)), ("B", (DIM, RANK))):
            name = f"diffusion_model.layers.{block}.attention.to_q.lora_{factor}.weight"
            tensors[name] = torch.randn(shape, generator=generator)
    save_file(tensors, tmp_path / "lora.safetensors")
    checkpoint(tmp_path / "base.safetensors", variant=0, config=TINY | {"n_layers": LAYERS}, layout="diffusers")
    monkeypatch.chdir(tmp_path)
    return changes(Path("lora.safetensors"))


def changes(path: Path) -> dict[int, torch.Tensor]:
    found = load_file(path)
    stem = "diffusion_model.layers.{}.attention.to_q.lora_{}.weight"
    return {n: found[b].double() @ found[stem.format(n, "A")].double() for n in range(LAYERS)
            if (b := stem.format(n, "B")) in found}  # fmt: skip


def test_in_a_model_depth_counts_over_the_models_blocks(lora: dict[int, torch.Tensor], tmp_path: Path) -> None:
    options = MergeOptions(multipliers=(SETTING,))
    with job.open_merge("'base.safetensors' + lora('lora.safetensors')", options) as plan:
        job.run_merge(plan, tmp_path / "out.safetensors")
    before, after = load_file(tmp_path / "base.safetensors"), load_file(tmp_path / "out.safetensors")
    for block, change in lora.items():
        name = f"layers.{block}.attention.to_q.weight"
        wanted = before[name].double() + (1 - block / 4) * change
        # half a unit of bf16's 8 bits, and what float32 sums of two products are off by
        torch.testing.assert_close(after[name].double(), wanted, rtol=2**-8, atol=1e-6)
        assert not torch.equal(after[name], before[name])


def test_among_loras_depth_counts_over_the_blocks_they_change(lora: dict[int, torch.Tensor], tmp_path: Path) -> None:
    with opened([("lora.safetensors", Fraction(1))]) as terms:
        combine(gather(terms, multipliers=[SETTING]), tmp_path / "out.safetensors", Exact())
    found = changes(tmp_path / "out.safetensors")
    assert set(found) == {1, 2}
    assert torch.equal(found[1], lora[1])
    torch.testing.assert_close(found[2], lora[2] / 2, rtol=1e-6, atol=1e-6)


def test_bake_takes_a_gradient_on_the_command_line(lora: dict[int, torch.Tensor], tmp_path: Path) -> None:
    command = (
        "lora",
        "bake",
        "base.safetensors",
        "lora.safetensors",
        "--set",
        "layers=linear(1,0)",
        "--dry-run",
        "--json",
    )
    plan = mergetool(*command, cwd=tmp_path).json
    found = {step["part"]: step["multiplier"] for tensor in plan["tensors"] for step in tensor["steps"]}
    assert [found[f"layers.{n}.attention.to_q.weight"] for n in (1, 2, 3)] == [0.75, 0.5, 0.25]
