"""Every spelling of a LoRA is read, and baked to the change that its own factors make in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file

from mergetool import models
from mergetool.adapters.lora_file import open_lora
from mergetool.adapters.values import dense_rows
from mergetool.arch import recognise
from mergetool.checkpoint.dtypes import F32
from mergetool.checkpoint.reader import Checkpoint
from mergetool.engine import job
from mergetool.options.merging import MergeOptions
from tests.adapters.spellings import SPELLINGS
from tests.families import checkpoint


@pytest.mark.parametrize("known", [True, False], ids=["with a model", "by names alone"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_rows_of_every_change_are_those_of_its_factors(tmp_path: Path, spelling: str, known: bool) -> None:
    written = SPELLINGS[spelling]()
    with (
        models.open_model(str(checkpoint(tmp_path / "base.safetensors"))) as base,
        open_lora(written.save(tmp_path), anatomy=base.anatomy if known else None) as lora,
    ):
        assert lora.unmatched == ()
        assert set(lora.changes) == set(written.changes)
        for part, expected in written.changes.items():
            (change,) = lora.changes[part]
            found = dense_rows(lora, change, 3, change.rows - 5)
            expected_rows = expected.reshape(len(expected), -1)[3:-2]
            np.testing.assert_allclose(found, expected_rows, rtol=2e-6, atol=1e-6, err_msg=part)


@pytest.mark.parametrize("layout", ["comfyui", "diffusers"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_what_is_baked_is_the_float64_sum_rounded_once(tmp_path: Path, spelling: str, layout: str) -> None:
    written = SPELLINGS[spelling]()
    base = checkpoint(tmp_path / "base.safetensors", layout=layout)
    lora = written.save(tmp_path)
    with job.open_merge(f"'{base}' - 3/4 * lora('{lora}')", MergeOptions(layout="diffusers")) as plan:
        job.run_merge(plan, tmp_path / "out.safetensors")
    with job.open_merge(f"'{base}'", MergeOptions(layout="diffusers", dtype=F32)) as plan:
        job.run_merge(plan, tmp_path / "before.safetensors")
    before, after = load_numpy(tmp_path / "before.safetensors"), load_file(tmp_path / "out.safetensors")
    for part, weight in before.items():
        exact = weight.astype(np.float64)
        if part in written.changes:
            exact = exact - 0.75 * written.changes[part].reshape(weight.shape)
        stored = after[part].double().numpy()
        ulp = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(stored), 1e-30))) - 7)
        # half a unit of bf16, and what float32 products of these factors are off by
        assert np.all(np.abs(stored - exact) <= ulp / 2 + 1e-6), part
    changed = [part for part in before if not np.array_equal(after[part].double().numpy(), before[part])]
    assert set(changed) == set(written.changes)


@pytest.mark.parametrize("key", ["diffusion_model.blocks.0.proj", "lora_unet_blocks_0_proj"])
def test_modules_of_a_whole_checkpoint_are_found_without_its_prefix(tmp_path: Path, key: str) -> None:
    """SDXL's files hold ``model.diffusion_model.``, which no LoRA for them repeats."""
    name = "model.diffusion_model.blocks.0.proj.weight"
    save_file({name: torch.zeros(6, 5)}, tmp_path / "base.safetensors")
    save_file(
        {f"{key}.lora_down.weight": torch.ones(2, 5), f"{key}.lora_up.weight": torch.ones(6, 2)},
        tmp_path / "l.safetensors",
    )
    with Checkpoint.open(tmp_path / "base.safetensors") as base:
        anatomy = recognise(base.tensors, source="base")
    with open_lora(tmp_path / "l.safetensors", anatomy=anatomy) as file:
        assert list(file.changes) == ["blocks.0.proj.weight"]
        assert file.unmatched == ()
