"""A merge on real files equals the documented float32 sequence, computed again with numpy from the raw bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from mergetool.checkpoint import dtypes
from mergetool.checkpoint.reader import Checkpoint
from mergetool.engine import job, jobs
from mergetool.errors import NonFiniteError
from mergetool.options.merging import MergeOptions
from tests.families import checkpoint
from tests.ops import oracle

BRIDGE = "alk + 171.1*(a - b)"


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five fine-tunes of one base, in the working folder, so that expressions can name them shortly."""
    for seed, name in enumerate(["alk", "a", "b", "c", "d"]):
        checkpoint(tmp_path / f"{name}.safetensors", variant=seed)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def spelled(text: str) -> str:
    """Model names as the files of the fixture."""
    for name in ("alk", "a", "b", "c", "d"):
        text = text.replace(f"{name} ", f"'{name}.safetensors' ").replace(f"{name})", f"'{name}.safetensors')")
    return text


def run(text: str, output: Path, options: MergeOptions | None = None, **how: object) -> Path:
    with job.open_merge(spelled(text), options) as plan:
        job.run_merge(plan, output, **how)  # type: ignore[arg-type]
    return output


def decoded(path: Path, name: str) -> np.ndarray:
    with Checkpoint.open(path) as opened:
        return oracle.decode(opened.read(name), opened.tensors[name].dtype)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_element_is_the_documented_float32_sequence(family: Path) -> None:
    out = run(BRIDGE + " + 20*(c - d)", family / "out.safetensors", MergeOptions(protect=("refiner",)))
    with Checkpoint.open(out) as opened:
        for name, info in opened.tensors.items():
            found = opened.read(name)
            if "refiner" in name:
                continue
            alk, a, b, c, d = (
                decoded(family / f"{model}.safetensors", name).astype(np.float32)
                for model in ("alk", "a", "b", "c", "d")
            )
            expected = alk + np.float32(171.1) * (a - b)
            expected = expected + np.float32(20) * (c - d)
            assert found == oracle.encode(expected, info.dtype), name


def test_protected_tensors_are_the_first_models_bytes(family: Path) -> None:
    out = run(BRIDGE, family / "out.safetensors", MergeOptions(protect=("refiner",)))
    with Checkpoint.open(out) as merged, Checkpoint.open(family / "alk.safetensors") as first:
        names = [name for name in merged.tensors if "refiner" in name]
        assert len(names) == 24
        assert all(merged.read(name) == first.read(name) for name in names)
        assert merged.read("layers.0.attention.qkv.weight") != first.read("layers.0.attention.qkv.weight")


def test_protected_tensors_can_come_from_another_model(family: Path) -> None:
    out = run(BRIDGE, family / "out.safetensors", MergeOptions(protect=("noise_refiner",), keep_from="c.safetensors"))
    with Checkpoint.open(out) as merged, Checkpoint.open(family / "c.safetensors") as other:
        names = [name for name in merged.tensors if "noise_refiner" in name]
        assert all(merged.read(name) == other.read(name) for name in names)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("reader", ["mmap", "pread"])
def test_bytes_do_not_depend_on_threads_or_reading(family: Path, threads: int, reader: str) -> None:
    reference = run(BRIDGE, family / "reference.safetensors", threads=1, reader="pread")
    out = run(BRIDGE, family / "out.safetensors", threads=threads, reader=reader)
    assert digest(out) == digest(reference)


