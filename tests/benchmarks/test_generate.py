"""Generated checkpoints: values are a function of (seed, name, index) alone, whatever file they end up in."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ZImageTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks import values
from benchmarks.generate import FAMILY_SEEDS, SIZES, Spec, family, generate, main
from benchmarks.measure import measure
from benchmarks.values import Block, Delta
from mergetool.checkpoint.dtypes import BF16, F8_E4M3, F8_E5M2, F16, F32, DType
from mergetool.errors import OutputError

TINY = Spec(config=SIZES["tiny"])
TUNED = replace(TINY, delta=Delta(seed=7, rank=4))
DIFFUSERS: Any = ZImageTransformer2DModel  # its class methods are not annotated
MATRIX = "layers.1.feed_forward.w2.weight"

TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn}


def made(folder: Path, spec: Spec, name: str = "model.safetensors", *, threads: int = 2) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint written by `generate`, read back with the safetensors library."""
    generate(folder / name, spec, threads=threads)
    paths = sorted((folder / name).glob("*.safetensors")) or [folder / name]
    return {key: tensor for path in paths for key, tensor in load_file(path).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


# ---- one value, many files


@pytest.mark.parametrize("spec", [TINY, TUNED], ids=["base", "fine-tune"])
def test_a_fused_qkv_is_its_q_k_and_v_of_the_other_layout(tmp_path: Path, spec: Spec) -> None:
    fused = made(tmp_path, spec, "fused.safetensors")
    split = made(tmp_path, replace(spec, layout="diffusers"), "split.safetensors")
    for block in ("layers.0", "layers.1", "noise_refiner.0", "context_refiner.0"):
        parts = [split[f"{block}.attention.to_{letter}.weight"] for letter in "qkv"]
        assert torch.equal(fused[f"{block}.attention.qkv.weight"], torch.cat(parts))
        assert torch.equal(fused[f"{block}.attention.out.weight"], split[f"{block}.attention.to_out.0.weight"])
    assert torch.equal(fused["x_embedder.weight"], split["all_x_embedder.2-1.weight"])


def test_a_prefix_changes_names_only(tmp_path: Path) -> None:
    plain = made(tmp_path, TUNED, "plain.safetensors")
    prefixed = made(tmp_path, replace(TUNED, prefix="model.diffusion_model."), "prefixed.safetensors")
    assert same({f"model.diffusion_model.{name}": tensor for name, tensor in plain.items()}, prefixed)


def test_shards_hold_what_one_file_holds(tmp_path: Path) -> None:
    single = made(tmp_path, replace(TUNED, layout="diffusers"))
    sharded = made(tmp_path, replace(TUNED, layout="diffusers", shard_size=400_000), "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert same(single, sharded)


@pytest.mark.parametrize("dtype", [BF16, F16, F8_E4M3], ids=lambda dtype: dtype.name)
def test_every_dtype_is_the_float32_file_rounded_once(tmp_path: Path, dtype: DType) -> None:
    exact = made(tmp_path, replace(TUNED, dtype=F32), "exact.safetensors")
    rounded = made(tmp_path, replace(TUNED, dtype=dtype), "rounded.safetensors")
    for name, tensor in rounded.items():
        assert torch.equal(tensor.float(), exact[name].to(tensor.dtype).float())
    assert rounded[MATRIX].dtype == TORCH[dtype.name]


def test_an_fp8_file_keeps_everything_but_matrices_in_bf16(tmp_path: Path) -> None:
    dtypes = {name: tensor.dtype for name, tensor in made(tmp_path, replace(TINY, dtype=F8_E4M3)).items()}
    assert dtypes["t_embedder.mlp.0.weight"] == torch.float8_e4m3fn
    for name in ("t_embedder.mlp.0.bias", "layers.0.ffn_norm1.weight", "x_pad_token"):
        assert dtypes[name] == torch.bfloat16


def test_bytes_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    for threads in (1, 5):
        generate(tmp_path / f"{threads}.safetensors", TUNED, threads=threads)
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "5.safetensors").read_bytes()


def test_base_weights_are_the_same_on_every_machine_and_in_every_version() -> None:
    digest = hashlib.sha256()
    for name, shape in (("layers.0.attention.to_q.weight", (300, 200)), ("layers.0.ffn_norm1.weight", (333,))):
        for block in values.blocks(name, shape):
            digest.update(values.encode(values.values(block, seed=0), BF16).tobytes())
    assert digest.hexdigest() == "8de1c72988f76f44847c922baf61b1736bc3ec862825c5746526c2b519cd93d0"


# ---- counter-based streams


@pytest.mark.parametrize("stream", [values.normal, values.uniform])
@pytest.mark.parametrize(("start", "count"), [(0, 1), (1, 31), (15, 2), (32, 64), (4999, 77), (10, 0)])
def test_a_window_of_a_stream_is_a_slice_of_it(stream: object, start: int, count: int) -> None:
    draw = values.normal if stream is values.normal else values.uniform
    assert np.array_equal(draw(9, start, count), draw(9, 0, 6000)[start : start + count])


def test_blocks_cover_a_parameter_once_in_order() -> None:
    blocks = list(values.blocks("w", (10_240, 3840)))
    assert [block.row for block in blocks] == list(np.cumsum([0, *(block.rows for block in blocks)])[:-1])
    assert sum(block.rows for block in blocks) == 10_240
    assert max(block.rows * block.columns for block in blocks) <= values.BLOCK_ELEMENTS


def test_the_normal_stream_is_standard_normal_and_independent_of_its_neighbours() -> None:
    draws = values.normal(1, 0, 1 << 20).astype(np.float64)
    error = len(draws) ** -0.5  # of a mean of unit-variance draws; 5 of them is one chance in 1.7 million
    assert abs(draws.mean()) < 5 * error
    assert abs((draws**2).mean() - 1) < 5 * error * 2**0.5
    assert abs((draws**4).mean() - 3) < 5 * error * 96**0.5 + 0.01  # the table's tail ends at 4.3 sigma
    assert abs((draws[1:] * draws[:-1]).mean()) < 5 * error
    assert abs((draws * values.normal(2, 0, 1 << 20)).mean()) < 5 * error


@pytest.mark.parametrize("dtype", [F32, F16, BF16, F8_E4M3], ids=lambda dtype: dtype.name)
def test_rounding_is_torchs_nearest_even(dtype: DType) -> None:
    chance = np.random.default_rng(3)
    spread = chance.standard_normal(200_000) * 10.0 ** chance.integers(-9, 2, 200_000)
    edges = [0.0, -0.0, 2.0**-9, 2.0**-10, 2.0**-10 * 1.001, 17.0, 19.0, 1.00390625, 1.01171875, 447.0, -448.0]
    floats = np.concatenate([spread, edges]).astype(np.float32).clip(-448, 448)
    expected = torch.from_numpy(floats).to(TORCH[dtype.name])
    assert np.array_equal(values.encode(floats, dtype).view(np.uint8), expected.view(torch.uint8).numpy())


def test_a_dtype_it_cannot_round_to_is_refused() -> None:
    with pytest.raises(ValueError, match="fp8_e5m2"):
        values.encode(np.zeros(1, np.float32), F8_E5M2)


# ---- what a fine-tune adds


def difference(delta: Delta, shape: tuple[int, int] = (640, 512)) -> np.ndarray:
    whole = Block(MATRIX, shape, 0, shape[0])
    return values.values(whole, 0, delta).astype(np.float64) - values.values(whole, 0)


def test_without_noise_the_difference_has_the_rank_and_decay_asked_for() -> None:
    strengths = np.linalg.svd(difference(Delta(seed=1, rank=8, decay=0.7, noise=0.0)), compute_uv=False)
    assert strengths[8] < 1e-3 * strengths[7]
    assert (strengths[7] / strengths[0]) ** (1 / 7) == pytest.approx(0.7, rel=0.05)


def test_the_difference_has_the_relative_size_asked_for() -> None:
    low_rank = difference(Delta(seed=1, relative=0.05, noise=0.0))
    assert low_rank.std() / values.WEIGHT_STD == pytest.approx(0.05, rel=0.1)
    noise = difference(Delta(seed=1, relative=0.05, noise=0.5)) - low_rank
    assert noise.std() / low_rank.std() == pytest.approx(0.5, rel=0.1)


def test_norm_weights_lie_around_one_and_move_too(tmp_path: Path) -> None:
    base, tuned = made(tmp_path, TINY, "base.safetensors"), made(tmp_path, TUNED, "tuned.safetensors")
    norms = [name for name in base if "norm" in name]
    assert all(0.9 < float(base[name].float().mean()) < 1.1 for name in norms)
    assert all(not torch.equal(base[name], tuned[name]) for name in base)


def test_a_family_is_three_different_tunes_of_one_base() -> None:
    specs = family(Path("models"), TINY, Delta(seed=0))
    assert [path.name for path in specs] == [f"{name}.safetensors" for name in FAMILY_SEEDS]
    assert len({spec.delta for spec in specs.values()}) == 3
    assert all(replace(spec, delta=None) == TINY for spec in specs.values())


# ---- files


def test_the_small_size_loads_in_diffusers(tmp_path: Path) -> None:
    spec = Spec(config=SIZES["small"], layout="diffusers", shard_size=8_000_000)
    tensors = made(tmp_path, spec, "transformer")
    model = DIFFUSERS.from_pretrained(tmp_path / "transformer", torch_dtype=torch.bfloat16)
    assert same({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tensors)


def test_the_full_size_has_the_published_models_tensors() -> None:
    with torch.device("meta"):
        model = DIFFUSERS.from_config(SIZES["full"])
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_154_908_736


def test_an_existing_file_is_kept_unless_overwriting(tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    target.write_bytes(b"precious")
    with pytest.raises(OutputError, match=r"model\.safetensors"):
        generate(target, TINY)
    assert target.read_bytes() == b"precious"
    generate(target, TINY, overwrite=True)
    with safe_open(target, framework="np") as file:
        assert len(file.keys()) == 65  # 3 blocks of 13, 1 of 11, 15 outside


def test_a_failing_block_is_raised_and_nothing_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(block: Block, seed: int, delta: Delta | None = None) -> values.Floats:
        raise ArithmeticError(block.name)

    monkeypatch.setattr(values, "values", broken)
    with pytest.raises(ArithmeticError):
        generate(tmp_path / "model.safetensors", TINY)
    assert not (tmp_path / "model.safetensors").exists()


def test_the_command_line_writes_a_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["family", str(tmp_path / "models"), "--size", "tiny", "--delta-rank", "2"])
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == sorted(
        f"{n}.safetensors" for n in FAMILY_SEEDS
    )
    assert capsys.readouterr().out.count("MB/s") == 3


def test_memory_stays_bounded_while_a_large_file_is_written(tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    options = ["--size", "medium", "--dtype", "fp8_e4m3", "--delta-seed", "1", "--threads", "2"]
    usage = measure([sys.executable, "-m", "benchmarks.generate", "model", str(target), *options])
    size = target.stat().st_size
    target.unlink()  # pytest would keep it for three runs
    assert usage.exit_code == 0, usage.output
    assert size > 270e6
    assert usage.peak_anon < 100e6


def test_scaled_fp8_has_the_values_of_bf16_to_the_precision_of_fp8(tmp_path: Path) -> None:
    from mergetool import models

    generate(tmp_path / "scaled.safetensors", replace(TINY, scaled=True))
    generate(tmp_path / "plain.safetensors", TINY)
    plain = load_file(tmp_path / "plain.safetensors")
    with models.open_model(str(tmp_path / "scaled.safetensors")) as opened:
        encodings = {p.stored.tensor: p.encoding for p in opened.anatomy.parts.values() if p.encoding}
        assert len(encodings) == 2 * 5
        for name, encoding in encodings.items():
            wanted = plain[name].float().numpy()
            error = np.abs(encoding.values(opened.checkpoint.read) - wanted)
            assert (error <= 2**-4 * 1.01 * np.abs(wanted) + 1e-6).all()


def test_uneven_matrices_differ_in_size_and_decay_and_even_ones_do_not() -> None:
    def strengths(name: str, uneven: float) -> np.ndarray:
        (block,) = values.blocks(name, (300, 200))
        delta = Delta(seed=1, rank=8, decay=0.7, noise=0.0, uneven=uneven)
        made, plain = (values.values(block, 0, one).astype(np.float64) for one in (delta, None))
        return np.linalg.svd(made - plain, compute_uv=False)[:8]

    names = [f"layers.{i}.w.weight" for i in range(8)]
    even, uneven = ([strengths(name, u) for name in names] for u in (0.0, 2.0))
    sizes = [[float(np.linalg.norm(s)) for s in of] for of in (even, uneven)]
    decays = [[float(s[4] / s[0]) for s in of] for of in (even, uneven)]
    assert max(sizes[0]) < 1.2 * min(sizes[0])
    assert max(sizes[1]) > 2 * min(sizes[1])
    assert max(decays[0]) < 1.5 * min(decays[0])
    assert max(decays[1]) > 3 * min(decays[1])
