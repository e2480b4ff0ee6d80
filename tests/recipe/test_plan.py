"""What a plan says will happen to every tensor, on real files of every layout."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergetool.checkpoint import dtypes
from mergetool.engine import job
from mergetool.errors import ExpressionError, FamilyError, InputMissing, PatternError, UsageError
from mergetool.options.merging import MergeOptions
from mergetool.recipe.plan import Plan

MERGE = "'alk.safetensors' + 20*('a.safetensors' - 'b.safetensors')"


def planned(text: str = MERGE, **options: object) -> Plan:
    with job.open_merge(text, MergeOptions(**options), fingerprints=False) as plan:  # type: ignore[arg-type]
        return plan


def reason_of(plan: Plan, part: str) -> str:
    return next(step.reason for tensor in plan.tensors for step in tensor.steps if step.part == part)


def edit(path: Path, **changes: torch.Tensor | None) -> None:
    """Rewrite a file with tensors added, replaced or (None) removed; __ stands for a dot."""
    tensors = load_file(path)
    for name, value in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if value is not None:
            tensors[name.replace("__", ".")] = value
    save_file(tensors, path)


def test_counts_of_the_real_model_family(family: Path) -> None:
    plan = planned(protect=("refiner",))
    assert {reason: len(names) for reason, names in plan.reasons().items()} == {"merged": 41, "protected: refiner": 24}


def test_the_output_keeps_names_dtypes_and_order_of_the_first_model(family: Path) -> None:
    plan = planned()
    first = plan.inputs[0].checkpoint
    assert list(plan.header.tensors) == list(first.tensors)
    assert all(plan.header.tensors[n].shape == info.shape for n, info in first.tensors.items())


def test_bytes_read_count_only_what_is_needed(family: Path) -> None:
    whole = planned()
    protected = planned(protect=("layers",))
    parameters = sum(step.elements for tensor in whole.tensors for step in tensor.steps)
    assert whole.bytes_read == 3 * 2 * parameters
    assert protected.bytes_read < whole.bytes_read


def test_a_fused_tensor_can_be_protected_in_part(family: Path) -> None:
    plan = planned(protect=("v",))
    reasons = {
        step.part: step.reason for t in plan.tensors for step in t.steps if t.name == "layers.0.attention.qkv.weight"
    }
    assert reasons == {
        "layers.0.attention.to_q.weight": "merged",
        "layers.0.attention.to_k.weight": "merged",
        "layers.0.attention.to_v.weight": "protected: v",
    }


def test_include_merges_only_what_it_names(family: Path) -> None:
    plan = planned(include=("ffn",))
    assert reason_of(plan, "layers.0.feed_forward.w1.weight") == "merged"
    assert reason_of(plan, "layers.0.attention.to_q.weight") == "not in `include`"


def test_a_later_set_wins(family: Path) -> None:
    plan = planned(multipliers=(("layers", Fraction(0)), ("layers.1", Fraction(1))))
    assert reason_of(plan, "layers.0.feed_forward.w1.weight") == "`multipliers` to 0"
    assert reason_of(plan, "layers.1.feed_forward.w1.weight") == "merged"


def test_protecting_everything_is_refused(family: Path) -> None:
    with pytest.raises(UsageError, match="leave no tensor to merge"):
        planned(protect=("*",))


def test_a_pattern_that_matches_nothing_lists_the_groups(family: Path) -> None:
    with pytest.raises(PatternError, match="refiner"):
        planned(protect=("refinery",))


def test_a_tensor_missing_from_another_model_is_kept_and_named(family: Path) -> None:
    edit(family / "b.safetensors", layers__0__attention_norm1__weight=None)
    assert reason_of(planned(), "layers.0.attention_norm1.weight") == "not in b.safetensors"


def test_a_tensor_only_a_subtracted_model_has_is_left_out_and_named(family: Path) -> None:
    edit(family / "b.safetensors", norm_final__weight=torch.ones(64))
    assert planned().left_out == (("norm_final.weight", "only in b.safetensors"),)


def test_integers_are_never_blended(family: Path) -> None:
    for name in ("alk", "a", "b"):
        edit(family / f"{name}.safetensors", layers__0__position_ids=torch.arange(4))
    assert reason_of(planned(), "layers.0.position_ids") == "int64 is not blended"


def test_clashing_shapes_name_both_models_and_the_way_out(family: Path) -> None:
    edit(family / "b.safetensors", cap_embedder__0__weight=torch.ones(48))
    with pytest.raises(
        FamilyError,
        match=r'"cap_embedder\.0\.weight" has shape \[64\] in alk.* \[48\] in b.*`exclude="cap_embedder.0.weight"`',
    ):
        planned()
    assert reason_of(planned(exclude=("cap_embedder.0.weight",)), "cap_embedder.0.weight").startswith("excluded")


def test_models_of_different_families_do_not_merge(family: Path) -> None:
    save_file({"down.weight": torch.ones(4, 4)}, family / "b.safetensors")
    with pytest.raises(FamilyError, match="different families"):
        planned()


def test_an_unknown_architecture_merges_by_name(family: Path) -> None:
    for name in ("alk", "a", "b"):
        save_file({"block.0.w": torch.ones(4, 4), "steps": torch.arange(3)}, family / f"{name}.safetensors")
    plan = planned()
    assert reason_of(plan, "block.0.w") == "merged"
    assert reason_of(plan, "steps") == "int64 is not blended"


def test_the_output_dtype_applies_to_floats_only(family: Path) -> None:
    edit(family / "alk.safetensors", layers__0__position_ids=torch.arange(4))
    plan = planned(dtype=dtypes.F32)
    assert {t.dtype.name for t in plan.tensors} == {"fp32", "int64"}


def test_a_protected_tensor_in_another_dtype_is_said_to_be_rounded(family: Path) -> None:
    plan = planned(protect=("refiner",), dtype=dtypes.F16)
    assert reason_of(plan, "noise_refiner.0.attention.to_q.weight") == "protected: refiner, rounded to fp16"


def test_tensors_outside_the_model_are_copied_in_the_same_layout(family: Path) -> None:
    edit(family / "alk.safetensors", vae__decoder__weight=torch.ones(2, 2))
    same = planned()
    assert reason_of(same, "vae.decoder.weight") == "bundled, copied"
    other = planned(layout="diffusers")
    assert [name for name, _ in other.left_out] == ["vae.decoder.weight"]


def test_a_parameter_the_model_never_reads_does_not_enter_the_other_layout(family: Path) -> None:
    edit(family / "alk.safetensors", norm_final__weight=torch.ones(64))
    assert reason_of(planned(), "norm_final.weight") == "not in a.safetensors"
    assert planned(layout="diffusers").left_out == (("norm_final.weight", "never read by the model"),)


def test_an_unknown_layout_is_refused(family: Path) -> None:
    with pytest.raises(UsageError, match="comfyui, diffusers"):
        planned(layout="sideways")


def test_a_missing_file_is_named(family: Path) -> None:
    with pytest.raises(InputMissing, match=r"nowhere\.safetensors"):
        planned("'alk.safetensors' + 2*('nowhere.safetensors' - 'b.safetensors')")


def test_the_degree_is_checked_before_a_file_is_opened() -> None:
    with pytest.raises(ExpressionError, match="adds two whole models"):
        planned("'nowhere.safetensors' + 'elsewhere.safetensors'")


def test_the_header_has_the_size_that_the_run_will_write(family: Path) -> None:
    with job.open_merge(MERGE, fingerprints=False) as dry, job.open_merge(MERGE) as real:
        assert dry.header.file_size == real.header.file_size


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rounding": "up"}, "nearest, stochastic, error-feedback"),
        ({"rounding": "stochastic", "seed": -1}, "whole number from 0"),
        ({"rounding": "error-feedback", "seed": 5}, "draws no random numbers"),
    ],
)
def test_a_rounding_that_makes_no_sense_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        MergeOptions(**options)  # type: ignore[arg-type]


def test_a_model_whose_factor_is_0_is_not_read(family: Path) -> None:
    plan = planned("0*'alk.safetensors' + 'a.safetensors'")
    assert plan.bytes_read == plan.header.data_size
    assert [model.name for model in plan.inputs] == ["a.safetensors"]
