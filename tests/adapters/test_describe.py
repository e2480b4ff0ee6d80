"""What is said of a LoRA's contents, against its own factors in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mergetool.adapters.describe import Contents, block_of, by_block, describe, total
from mergetool.adapters.lora_file import open_lora
from mergetool.errors import OutputError, UsageError
from mergetool.lora import plots
from tests.adapters.spellings import BLOCK, DIM, SPELLINGS, random, split


def described(path: Path) -> Contents:
    with open_lora(path) as file:
        return describe(file)


@pytest.mark.parametrize("spelling", list(SPELLINGS))
def test_norms_are_those_of_the_changes(tmp_path: Path, spelling: str) -> None:
    written = SPELLINGS[spelling]()
    found = {target.part: target for target in described(written.save(tmp_path)).targets}
    assert set(found) == set(written.changes)
    for part, change in written.changes.items():
        assert found[part].norm == pytest.approx(np.linalg.norm(change), rel=1e-6), part


def test_ranks_alphas_and_dtypes_are_counted(tmp_path: Path) -> None:
    written = split("diffusion_model.", ".lora_A.weight", ".lora_B.weight", alpha=8, ranks=(4, 2, 3))
    del written.tensors[f"diffusion_model.{BLOCK}.attention.to_q.alpha"]
    key = f"diffusion_model.{BLOCK}.attention.to_k.lora_A.weight"
    written.tensors[key] = written.tensors[key].float()
    found = described(written.save(tmp_path))
    assert found.ranks == [2, 2, 3, 3, 4, 4, 4]
    assert found.alphas == {8.0: 6, None: 1}
    assert found.dtypes == {"bf16": 13, "fp32": 1}


def test_targets_come_as_a_forward_pass_reads_them_and_by_block(tmp_path: Path) -> None:
    found = described(split("diffusion_model.", ".lora_A.weight", ".lora_B.weight").save(tmp_path)).targets
    assert found[0].part.startswith("noise_refiner.0.")
    blocks = {block: len(held) for block, held in by_block(found)}
    assert blocks == {"noise_refiner.0": 1, "layers.1": 6}
    assert total(found) == pytest.approx(sum(target.norm**2 for target in found) ** 0.5)


@pytest.mark.parametrize(
    ("part", "block"),
    [
        ("layers.12.attention.to_q.weight", "layers.12"),
        ("cap_embedder.1.weight", "cap_embedder.1"),
        ("x_pad_token", "x_pad_token"),
        ("down_blocks.0.resnets.1.conv.weight", "down_blocks.0"),
        ("3.weight", "3"),
    ],
)
def test_the_block_of_a_part(part: str, block: str) -> None:
    assert block_of(part) == block


def test_a_dora_is_called_one(tmp_path: Path) -> None:
    name = f"diffusion_model.{BLOCK}.attention.to_q"
    save_file(
        {
            f"{name}.lora_A.weight": random(2, DIM, seed=1),
            f"{name}.lora_B.weight": random(DIM, 2, seed=2),
            f"{name}.dora_scale": torch.ones(DIM, 1),
        },
        tmp_path / "lora.safetensors",
    )
    (target,) = described(tmp_path / "lora.safetensors").targets
    assert target.kind == "dora"


def test_the_plot_has_a_cell_for_every_block_and_kind(tmp_path: Path) -> None:
    found = described(split("diffusion_model.", ".lora_A.weight", ".lora_B.weight").save(tmp_path)).targets
    heat = plots.cells(found)
    blocks, kinds, values = list(heat.blocks), list(heat.kinds), heat.values
    assert blocks == ["noise_refiner.0", "layers.1"]
    assert kinds == ["q", "k", "v", "out", "ffn"]
    ffn = [target.norm for target in found if "feed_forward" in target.part]
    assert values[1, 4] == pytest.approx(np.linalg.norm(ffn))
    assert np.isnan(values[0, 1:]).all()


def test_the_plot_is_a_picture_of_the_same_bytes_every_time(tmp_path: Path) -> None:
    found = described(split("diffusion_model.", ".lora_A.weight", ".lora_B.weight").save(tmp_path)).targets
    for name in ("one.png", "two.png"):
        plots.write(tmp_path / name, found, title="a $title_ with \x1b[2J")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    with Image.open(tmp_path / "one.png") as picture:
        colours = picture.convert("RGB").getcolors(maxcolors=1 << 20)
    assert picture.width > 300
    assert colours is not None
    assert len(colours) > 20  # not a blank page


def test_changes_of_zero_are_drawn(tmp_path: Path) -> None:
    written = split("diffusion_model.", ".lora_A.weight", ".lora_B.weight")
    zeros = {key: torch.zeros_like(tensor) for key, tensor in written.tensors.items()}
    save_file(zeros, tmp_path / "lora.safetensors")
    plots.write(tmp_path / "zero.png", described(tmp_path / "lora.safetensors").targets, title="zero")
    assert (tmp_path / "zero.png").stat().st_size > 1000


def test_a_place_for_the_plot_is_asked_for_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "there.png").write_text("mine")
    with pytest.raises(OutputError, match="use `overwrite`"):
        plots.require_target(tmp_path / "there.png", overwrite=False)
    with pytest.raises(UsageError, match="PNG"):
        plots.require_target(tmp_path / "x.jpg", overwrite=False)
    with pytest.raises(OutputError, match="does not exist"):
        plots.require_target(tmp_path / "no" / "x.png", overwrite=False)
