"""Mistakes that are made with the algebra of LoRAs, each by the name it is known under."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergetool.checkpoint import dtypes
from mergetool.engine import job
from mergetool.errors import DataError, NonFiniteError, UsageError
from mergetool.lora.gathering import gather, opened
from mergetool.lora.selection import ByRule, Exact, Fixed, Selection
from mergetool.lowrank.rules import Rule
from mergetool.options.merging import MergeOptions
from tests.adapters.spellings import SPELLINGS, f64, random
from tests.lora.test_combine import changes, close, run, saved

MODULE = "layers.1.attention.to_q"
PART = f"{MODULE}.weight"


def with_spectrum(values: np.ndarray, path: Path, *, width: int | None = None) -> Path:
    """A LoRA of one module [64, 64] whose singular values are exactly these, in float32."""
    rng = np.random.default_rng(7)
    left, right = (np.linalg.qr(rng.standard_normal((64, len(values))))[0] for _ in range(2))
    tensors = {
        f"diffusion_model.{MODULE}.lora_A.weight": torch.from_numpy(right.T.copy()).float(),
        f"diffusion_model.{MODULE}.lora_B.weight": torch.from_numpy(left * values).float(),
    }
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("selection", [Exact(), Fixed(8)])
def test_lora_factors_added_element_wise(selection: Selection, tmp_path: Path) -> None:
    """(B1 + B2) @ (A1 + A2) has the cross terms B1 A2 and B2 A1, and a strength in both factors counts squared."""
    loras = []
    for seed in (0, 10):
        down, up = random(4, 64, seed=seed), random(64, 4, seed=seed + 1)
        path = tmp_path / f"{seed}.safetensors"
        save_file({f"{MODULE}.lora_A.weight": down, f"{MODULE}.lora_B.weight": up}, path)
        loras.append((path, f64(up) @ f64(down)))
    (one, first), (other, second) = loras
    run({one: 0.5, other: 0.25}, tmp_path / "out.safetensors", selection, dtype=dtypes.F32)
    close(changes(tmp_path / "out.safetensors")[PART], 0.5 * first + 0.25 * second, 1e-6)


@pytest.mark.parametrize("rank", [1, 2, 7])
def test_off_by_one_rank(rank: int, tmp_path: Path) -> None:
    """A rank of r keeps r directions, not r - 1 and not r + 1, and a threshold that r directions reach keeps r."""
    values = np.array([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    path = with_spectrum(values, tmp_path / "lora.safetensors")
    shares = np.cumsum(values**2) / (values**2).sum()
    for selection in (Fixed(rank), ByRule(Rule("energy", float(shares[rank - 1]) - 1e-5))):
        run({path: 1}, tmp_path / "out.safetensors", selection, overwrite=True)
        down = load_file(tmp_path / "out.safetensors")[f"diffusion_model.{MODULE}.lora_A.weight"]
        assert len(down) == rank
        found = np.linalg.svd(changes(tmp_path / "out.safetensors")[PART], compute_uv=False)
        np.testing.assert_allclose(found[:rank], values[:rank], rtol=1e-5)
        assert found[rank] < 1e-5


def test_energy_relative_to_cap(tmp_path: Path) -> None:
    """A share is one of the whole spectrum. Of the first four of 32 equal values, 90 % are four; of all, 29."""
    path = with_spectrum(np.ones(32) + np.arange(32)[::-1] * 1e-6, tmp_path / "lora.safetensors")
    done = run({path: 1}, tmp_path / "out.safetensors", ByRule(Rule("energy", 0.9)))
    assert [one.rank for one in done.modules] == [29]
    done = run({path: 1}, tmp_path / "four.safetensors", Fixed(4))
    assert done.modules[0].energy == pytest.approx(4 / 32, rel=1e-3)


def test_one_rank_assumed_for_all_alphas(tmp_path: Path) -> None:
    """Each alpha is divided by the rank of its own module, before a merge and after a resize to another rank."""
    path, written = saved("musubi", tmp_path)  # alpha 8 at ranks 4, 2 and 3
    for selection in (Exact(), Fixed(64)):
        run({path: 1}, tmp_path / "out.safetensors", selection, overwrite=True)
        found = changes(tmp_path / "out.safetensors")
        for part, exact in written.changes.items():
            close(found[part], exact, 1e-6)


@pytest.mark.parametrize("selection", [Exact(), Fixed(2)])
def test_missing_alpha_taken_as_1(selection: Selection, tmp_path: Path) -> None:
    """No alpha is a scale of 1, not an alpha of 1, which would be a scale of 1 / rank."""
    tensors = {f"{MODULE}.lora_A.weight": random(2, 64, seed=1), f"{MODULE}.lora_B.weight": random(64, 2, seed=2)}
    save_file(tensors, tmp_path / "lora.safetensors")
    run({tmp_path / "lora.safetensors": 1}, tmp_path / "out.safetensors", selection)
    exact = f64(tensors[f"{MODULE}.lora_B.weight"]) @ f64(tensors[f"{MODULE}.lora_A.weight"])
    close(changes(tmp_path / "out.safetensors")[PART], exact, 1e-6)


@pytest.mark.parametrize("selection", [Exact(), Fixed(2)])
def test_alpha_times_3_of_fused(selection: Selection, tmp_path: Path) -> None:
    """A fused block-diagonal qkv has three times the rank and the alpha; split again, q has a third of both."""
    path, written = saved("musubi converted for ComfyUI", tmp_path)
    run({path: 1}, tmp_path / "out.safetensors", selection, dtype=dtypes.F32)
    found = changes(tmp_path / "out.safetensors")
    assert len(load_file(tmp_path / "out.safetensors")[f"diffusion_model.{MODULE}.lora_A.weight"]) == 2
    for part, exact in written.changes.items():
        close(found[part], exact, 1e-6)


@pytest.mark.parametrize("selection", [Exact(), Fixed(3)])
def test_quantile_clamp(selection: Selection, tmp_path: Path) -> None:
    """No value is clamped to a quantile of the others: a spike a thousand times larger than all else comes through."""
    values = np.array([1000.0, 1.0, 0.5])
    path = with_spectrum(values, tmp_path / "lora.safetensors")
    tensors = load_file(path)
    tensors[f"diffusion_model.{MODULE}.lora_B.weight"][3, 0] = 5000.0
    save_file(tensors, path)
    exact = f64(tensors[f"diffusion_model.{MODULE}.lora_B.weight"]) @ f64(
        tensors[f"diffusion_model.{MODULE}.lora_A.weight"]
    )
    run({path: 1}, tmp_path / "out.safetensors", selection)
    found = changes(tmp_path / "out.safetensors")[PART]
    close(found, exact, 1e-6)
    assert np.abs(found).max() == pytest.approx(np.abs(exact).max(), rel=1e-6)


def test_falsy_0_treated_as_unset(tmp_path: Path) -> None:
    """Strength 0 adds nothing, a multiplier of 0 leaves a group out, and neither rank 0 nor threshold 0 means the default."""
    (one, first), (other, _) = saved("bare", tmp_path), saved("embedders", tmp_path)
    run({one: 1, other: 0}, tmp_path / "out.safetensors")
    assert changes(tmp_path / "out.safetensors").keys() == first.changes.keys()
    run({one: 1}, tmp_path / "set.safetensors", set=[("attention", 0)])
    assert all("feed_forward" in part for part in changes(tmp_path / "set.safetensors"))
    with pytest.raises(DataError, match="nothing to write"):
        run({one: Fraction(0)}, tmp_path / "none.safetensors")
    with pytest.raises(UsageError, match="`rank` is 0"):
        Fixed(0)
    with pytest.raises(UsageError, match="above 0"):
        Rule("energy", 0.0)


def test_alpha_0_treated_as_unset(tmp_path: Path) -> None:
    """A stored alpha of 0 is a scale of 0: such a module changes nothing."""
    path, _ = saved("musubi", tmp_path)
    tensors = load_file(path)
    tensors["lora_unet_layers_1_attention_to_q.alpha"] = torch.tensor(0.0)
    save_file(tensors, path)
    for selection in (Exact(), Fixed(2)):
        done = run({path: 1}, tmp_path / "out.safetensors", selection, overwrite=True)
        assert done.empty == [PART]
        assert PART not in changes(tmp_path / "out.safetensors")


def test_a_scale_of_0_beside_another_lora_leaves_the_other_as_it_is(tmp_path: Path) -> None:
    """Nothing is divided by it when the strengths are shared out between factors and alpha."""
    (one, _), (other, written) = saved("musubi", tmp_path), saved("bare", tmp_path)
    tensors = load_file(one)
    tensors["lora_unet_layers_1_attention_to_q.alpha"] = torch.tensor(0.0)
    save_file(tensors, one)
    done = run({one: 0.7, other: 0.7}, tmp_path / "out.safetensors")
    close(changes(tmp_path / "out.safetensors")[PART], 0.7 * written.changes[PART], 1e-6)
    assert [module.rank for module in done.modules if module.name == PART] == [4]


def test_a_strength_of_0_is_named_and_its_modules_are_not_read(tmp_path: Path) -> None:
    """A LoRA at 0 may even hold NaN: nothing of it is looked at."""
    (one, first), (other, second) = saved("bare", tmp_path), saved("embedders", tmp_path)
    save_file({key: value * float("nan") for key, value in load_file(other).items()}, other)
    with opened([(str(one), Fraction(1)), (str(other), Fraction(0))]) as terms:
        left_out = gather(terms).left_out
    assert {(name, reason) for name, reason, _ in left_out} == {
        (part, f"strength 0 in {other}") for part in second.changes
    }
    run({one: 1, other: 0}, tmp_path / "out.safetensors", Fixed(2))
    assert changes(tmp_path / "out.safetensors").keys() == first.changes.keys()


@pytest.mark.parametrize("selection", [Exact(), Fixed(2)])
def test_failed_layers_skipped_while_the_run_reports_success(selection: Selection, tmp_path: Path) -> None:
    """One module with NaN, or one that cannot be added, ends the run by name, and no file appears."""
    path, _ = saved("bare", tmp_path)
    tensors = load_file(path)
    tensors[f"{MODULE}.lora_B.weight"][0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(NonFiniteError, match="to_q"):
        run({path: 1}, tmp_path / "out.safetensors", selection)
    tensors = SPELLINGS["bare"]().tensors | {f"{MODULE}.dora_scale": torch.ones(64, 1)}
    save_file(tensors, path)
    with pytest.raises(DataError, match="DoRA"):
        run({path: 1}, tmp_path / "out.safetensors", selection)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_value_that_does_not_fit_the_dtype_ends_the_run(tmp_path: Path) -> None:
    """FP16 ends at 65504: neither infinity nor a clamped value is written."""
    path = with_spectrum(np.array([1e12, 1.0]), tmp_path / "lora.safetensors")
    for selection in (Exact(), Fixed(1)):
        with pytest.raises(NonFiniteError, match="too large for float16"):
            run({path: 1}, tmp_path / "out.safetensors", selection, dtype=dtypes.F16)
    assert not (tmp_path / "out.safetensors").exists()


def test_same_random_mask_for_same_shape_layers(tmp_path: Path) -> None:
    """Two equal weights with equal changes, rounded stochastically: each tensor draws by itself, from the same seed and position."""
    weight = random(64, 64, seed=1)
    save_file({f"blocks.{i}.proj.weight": weight.clone() for i in range(2)}, tmp_path / "base.safetensors")
    factors = {"lora_A": random(4, 64, seed=2) / 64, "lora_B": random(64, 4, seed=3)}
    save_file(
        {f"blocks.{i}.proj.{end}.weight": factors[end].clone() for i in range(2) for end in factors},
        tmp_path / "l.safetensors",
    )
    expression = f"'{tmp_path / 'base.safetensors'}' + 1 * lora('{tmp_path / 'l.safetensors'}')"
    differing = {}
    for rounding in ("nearest", "stochastic"):
        with job.open_merge(expression, MergeOptions(rounding=rounding)) as plan:
            job.run_merge(plan, tmp_path / "out.safetensors", overwrite=True)
        one, two = (load_file(tmp_path / "out.safetensors")[f"blocks.{i}.proj.weight"] for i in range(2))
        differing[rounding] = float((one != two).float().mean())
    assert differing["nearest"] == 0
    assert differing["stochastic"] > 0.1


@pytest.mark.parametrize("skip", [False, True])
def test_reversed_flag(skip: bool, tmp_path: Path) -> None:
    """``skip_unmatched`` leaves out what fits nothing when it is given, and refuses it when it is not."""
    tensors = {f"{MODULE}.lora_A.weight": random(4, 64, seed=1), f"{MODULE}.lora_B.weight": random(64, 4, seed=2)}
    save_file(tensors | {f"{MODULE}.oft_blocks": random(2, 2, seed=3)}, tmp_path / "l.safetensors")
    with opened([(str(tmp_path / "l.safetensors"), Fraction(1))]) as terms:
        if not skip:
            with pytest.raises(DataError, match="`skip_unmatched`"):
                gather(terms, skip_unmatched=skip)
            return
        found = gather(terms, skip_unmatched=skip)
    assert [module.part for module in found.modules] == [PART]
    assert [name for name, _, _ in found.left_out] == [f"{MODULE}.oft_blocks"]


def test_wrong_dare_rescale(tmp_path: Path) -> None:
    """What survives at random has to survive in the mean: a change far below half a unit, baked with many seeds, comes to itself."""
    weight = random(64, 64, seed=1)
    save_file({"blocks.0.proj.weight": weight}, tmp_path / "base.safetensors")
    factors = {"lora_A": random(4, 64, seed=2) / 512, "lora_B": random(64, 4, seed=3)}
    save_file({f"blocks.0.proj.{end}.weight": factors[end] for end in factors}, tmp_path / "l.safetensors")
    change = f64(factors["lora_B"]) @ f64(factors["lora_A"])
    expression = f"'{tmp_path / 'base.safetensors'}' + 1 * lora('{tmp_path / 'l.safetensors'}')"
    shares = []
    for seed in range(1, 41):
        with job.open_merge(expression, MergeOptions(rounding="stochastic", seed=seed)) as plan:
            job.run_merge(plan, tmp_path / "out.safetensors", overwrite=True)
        stored = load_file(tmp_path / "out.safetensors")["blocks.0.proj.weight"]
        shares.append(float((change * (f64(stored) - f64(weight))).sum() / (change**2).sum()))
    error = float(np.std(shares, ddof=1)) / len(shares) ** 0.5
    assert error < 0.05
    assert abs(np.mean(shares) - 1) < 4 * error
