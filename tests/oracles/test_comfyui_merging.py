"""Merges, saved models and extracted LoRAs of ComfyUI's own nodes against mergetool's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mergetool.checkpoint.dtypes import BF16, F32, DType
from tests.families import checkpoint
from tests.oracles import ComfyUI
from tests.oracles.comparing import Values, decoded, mispatched, read, run, unlike

UNIT = 2.0**-24

MERGES: dict[str, tuple[list[list[Any]], str, list[float]]] = {
    "ModelMergeSubtract and Add": (
        [["ModelMergeSubtract", "a", "b", 2.0], ["ModelMergeAdd", "alk", 0]], "alk + 2 * (a - b)", [2, 2, 1]),
    "the same, a negative multiplier": (
        [["ModelMergeSubtract", "a", "b", -0.7], ["ModelMergeAdd", "alk", 0]], "alk - 0.7 * (a - b)", [0.7, 0.7, 1]),
    "ModelMergeSimple": ([["ModelMergeSimple", "alk", "a", 0.3]], "0.3 * alk + 0.7 * a", [0.7, 0, 0.3]),
    "two differences": (
        [["ModelMergeSubtract", "a", "b", 1.0], ["ModelMergeAdd", "alk", 0], ["ModelMergeSubtract", "alk", "b", 0.5],
         ["ModelMergeAdd", 1, 2]], "alk + (a - b) + 0.5 * (alk - b)", [1, 1.5, 1.5]),
}  # fmt: skip
"""Nodes, the same as an expression, and the sum of the factors of a, b and alk without their signs."""
PAD_TOKENS = frozenset({"x_pad_token", "cap_pad_token"})


@pytest.fixture(scope="session", params=[F32, BF16], ids=["float32", "bf16"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DType]:
    """A folder with three fine-tunes of one base."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(["alk", "a", "b"]):
        checkpoint(folder / f"{name}.safetensors", variant=seed, dtype=request.param)
    return folder, request.param


def merged(path: Path, dtype: DType) -> Values:
    """What ComfyUI saved, rounded as mergetool stores it: on a processor ComfyUI computes with, and saves, float32."""
    stored = torch.bfloat16 if dtype is BF16 else torch.float32
    return {
        name.removeprefix("model.diffusion_model."): tensor.to(stored).double().numpy()
        for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize("merge", MERGES)
def test_merge_is_what_comfyuis_nodes_make(
    tmp_path: Path, models: tuple[Path, DType], comfyui: ComfyUI, merge: str
) -> None:
    """Within six float32 roundings of numbers no larger than all terms together, and one step of the stored type."""
    folder, dtype = models
    nodes, expression, factors = MERGES[merge]
    paths = {name: folder / f"{name}.safetensors" for name in ("a", "b", "alk")}
    operations = [[paths.get(str(word), word) for word in operation] for operation in nodes]
    comfyui.ask("merge", out=tmp_path / "theirs.safetensors", operations=operations)
    run(
        "merge",
        re.sub(r"[a-z]+", lambda word: f"'{paths[word[0]]}'", expression),
        "-o",
        "ours.safetensors",
        folder=tmp_path,
    )
    theirs, ours = merged(tmp_path / "theirs.safetensors", dtype), read(tmp_path / "ours.safetensors")
    terms = [read(path) for path in paths.values()]
    step = 0 if dtype is F32 else 2**-7
    allowed = {
        name: 6 * UNIT * sum(factor * np.abs(term[name]) for factor, term in zip(factors, terms, strict=True))
        + step * np.abs(value)
        for name, value in ours.items()
    }
    assert unlike(without(theirs, PAD_TOKENS), without(ours, PAD_TOKENS), allowed) == []
    if dtype is BF16:  # a step is the exception: where float32's roundings cross the middle between two numbers
        differing = sum(int((theirs[name] != ours[name]).sum()) for name in ours.keys() - PAD_TOKENS)
        assert differing <= 2**-10 * sum(value.size for value in ours.values())


def without(values: Values, names: Any) -> Values:
    return {name: value for name, value in values.items() if name not in names}


@pytest.mark.parametrize("models", [BF16], indirect=True, ids=["bf16"])
def test_comfyuis_nodes_leave_pad_tokens_as_the_first_model_has_them(
    tmp_path: Path, models: tuple[Path, DType], comfyui: ComfyUI
) -> None:
    """No node and no LoRA reaches them, so that mergetool merges what ComfyUI cannot."""
    folder, dtype = models
    paths = [folder / f"{name}.safetensors" for name in ("alk", "a")]
    comfyui.ask("merge", out=tmp_path / "theirs.safetensors", operations=[["ModelMergeSimple", *paths, 0.0]])
    theirs, first, second = merged(tmp_path / "theirs.safetensors", dtype), read(paths[0]), read(paths[1])
    for name in PAD_TOKENS & first.keys():
        np.testing.assert_array_equal(theirs[name], first[name])
        assert (first[name] != second[name]).any()


def test_what_modelsave_writes_is_read_as_the_model_it_was(
    tmp_path: Path, models: tuple[Path, DType], comfyui: ComfyUI
) -> None:
    path = models[0] / "a.safetensors"
    comfyui.ask("save", model=path, out=tmp_path / "saved.safetensors")
    assert unlike(decoded(tmp_path / "saved.safetensors", tmp_path), read(path)) == []


@pytest.mark.parametrize(("kind", "bias"), [("standard", True), ("standard", False), ("full_diff", True)])
def test_what_lorasave_writes_is_baked_as_comfyui_adds_it(
    tmp_path: Path, comfyui: ComfyUI, kind: str, bias: bool
) -> None:
    base, variant = (
        checkpoint(tmp_path / "base.safetensors", dtype=F32),
        checkpoint(tmp_path / "variant.safetensors", variant=1, dtype=F32),
    )
    lora = tmp_path / "extracted.safetensors"
    comfyui.ask("extract", model=variant, base=base, out=lora, rank=8, kind=kind, bias=bias)
    run("lora", "bake", base, lora, "-o", "baked.safetensors", folder=tmp_path)
    expected = read(tmp_path / "baked.safetensors")
    # sums of 8 products and the weight
    allowed = {name: 2 * 12 * UNIT * 8 * np.abs(value).max() for name, value in expected.items()}
    assert mispatched(comfyui, base, lora, expected, allowed) == []


def test_diff_leaves_no_more_error_than_lorasave_at_the_same_rank(tmp_path: Path, comfyui: ComfyUI) -> None:
    base, variant = (
        checkpoint(tmp_path / "base.safetensors", dtype=F32),
        checkpoint(tmp_path / "variant.safetensors", variant=1, dtype=F32),
    )
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    comfyui.ask("extract", model=variant, base=base, out=theirs, rank=2, kind="standard", bias=False)
    run("diff", "--base", base, "--variant", variant, "--rank", 2, "--dtype", "fp16", "-o", ours, folder=tmp_path)
    wanted, errors = read(variant), []
    for lora in (ours, theirs):
        comfyui.ask("patch", model=base, lora=lora, out=tmp_path / "patched.safetensors")
        found = read(tmp_path / "patched.safetensors")
        errors.append(
            sum(
                np.square(found[name] - wanted[name]).sum()
                for name in wanted
                if wanted[name].ndim == 2 and min(wanted[name].shape) >= 32
            )
        )
    assert errors[0] < errors[1]