def test_bytes_do_not_depend_on_the_chunk_size(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = run(BRIDGE, family / "reference.safetensors")
    monkeypatch.setattr(jobs, "CHUNK", 1000)
    assert digest(run(BRIDGE, family / "out.safetensors")) == digest(reference)


def test_one_pass_is_closer_to_the_truth_than_two(family: Path) -> None:
    both = "alk + 171.1*(a - b) + 20*(c - d)"
    run(both, family / "one.safetensors")
    run("alk + 171.1*(a - b)", family / "half.safetensors")
    with job.open_merge("'half.safetensors' + 20*('c.safetensors' - 'd.safetensors')") as plan:
        job.run_merge(plan, family / "two.safetensors")
    name = "layers.1.feed_forward.w1.weight"
    alk, a, b, c, d = (decoded(family / f"{m}.safetensors", name) for m in ("alk", "a", "b", "c", "d"))
    truth = alk + 171.1 * (a - b) + 20 * (c - d)
    one, two = (decoded(family / f"{out}.safetensors", name) for out in ("one", "two"))
    assert np.linalg.norm(one - truth) < np.linalg.norm(two - truth)
    # The two-step file was rounded to bf16 twice: at most half a unit in the last place more, on either side.
    np.testing.assert_allclose(two, one, rtol=2**-7, atol=2**-8 * np.abs(truth).max())


def test_set_scales_the_change_of_a_group(family: Path) -> None:
    options = MergeOptions(multipliers=(("ffn", 0), ("layers.1.attention.to_k.weight", 2)))  # type: ignore[arg-type]
    out = run("alk + 20*(a - b)", family / "out.safetensors", options)
    with Checkpoint.open(out) as merged, Checkpoint.open(family / "alk.safetensors") as first:
        kept = "layers.1.feed_forward.w1.weight"
        assert merged.read(kept) == first.read(kept)
    alk, a, b = (decoded(family / f"{m}.safetensors", "layers.1.attention.qkv.weight") for m in ("alk", "a", "b"))
    third = alk.size // 3
    factor = np.repeat(np.float32([20, 40, 20]), third)
    expected = alk.astype(np.float32) + factor * (a - b).astype(np.float32)
    found = decoded(out, "layers.1.attention.qkv.weight")
    assert oracle.encode(found, dtypes.BF16) == oracle.encode(expected, dtypes.BF16)


def test_set_on_an_interpolation_moves_between_the_anchor_and_the_result(family: Path) -> None:
    options = MergeOptions(multipliers=(("layers", 0),), keep_from="a.safetensors")  # type: ignore[arg-type]
    out = run("0.5*a + 0.5*b".replace("0.5*b", "0.5*'b.safetensors'"), family / "out.safetensors", options)
    with Checkpoint.open(out) as merged, Checkpoint.open(family / "a.safetensors") as first:
        assert merged.read("layers.0.attention.out.weight") == first.read("layers.0.attention.out.weight")
        assert merged.read("x_embedder.weight") != first.read("x_embedder.weight")


def test_output_reads_with_the_safetensors_library(family: Path) -> None:
    out = run(BRIDGE, family / "out.safetensors")
    with safe_open(out, "np") as opened:
        recipe = json.loads(opened.metadata()["mergetool.recipe"])
        inputs = json.loads(opened.metadata()["mergetool.inputs"])
    assert recipe["expression"] == "alk + 171.1*(a - b)"
    assert [model["name"] for model in inputs] == ["alk", "a", "b"]
    assert all(len(model["fingerprint"]) == len("sample-sha256:") + 64 for model in inputs)
    assert len({model["fingerprint"] for model in inputs}) == 3


@pytest.mark.parametrize(
    ("options", "recorded"),
    [
        (MergeOptions(), {}),
        (MergeOptions(rounding="stochastic"), {"rounding": "stochastic", "seed": 0}),
        (MergeOptions(rounding="error-feedback"), {"rounding": "error-feedback"}),
    ],
    ids=lambda value: str(getattr(value, "rounding", "")),
)
def test_the_recipe_records_the_rounding(family: Path, options: MergeOptions, recorded: dict[str, object]) -> None:
    out = run(BRIDGE, family / "out.safetensors", options)
    with safe_open(out, "np") as opened:
        recipe = json.loads(opened.metadata()["mergetool.recipe"])
    assert {key: recipe[key] for key in ("rounding", "seed") if key in recipe} == recorded


def test_metadata_names_no_folder(family: Path) -> None:
    with job.open_merge(f"'{family}/alk.safetensors' + 2*('{family}/a.safetensors' - 'b.safetensors')") as plan:
        job.run_merge(plan, family / "out.safetensors")
    assert str(family).encode() not in (family / "out.safetensors").read_bytes()


@pytest.mark.parametrize("where", ["alk", "a"])
def test_a_nan_is_refused_by_name_and_nothing_is_written(family: Path, where: str) -> None:
    plant(family / f"{where}.safetensors", "layers.0.feed_forward.w2.weight", 7, b"\xc0\x7f")
    with pytest.raises(
        NonFiniteError, match=rf'{where}\.safetensors: tensor "layers\.0\.feed_forward\.w2\.weight".*element 7'
    ):
        run(BRIDGE, family / "out.safetensors")
    assert sorted(p.name for p in family.iterdir()) == [
        "a.safetensors",
        "alk.safetensors",
        "b.safetensors",
        "c.safetensors",
        "d.safetensors",
    ]


def test_a_nan_in_a_protected_tensor_is_refused_too(family: Path) -> None:
    plant(family / "alk.safetensors", "noise_refiner.0.attention.out.weight", 0, b"\x80\x7f")
    with pytest.raises(NonFiniteError, match=r"noise_refiner\.0\.attention\.out\.weight"):
        run(BRIDGE, family / "out.safetensors", MergeOptions(protect=("refiner",)))


def test_nan_is_kept_and_counted_on_request(family: Path) -> None:
    plant(family / "a.safetensors", "layers.0.feed_forward.w2.weight", 7, b"\xc0\x7f")
    with job.open_merge(spelled(BRIDGE)) as plan:
        outcome = job.run_merge(plan, family / "out.safetensors", non_finite="keep")
    assert outcome.non_finite == {"layers.0.feed_forward.w2.weight": 1}


def test_fp16_overflow_is_refused_with_the_way_out(family: Path) -> None:
    with pytest.raises(NonFiniteError, match="write bf16"):
        run("alk + 1000000000*(a - b)", family / "out.safetensors", MergeOptions(dtype=dtypes.F16))


def test_fp8_output_saturates_and_says_where(family: Path) -> None:
    with job.open_merge(spelled("alk + 1000000*(a - b)"), MergeOptions(dtype=dtypes.F8_E4M3)) as plan:
        outcome = job.run_merge(plan, family / "out.safetensors")
    assert outcome.capped
    assert np.abs(decoded(family / "out.safetensors", "layers.0.attention.qkv.weight")).max() == 448.0


def plant(path: Path, tensor: str, element: int, value: bytes) -> None:
    """Overwrite one bf16 element of a file in place."""
    with Checkpoint.open(path) as opened:
        _, offset = opened.locate(tensor)
    with path.open("r+b") as file:
        file.seek(offset + 2 * element)
        file.write(value)
