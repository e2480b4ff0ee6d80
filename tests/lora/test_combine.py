"""LoRAs added, cut and written, against float64 sums of what the files were written from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergetool.adapters.lora_file import open_lora
from mergetool.adapters.values import dense_rows
from mergetool.checkpoint import dtypes
from mergetool.errors import DataError, FamilyError, OutputError, PatternError, UsageError
from mergetool.lora.combine import Combined, combine
from mergetool.lora.gathering import gather, holding, opened
from mergetool.lora.selection import Budget, ByRule, Exact, Fixed, Selection
from mergetool.lowrank.rules import Rule
from mergetool.lowrank.thresholds import RULES
from tests.adapters.spellings import SPELLINGS, Written, f64, random

Q = "layers.1.attention.to_q"


def saved(name: str, folder: Path) -> tuple[Path, Written]:
    place = folder / name.replace(" ", "-").replace(",", "")
    place.mkdir(exist_ok=True)
    written = SPELLINGS[name]()
    return written.save(place), written


def run(
    loras: Mapping[Path, float | Fraction], output: Path, selection: Selection | None = None, **options: object
) -> Combined:
    multipliers = tuple((pattern, Fraction(value)) for pattern, value in options.pop("set", ()))  # type: ignore[attr-defined]
    with opened([(str(path), Fraction(strength)) for path, strength in loras.items()]) as terms:
        return combine(gather(terms, multipliers=multipliers), output, selection or Exact(), **options)  # type: ignore[arg-type]


def changes(path: Path) -> dict[str, np.ndarray]:
    """Read by the letter of the default spelling, whose words depend on whether there are alphas: up @ down * alpha / rank."""
    tensors = load_file(path)
    found = {}
    has_alphas = any(key.endswith(".alpha") for key in tensors)
    ends = (".lora_down.weight", ".lora_up.weight") if has_alphas else (".lora_A.weight", ".lora_B.weight")
    for key in tensors:
        if key.endswith(ends[0]):
            name = key.removesuffix(ends[0])
            down, up = tensors[key], tensors[name + ends[1]]
            scale = float(tensors[f"{name}.alpha"]) / len(down) if f"{name}.alpha" in tensors else 1.0
            found[name.removeprefix("diffusion_model.") + ".weight"] = f64(up) @ f64(down) * scale
    return found


def close(found: np.ndarray, exact: np.ndarray, relative: float) -> None:
    assert np.linalg.norm(found - exact) <= relative * np.linalg.norm(exact)


@pytest.mark.parametrize("name", [name for name in SPELLINGS if "LoKr" not in name and "differences" not in name])
def test_one_lora_of_every_spelling_comes_out_as_it_was(name: str, tmp_path: Path) -> None:
    path, written = saved(name, tmp_path)
    run({path: 1}, tmp_path / "out.safetensors")
    found = changes(tmp_path / "out.safetensors")
    assert found.keys() == written.changes.keys()
    for part, exact in written.changes.items():
        close(found[part], exact, 3e-3 if name in ("LoHa", "SimpleTuner LyCORIS") else 1e-7)


def test_a_merge_without_a_rank_keeps_the_bits_of_every_down_and_of_ups_at_strengths_of_powers_of_two(
    tmp_path: Path,
) -> None:
    (one, _), (other, _) = saved("bare", tmp_path), saved("PEFT folder", tmp_path)
    file = other / "adapter_model.safetensors"
    run({one: 1, other: -0.5}, tmp_path / "out.safetensors")
    found, first, second = load_file(tmp_path / "out.safetensors"), load_file(one), load_file(file)
    module = "layers.1.attention.to_k"  # rank 2 in both, alpha 8 in the second: times -0.5 * 8 / 2
    key = f"diffusion_model.{module}"
    down = torch.cat([first[f"{module}.lora_A.weight"], second[f"base_model.model.{module}.lora_A.weight"]])
    up = torch.cat([first[f"{module}.lora_B.weight"], second[f"base_model.model.{module}.lora_B.weight"] * -2], 1)
    scale = float(found[f"{key}.alpha"]) / len(down)  # of other modules: where one needs an alpha, all have one
    assert scale == 1
    assert torch.equal(found[f"{key}.lora_down.weight"], down)
    assert torch.equal(found[f"{key}.lora_up.weight"], up)


def test_a_strength_that_all_columns_share_becomes_the_alpha_and_no_bit_changes(tmp_path: Path) -> None:
    path, written = saved("bare", tmp_path)
    done = run({path: Fraction(7, 10)}, tmp_path / "out.safetensors")
    found, first = load_file(tmp_path / "out.safetensors"), load_file(path)
    assert torch.equal(found[f"diffusion_model.{Q}.lora_up.weight"], first[f"{Q}.lora_B.weight"])
    assert float(found[f"diffusion_model.{Q}.alpha"]) == pytest.approx(0.7 * 4)
    assert done.residual == 0
    close(changes(tmp_path / "out.safetensors")[f"{Q}.weight"], 0.7 * written.changes[f"{Q}.weight"], 1e-7)


def test_a_negative_strength_goes_into_the_factor_since_loaders_take_roots_of_alphas(tmp_path: Path) -> None:
    path, written = saved("bare", tmp_path)
    run({path: Fraction(-7, 10)}, tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert all(float(value) > 0 for key, value in found.items() if key.endswith(".alpha"))
    close(changes(tmp_path / "out.safetensors")[f"{Q}.weight"], -0.7 * written.changes[f"{Q}.weight"], 1e-7)


def test_a_merge_of_mixed_ranks_alphas_dialects_and_modules_is_the_float64_sum_and_says_what_it_rounded(
    tmp_path: Path,
) -> None:
    files = [saved(name, tmp_path) for name in ("bare", "kohya fused", "PEFT folder", "embedders")]
    strengths = (0.8, -0.3, 1.7, 2.0)
    loras = {path: strength for (path, _), strength in zip(files, strengths, strict=True)}
    done = run(loras, tmp_path / "out.safetensors")
    exact: dict[str, np.ndarray] = {}
    for (_, written), strength in zip(files, strengths, strict=True):
        for part, change in written.changes.items():
            exact[part] = exact.get(part, 0) + strength * change
    found = changes(tmp_path / "out.safetensors")
    assert found.keys() == exact.keys()
    for one in done.modules:
        error = np.linalg.norm(found[one.name] - exact[one.name]) / np.linalg.norm(exact[one.name])
        assert error == pytest.approx(one.residual, rel=0.02, abs=1e-7)
        assert error < 2.0**-8


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_recompressed_merge_is_the_svd_of_the_dense_sum(rank: int, tmp_path: Path) -> None:
    (one, first), (other, second) = saved("bare", tmp_path), saved("kohya fused", tmp_path)
    run({one: 0.8, other: -0.3}, tmp_path / "out.safetensors", Fixed(rank), dtype=dtypes.F32)
    found = changes(tmp_path / "out.safetensors")
    for part in first.changes:
        left, values, right = np.linalg.svd(0.8 * first.changes[part] - 0.3 * second.changes.get(part, np.zeros(1)))
        close(found[part], (left[:, :rank] * values[:rank]) @ right[:rank], 1e-5)
        count = min(rank, int((values > 1e-9 * values[0]).sum()))
        np.testing.assert_allclose(np.linalg.svd(found[part])[1][:count], values[:count], rtol=1e-5)


def test_lokr_and_whole_differences_merge_with_loras_at_a_rank(tmp_path: Path) -> None:
    (one, first), (other, second) = saved("bare", tmp_path), saved("LoKr", tmp_path)
    part = "layers.1.feed_forward.w1.weight"
    run({one: 1, other: 0.5}, tmp_path / "out.safetensors", Fixed(6), dtype=dtypes.F32)
    left, values, right = np.linalg.svd(first.changes[part] + 0.5 * second.changes[part], full_matrices=False)
    close(changes(tmp_path / "out.safetensors")[part], (left[:, :6] * values[:6]) @ right[:6], 1e-4)


def test_an_exact_sum_refuses_factors_larger_than_the_matrix(tmp_path: Path) -> None:
    path, _ = saved("LoKr", tmp_path)
    with pytest.raises(UsageError, match=r"more than rank 46.*`rank`"):
        run({path: 1}, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_rank_above_what_there_is_keeps_the_factors_bit_for_bit(tmp_path: Path) -> None:
    path, _ = saved("diffusion_model, no alpha", tmp_path)
    done = run({path: 1}, tmp_path / "out.safetensors", Fixed(100))
    before, after = load_file(path), load_file(tmp_path / "out.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert done.residual == 0


@pytest.mark.parametrize("rule", RULES)
def test_ranks_by_rule_are_those_of_the_dense_spectrum(rule: str, tmp_path: Path) -> None:
    path, written = saved("bare", tmp_path)
    chosen = Rule(rule, {"ratio": 0.7, "abs": 3.0}.get(rule, 0.8))  # type: ignore[arg-type]
    done = run({path: 1}, tmp_path / "out.safetensors", ByRule(chosen))
    for one in done.modules:
        values = np.linalg.svd(written.changes[one.name], compute_uv=False)
        assert one.rank == chosen.rank(values[values > 1e-9 * values[0]] ** 2)


def test_a_budget_is_kept_and_beats_every_fixed_rank_of_its_size(tmp_path: Path) -> None:
    (one, _), (other, _) = saved("bare", tmp_path), saved("PEFT folder", tmp_path)
    loras = {one: 1, other: 0.1}
    for rank in (1, 2, 3):
        fixed = run(loras, tmp_path / f"{rank}.safetensors", Fixed(rank))
        # ranks that differ are named in the header, twice for each of seven modules, which matters in a file of this size
        size = (tmp_path / f"{rank}.safetensors").stat().st_size + 700
        done = run(loras, tmp_path / "out.safetensors", Budget(size), overwrite=True)
        assert (tmp_path / "out.safetensors").stat().st_size <= size
        error, fixed_error = (
            sum(module.residual**2 * module.total for module in found.modules)
            + sum(np.square(missing).sum() for missing in lost)
            for found, lost in ((done, _lost(loras, done)), (fixed, []))
        )
        assert error < fixed_error


def _lost(loras: Mapping[Path, float], done: Combined) -> list[np.ndarray]:
    """The whole change of modules that a budget left out."""
    written = {one.name for one in done.modules}
    exact: dict[str, np.ndarray] = {}
    for path, strength in loras.items():
        with open_lora(path) as file:
            for part, (change,) in file.changes.items():
                exact[part] = exact.get(part, 0) + strength * dense_rows(file, change, 0, change.rows)
    return [change for part, change in exact.items() if part not in written]


def test_a_budget_for_nothing_is_refused(tmp_path: Path) -> None:
    path, _ = saved("bare", tmp_path)
    with pytest.raises(UsageError, match="`budget` is 500 bytes"):
        run({path: 1}, tmp_path / "out.safetensors", Budget(500))


def test_groups_have_strengths_of_their_own_and_the_last_counts(tmp_path: Path) -> None:
    path, written = saved("bare", tmp_path)
    run({path: 1}, tmp_path / "out.safetensors", set=[("attention", 0.5), ("q", 2), ("refiner", 0)])
    found = changes(tmp_path / "out.safetensors")
    scales = {Q: 2, "layers.1.attention.to_k": 0.5, "layers.1.feed_forward.w1": 1}
    for module, scale in scales.items():
        close(found[f"{module}.weight"], scale * written.changes[f"{module}.weight"], 1e-7)
    assert not any(part.startswith("noise_refiner") for part in found)


def test_a_group_that_nothing_is_in_is_an_error(tmp_path: Path) -> None:
    path, _ = saved("LoHa", tmp_path)
    with pytest.raises(PatternError, match="ffn"):
        run({path: 1}, tmp_path / "out.safetensors", set=[("ffn", 0)])


def test_a_convolution_keeps_its_kernel_and_a_generic_model_its_spelling(tmp_path: Path) -> None:
    down, up = random(4, 6, 3, 3, seed=1), random(8, 4, 1, 1, seed=2)
    name = "lora_unet_stem_blocks_0_resnets_1_conv1"
    save_file(
        {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)},
        tmp_path / "conv.safetensors",
    )
    exact = f64(up).reshape(8, 4) @ f64(down).reshape(4, -1) / 2
    for selection in (Exact(), Fixed(3), Budget(1200)):
        run({tmp_path / "conv.safetensors": 1}, tmp_path / "out.safetensors", selection, overwrite=True)
        found = load_file(tmp_path / "out.safetensors")
        assert found.keys() == {f"{name}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")}
        one, other = found[f"{name}.lora_down.weight"], found[f"{name}.lora_up.weight"]
        rank = len(one)
        assert (one.shape, other.shape) == ((rank, 6, 3, 3), (8, rank, 1, 1))
        left, values, right = np.linalg.svd(exact, full_matrices=False)
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        scale = float(found[f"{name}.alpha"]) / rank
        close(f64(other).reshape(8, rank) @ f64(one).reshape(rank, -1) * scale, best, 5e-3)
        assert not isinstance(selection, Budget) or (tmp_path / "out.safetensors").stat().st_size <= 1200


def test_generic_loras_of_different_spellings_are_not_added_blindly(tmp_path: Path) -> None:
    for name in ("lora_unet_block_proj", "transformer.block.proj"):
        tensors = {f"{name}.lora_A.weight": random(2, 8, seed=1), f"{name}.lora_B.weight": random(8, 2, seed=2)}
        save_file(tensors, tmp_path / f"{name[:5]}.safetensors")
    with pytest.raises(FamilyError, match="one spelling"):
        run({tmp_path / "lora_.safetensors": 1, tmp_path / "trans.safetensors": 1}, tmp_path / "out.safetensors")


def test_loras_of_different_shapes_are_refused_with_both_names(tmp_path: Path) -> None:
    one, _ = saved("bare", tmp_path)
    save_file(
        {f"{Q}.lora_A.weight": random(2, 32, seed=1), f"{Q}.lora_B.weight": random(64, 2, seed=2)},
        tmp_path / "other.safetensors",
    )
    with pytest.raises(FamilyError, match=r"\[64, 64\].*\[64, 32\]"):
        run({one: 1, tmp_path / "other.safetensors": 1}, tmp_path / "out.safetensors")


def test_a_part_that_is_changed_twice_is_refused(tmp_path: Path) -> None:
    path, _ = saved("bare", tmp_path)
    tensors = load_file(path)
    for end in ("A", "B"):
        tensors[f"diffusion_model.{Q}.lora_{end}.weight"] = tensors[f"{Q}.lora_{end}.weight"].clone()
    save_file(tensors, path)
    with pytest.raises(DataError, match=r"changes .*to_q.* 2 times"):
        run({path: 1}, tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        ([dtypes.BF16, dtypes.BF16], dtypes.BF16),
        ([dtypes.F16], dtypes.F16),
        ([dtypes.F16, dtypes.BF16], dtypes.F32),
        ([dtypes.BF16, dtypes.F32], dtypes.F32),
        ([dtypes.F8_E4M3], dtypes.BF16),
        ([dtypes.F64], dtypes.F32),
    ],
)
def test_the_output_has_the_dtype_that_holds_every_factor(stored: list[dtypes.DType], wanted: dtypes.DType) -> None:
    assert holding(stored) is wanted


def test_the_bytes_do_not_depend_on_threads(tmp_path: Path) -> None:
    (one, _), (other, _) = saved("bare", tmp_path), saved("kohya fused", tmp_path)
    for selection in (Exact(), Fixed(3), Budget(5000)):
        for threads in (1, 3):
            target = tmp_path / f"{threads}.safetensors"
            run({one: 0.8, other: -0.3}, target, selection, threads=threads, overwrite=True)
        assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "3.safetensors").read_bytes()


def test_the_metadata_tells_what_was_added_and_no_path(tmp_path: Path) -> None:
    path, _ = saved("bare", tmp_path)
    run({path: Fraction(4, 5)}, tmp_path / "out.safetensors", Fixed(2), command="merge", set=[("ffn", 2)])
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        metadata = file.metadata()
    recipe = json.loads(metadata["mergetool.lora"])
    assert recipe == {
        "command": "merge",
        "loras": [{"name": "lora", "strength": "0.8"}],
        "rank": 2,
        "set": ["ffn=2"],
    }
    assert json.loads(metadata["mergetool.inputs"])[0]["fingerprint"].startswith("sample-sha256:")
    assert str(tmp_path) not in json.dumps(metadata)


def test_an_existing_output_is_refused_before_the_work_and_kept(tmp_path: Path) -> None:
    path, _ = saved("bare", tmp_path)
    (tmp_path / "out.safetensors").write_bytes(b"mine")
    with pytest.raises(OutputError, match="already exists"):
        run({path: 1}, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == b"mine"
    with pytest.raises(OutputError):
        run({path: 1}, path, overwrite=True)


def test_one_dimensional_differences_are_named_with_their_energy(tmp_path: Path) -> None:
    path, written = saved("ComfyUI differences", tmp_path)
    with opened([(str(path), Fraction(2))]) as terms:
        gathering = gather(terms)
    for name, reason, energy in gathering.left_out:
        assert reason == "one-dimensional"
        assert energy == pytest.approx(4 * (written.changes[name] ** 2).sum(), rel=1e-6)
    assert len(gathering.left_out) == 2


def test_keys_that_mean_nothing_are_an_error_unless_they_may_be_skipped(tmp_path: Path) -> None:
    path, _ = saved("bare", tmp_path)
    save_file(load_file(path) | {"layers.1.attention.to_q.oft_blocks": torch.ones(2)}, path)
    with opened([(str(path), Fraction(1))]) as terms:
        with pytest.raises(DataError, match=r"oft_blocks.*`skip_unmatched`"):
            gather(terms)
        assert [name for name, _, _ in gather(terms, skip_unmatched=True).left_out] == [
            "layers.1.attention.to_q.oft_blocks"
        ]


def test_diffusers_loads_an_exact_merge_with_its_alphas(tmp_path: Path) -> None:
    loader = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    (one, first), (other, second) = saved("bare", tmp_path), saved("musubi", tmp_path)
    run({one: Fraction(7, 10), other: Fraction(7, 10)}, tmp_path / "out.safetensors")
    found = loader._convert_non_diffusers_z_image_lora_to_diffusers(load_file(tmp_path / "out.safetensors"))
    for part in first.changes:
        name = f"transformer.{part.removesuffix('.weight')}"
        product = f64(found[f"{name}.lora_B.weight"]) @ f64(found[f"{name}.lora_A.weight"])
        close(product, 0.7 * (first.changes[part] + second.changes[part]), 5e-3)


def test_factors_of_a_convolution_over_time_keep_their_kernel(tmp_path: Path) -> None:
    name = "diffusion_model.patch_embedding"
    down, up = torch.randn(3, 4, 1, 2, 2), torch.randn(6, 3, 1, 1, 1)
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, tmp_path / "a.safetensors")
    with opened([(str(tmp_path / "a.safetensors"), Fraction(1))]) as terms:
        combine(gather(terms), tmp_path / "b.safetensors", Fixed(3), dtype=dtypes.F32)
    written = load_file(tmp_path / "b.safetensors")
    one, other = written[f"{name}.lora_A.weight"], written[f"{name}.lora_B.weight"]
    assert (one.shape, other.shape) == (down.shape, up.shape)
    torch.testing.assert_close(other.reshape(6, 3) @ one.reshape(3, -1), up.reshape(6, 3) @ down.reshape(3, -1))
