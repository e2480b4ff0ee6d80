"""Differences of LoRAs, of what two variants share, of convolutions, and what is stored whole: real files against float64."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergetool.adapters import sources
from mergetool.adapters.lora_file import is_lora, open_lora
from mergetool.adapters.values import dense_rows
from mergetool.arch import recognise
from mergetool.checkpoint.dtypes import F32
from mergetool.checkpoint.reader import Checkpoint
from mergetool.difference.extract import Extraction, extract, on_the_cpu, open_diff
from mergetool.difference.pairs import UNCHANGED
from mergetool.errors import DataError, FamilyError, NonFiniteError, OutputError, UsageError
from mergetool.lowrank import sets
from mergetool.options.differences import DiffOptions
from tests.adapters import spellings
from tests.families import checkpoint

M, N, R = 96, 64, 6
NAME = "blocks.0.proj.weight"


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def low(rank: int, seed: int, m: int = M, n: int = N) -> torch.Tensor:
    return gaussian(m, rank, seed=seed) @ gaussian(rank, n, seed=seed + 500) / 10


def save(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, path)
    return path


def base_of(folder: Path, extra: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    tensors = {NAME: gaussian(M, N, seed=1), **(extra or {})}
    save(folder / "base.safetensors", tensors)
    return {name: tensor.float().double() for name, tensor in tensors.items()}


def lora(path: Path, changes: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Path:
    tensors = {}
    for module, (up, down) in changes.items():
        tensors |= {f"diffusion_model.{module}.lora_B.weight": up, f"diffusion_model.{module}.lora_A.weight": down}
    return save(path, tensors)


def diff(folder: Path, variant: str, second: str | None = None, full: bool = False, **options: object) -> Extraction:
    beside = {
        "full": folder / "full.safetensors" if full else None,
        "variant2": None if second is None else folder / second,
    }
    chosen = DiffOptions(**{"dtype": "fp32", "rank_max": 0, **beside, **options})  # type: ignore[arg-type]
    with open_diff(str(folder / "base.safetensors"), str(folder / variant), chosen) as pairing:
        return extract(pairing, folder / "out.safetensors", chosen, overwrite=True)


def stored(folder: Path, part: str = NAME) -> np.ndarray:
    """What the written files change ``part`` by, through the reader of LoRAs."""
    total: np.ndarray | None = None
    with Checkpoint.open(folder / "base.safetensors") as base:
        anatomy = recognise(base.tensors, source="base")
        for name in ("out.safetensors", "full.safetensors"):
            if not (folder / name).exists():
                continue
            with open_lora(folder / name, anatomy=anatomy) as file:
                assert file.unmatched == ()
                for change in file.changes.get(part, ()):
                    rows = dense_rows(file, change, 0, change.rows).astype(np.float64)
                    total = rows if total is None else total + rows
    assert total is not None
    return total.reshape(anatomy.parts[part].shape)


def error(found: np.ndarray, wanted: torch.Tensor | np.ndarray) -> float:
    exact = np.asarray(wanted)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def test_a_lora_variant_is_its_own_difference(tmp_path: Path) -> None:
    base_of(tmp_path)
    up, down = gaussian(M, R, seed=2).float(), gaussian(R, N, seed=3).float()
    lora(tmp_path / "variant.safetensors", {"blocks.0.proj": (up, down)})
    found = diff(tmp_path, "variant.safetensors", rank_thresh=1.0)
    assert [(layer.rank, layer.method) for layer in found.layers] == [(R, "factors")]
    assert error(stored(tmp_path), up.double() @ down.double()) < 1e-6


def test_a_loras_rank_is_that_of_its_spectrum(tmp_path: Path) -> None:
    base_of(tmp_path)
    up, down = gaussian(M, 20, seed=2).float(), gaussian(20, N, seed=3).float()
    lora(tmp_path / "variant.safetensors", {"blocks.0.proj": (up, down)})
    energies = np.linalg.svd(up.double() @ down.double(), compute_uv=False) ** 2
    wanted = 1 + int(np.searchsorted(np.cumsum(energies) / energies.sum(), 0.9))
    (layer,) = diff(tmp_path, "variant.safetensors", rank_thresh=0.9).layers
    assert (layer.rank, layer.capped) == (wanted, False)
    assert layer.energy == pytest.approx(energies[:wanted].sum() / energies.sum())
    (layer,) = diff(tmp_path, "variant.safetensors", rank_thresh=0.9, rank_max=3).layers
    assert (layer.rank, layer.capped, layer.wanted) == (3, True, wanted)
    rest = np.sqrt(energies[3:].sum() / energies.sum())
    assert layer.residual == pytest.approx(rest, rel=1e-5)


def test_no_dense_matrix_is_made_of_a_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base_of(tmp_path)
    lora(tmp_path / "variant.safetensors", {"blocks.0.proj": (gaussian(M, R, seed=2), gaussian(R, N, seed=3))})
    monkeypatch.setattr(sources, "dense_rows", lambda *_: pytest.fail("a dense matrix was made"))
    monkeypatch.setattr("mergetool.difference.delta.DeltaReader.read", lambda *_: pytest.fail("a tensor was read"))
    assert diff(tmp_path, "variant.safetensors", rank=2).layers[0].rank == 2


SPELLINGS = {
    "PEFT": spellings.split("base_model.model.", ".lora_A.weight", ".lora_B.weight"),
    "kohya": spellings.split("lora_unet_", ".lora_down.weight", ".lora_up.weight", alpha=2.0, flat=True),
    "fused": spellings.fused("diffusion_model.", ".lora_A.weight", ".lora_B.weight", alpha=8.0),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_lora_of_any_spelling_is_a_variant(tmp_path: Path, name: str) -> None:
    checkpoint(tmp_path / "base.safetensors")
    written = SPELLINGS[name]
    path = written.save(tmp_path)
    diff(tmp_path, path.name, rank_thresh=1.0)
    for part, change in written.changes.items():
        assert error(stored(tmp_path, part), change) < 1e-6, part


def test_a_peft_folder_is_recognised_by_what_is_in_it(tmp_path: Path) -> None:
    checkpoint(tmp_path / "base.safetensors")
    written = spellings.split("base_model.model.", ".lora_A.weight", ".lora_B.weight")
    written.config = {"lora_alpha": 4, "r": 4}
    path = written.save(tmp_path)
    assert path.is_dir()
    assert is_lora(path)
    assert not is_lora(tmp_path / "base.safetensors")
    assert not is_lora(tmp_path / "absent.safetensors")
    found = diff(tmp_path, path.name, rank_thresh=1.0)
    assert len(found.layers) == len(written.changes)


def test_what_a_lora_does_not_change_is_said_to_be_so(tmp_path: Path) -> None:
    base_of(tmp_path, {"blocks.1.proj.weight": gaussian(M, N, seed=5)})
    path = lora(tmp_path / "variant.safetensors", {"blocks.0.proj": (gaussian(M, 2, seed=2), gaussian(2, N, seed=3))})
    with open_diff(str(tmp_path / "base.safetensors"), str(path), DiffOptions()) as pairing:
        assert pairing.left_out == (("blocks.1.proj.weight", UNCHANGED),)


def test_keys_of_a_lora_that_fit_nothing_are_refused_or_named(tmp_path: Path) -> None:
    base_of(tmp_path)
    path = lora(
        tmp_path / "variant.safetensors",
        {
            "blocks.0.proj": (gaussian(M, 2, seed=2), gaussian(2, N, seed=3)),
            "other": (gaussian(4, 2, seed=2), gaussian(2, 4, seed=3)),
        },
    )
    with pytest.raises(DataError, match="`skip_unmatched`"):
        diff(tmp_path, "variant.safetensors")
    with open_diff(str(tmp_path / "base.safetensors"), str(path), DiffOptions(), skip_unmatched=True) as pairing:
        assert [key for key, _ in pairing.left_out] == [
            "diffusion_model.other.lora_A.weight",
            "diffusion_model.other.lora_B.weight",
        ]


def test_a_doras_change_of_the_base_is_the_difference(tmp_path: Path) -> None:
    """As PEFT adds it: every row of base + product scaled to its magnitude."""
    base = base_of(tmp_path)[NAME]
    up, down = gaussian(M, 4, seed=2).float(), gaussian(4, N, seed=3).float()
    size = gaussian(M, seed=4).float().abs()
    name = "diffusion_model.blocks.0.proj"
    save(
        tmp_path / "variant.safetensors",
        {f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down, f"{name}.lora_magnitude_vector": size},
    )
    diff(tmp_path, "variant.safetensors", rank_thresh=1.0)
    moved = base + up.double() @ down.double()
    wanted = size.double()[:, None] * moved / torch.linalg.vector_norm(moved, dim=1, keepdim=True) - base
    assert error(stored(tmp_path), wanted) < 1e-3


def test_a_base_that_is_a_lora_is_refused(tmp_path: Path) -> None:
    base_of(tmp_path)
    lora(tmp_path / "base.safetensors", {"blocks.0.proj": (gaussian(M, 2, seed=2), gaussian(2, N, seed=3))})
    with pytest.raises(FamilyError, match="is a LoRA"):
        diff(tmp_path, "base.safetensors")


def test_nan_in_a_loras_factors_is_refused(tmp_path: Path) -> None:
    base_of(tmp_path)
    up = gaussian(M, 2, seed=2)
    up[3, 1] = float("nan")
    lora(tmp_path / "variant.safetensors", {"blocks.0.proj": (up, gaussian(2, N, seed=3))})
    with pytest.raises(NonFiniteError, match="NaN"):
        diff(tmp_path, "variant.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def planted(folder: Path) -> tuple[torch.Tensor, ...]:
    """Two variants that share a part and have another each, in orthogonal subspaces: shared, first, second."""
    left, right = (torch.linalg.qr(gaussian(size, size, seed=size))[0] for size in (M, N))
    parts = []
    for start, end in ((0, 3), (3, 8), (8, 12)):
        core = torch.diag(torch.linspace(2, 1, end - start, dtype=torch.float64))
        parts.append(left[:, start:end] @ core @ right[:, start:end].T)
    base = base_of(folder)[NAME]
    save(folder / "a.safetensors", {NAME: base + parts[0] + parts[1]})
    save(folder / "b.safetensors", {NAME: base + parts[0] + parts[2]})
    return tuple(parts)


def test_what_two_checkpoints_share_is_found(tmp_path: Path) -> None:
    shared, first, second = planted(tmp_path)
    (layer,) = diff(tmp_path, "a.safetensors", "b.safetensors", rank_thresh=1.0).layers
    assert error(stored(tmp_path), shared) < 1e-4
    assert layer.rank >= 3
    assert layer.shared is not None
    energies = [float(part.square().sum()) for part in (shared, first, second)]
    assert layer.shared[0] == pytest.approx(energies[0] / (energies[0] + energies[1]), rel=1e-4)
    assert layer.shared[1] == pytest.approx(energies[0] / (energies[0] + energies[2]), rel=1e-4)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, -2.0)])
def test_a_union_has_what_is_shared_once_and_the_rest_weighed(tmp_path: Path, weights: tuple[float, float]) -> None:
    shared, first, second = planted(tmp_path)
    diff(tmp_path, "a.safetensors", "b.safetensors", rank_thresh=1.0, union=True, weights=weights)
    assert error(stored(tmp_path), shared + weights[0] * first + weights[1] * second) < 1e-4


def test_a_checkpoint_and_a_lora_have_a_common_part(tmp_path: Path) -> None:
    shared, _, second = planted(tmp_path)
    up, values, down = torch.linalg.svd(shared + second)
    lora(tmp_path / "b-lora.safetensors", {"blocks.0.proj": (up[:, :7] * values[:7], down[:7])})
    diff(tmp_path, "a.safetensors", "b-lora.safetensors", rank_thresh=1.0)
    assert error(stored(tmp_path), shared) < 1e-4


def test_two_loras_have_the_common_part_and_union_of_their_factors(tmp_path: Path) -> None:
    base_of(tmp_path)
    pairs = [(gaussian(M, 4, seed=i).float(), gaussian(4, N, seed=i + 9).float()) for i in (20, 40)]
    pairs[1] = (torch.cat([pairs[0][0], pairs[1][0]], 1), torch.cat([pairs[0][1], pairs[1][1]]))
    for name, pair in zip("ab", pairs, strict=True):
        lora(tmp_path / f"{name}.safetensors", {"blocks.0.proj": pair})
    dense = [pair[0].double() @ pair[1].double() for pair in pairs]
    shared = sets.common(*dense).dense()
    diff(tmp_path, "a.safetensors", "b.safetensors", rank_thresh=1.0)
    assert error(stored(tmp_path), shared) < 1e-5
    found = diff(tmp_path, "a.safetensors", "b.safetensors", rank_thresh=1.0, union=True)
    assert found.layers[0].method == "factors"
    assert error(stored(tmp_path), dense[0] + dense[1] - shared) < 1e-5


def test_what_one_lora_alone_changes_is_in_the_union_and_not_in_the_common_part(tmp_path: Path) -> None:
    base_of(tmp_path, {"blocks.1.proj.weight": gaussian(M, N, seed=5)})
    both = (gaussian(M, 2, seed=2), gaussian(2, N, seed=3))
    lora(tmp_path / "a.safetensors", {"blocks.0.proj": both})
    lora(tmp_path / "b.safetensors", {"blocks.0.proj": both, "blocks.1.proj": both})
    diff(tmp_path, "a.safetensors", "b.safetensors", rank_thresh=1.0)
    assert not any("blocks.1" in key for key in load_file(tmp_path / "out.safetensors"))
    diff(tmp_path, "a.safetensors", "b.safetensors", rank_thresh=1.0, union=True, weights=(1.0, 0.5))
    assert error(stored(tmp_path, "blocks.1.proj.weight"), 0.5 * both[0] @ both[1]) < 1e-5


def test_differences_without_anything_in_common_are_said_to_be_so(tmp_path: Path) -> None:
    _, first, second = planted(tmp_path)
    for name, part in (("a", first), ("b", second)):
        up, values, down = torch.linalg.svd(part)
        lora(tmp_path / f"{name}.safetensors", {"blocks.0.proj": (up[:, :5] * values[:5], down[:5])})
    with pytest.raises(DataError, match="nothing in common"):
        diff(tmp_path, "a.safetensors", "b.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_the_orthogonal_part_of_two_checkpoints_has_nothing_along_the_other(tmp_path: Path) -> None:
    shared, first, second = planted(tmp_path)
    diff(tmp_path, "a.safetensors", "b.safetensors", rank_thresh=1.0, orthogonal=True)
    one, two = shared + first, shared + second
    found = stored(tmp_path)
    assert error(found, one - (one * two).sum() / (two * two).sum() * two) < 1e-4
    with safe_open(tmp_path / "out.safetensors", "pt") as opened:
        assert json.loads(opened.metadata()["mergetool.diff"])["orthogonal"] is True


def test_of_a_multiple_nothing_is_orthogonal(tmp_path: Path) -> None:
    base_of(tmp_path)
    both = (gaussian(M, 2, seed=2), gaussian(2, N, seed=3))
    lora(tmp_path / "a.safetensors", {"blocks.0.proj": both})
    lora(tmp_path / "b.safetensors", {"blocks.0.proj": (both[0] * 3, both[1])})
    with pytest.raises(DataError, match="orthogonal"):
        diff(tmp_path, "a.safetensors", "b.safetensors", orthogonal=True)
    assert not (tmp_path / "out.safetensors").exists()


def test_what_only_one_lora_changes_is_orthogonal_to_the_other(tmp_path: Path) -> None:
    base_of(tmp_path, {"blocks.1.proj.weight": gaussian(M, N, seed=5)})
    both = (gaussian(M, 2, seed=2), gaussian(2, N, seed=3))
    lora(tmp_path / "a.safetensors", {"blocks.0.proj": both, "blocks.1.proj": both})
    lora(tmp_path / "b.safetensors", {"blocks.0.proj": both})
    diff(tmp_path, "a.safetensors", "b.safetensors", rank_thresh=1.0, orthogonal=True)
    assert error(stored(tmp_path, "blocks.1.proj.weight"), both[0] @ both[1]) < 1e-5
    assert not any("blocks.0" in key for key in load_file(tmp_path / "out.safetensors"))


def test_the_metadata_names_both_variants_and_what_was_made_of_them(tmp_path: Path) -> None:
    planted(tmp_path)
    diff(tmp_path, "a.safetensors", "b.safetensors", union=True, weights=(1.0, 0.5))
    with safe_open(tmp_path / "out.safetensors", "pt") as opened:
        metadata = opened.metadata()
    recipe = json.loads(metadata["mergetool.diff"])
    assert (recipe["variant2"], recipe["union"], recipe["weights"]) == ("b", True, [1.0, 0.5])
    assert [entry["name"] for entry in json.loads(metadata["mergetool.inputs"])] == ["base", "a", "b"]


@pytest.mark.parametrize("threads", [1, 3])
def test_bytes_of_a_common_part_do_not_depend_on_threads(tmp_path: Path, threads: int) -> None:
    checkpoint(tmp_path / "base.safetensors")
    for seed in (1, 2):
        checkpoint(tmp_path / f"{seed}.safetensors", variant=seed)
    options, found = DiffOptions(variant2=tmp_path / "2.safetensors"), []
    for count in (2, threads):
        names = [str(tmp_path / f"{name}.safetensors") for name in ("base", "1")]
        with open_diff(names[0], names[1], options) as pairing:
            extract(pairing, tmp_path / "out.safetensors", options, threads=count, overwrite=True)
        found.append((tmp_path / "out.safetensors").read_bytes())
    assert found[0] == found[1]


def test_a_budget_holds_for_a_union(tmp_path: Path) -> None:
    checkpoint(tmp_path / "base.safetensors")
    for seed in (1, 2):
        checkpoint(tmp_path / f"{seed}.safetensors", variant=seed)
    found = diff(tmp_path, "1.safetensors", "2.safetensors", union=True, budget=60_000)
    assert 55_000 < (tmp_path / "out.safetensors").stat().st_size <= 60_000
    assert all(layer.shared for layer in found.layers if layer.rank)


# ---------------------------------------------------------------- stored whole


def test_both_files_together_make_the_base_the_variant(tmp_path: Path) -> None:
    """Biases, norms and small matrices of a Z-Image, fused qkv among what is stored whole by ``full_layer``."""
    checkpoint(tmp_path / "base.safetensors", dtype=F32)
    checkpoint(tmp_path / "variant.safetensors", variant=1, dtype=F32)
    found = diff(tmp_path, "variant.safetensors", full=True, rank_thresh=1.0, full_layer=("layers.0",))
    keys, whole = list(load_file(tmp_path / "full.safetensors")), {one.name for one in found.whole}
    assert "diffusion_model.layers.0.attention.qkv.diff" in keys
    assert "diffusion_model.layers.1.attention.q_norm.diff" in keys
    assert "diffusion_model.x_embedder.diff_b" in keys
    assert not any("layers.0." in key for key in load_file(tmp_path / "out.safetensors"))
    assert set(found.skipped) == {"neither a weight nor a bias, which no program applies"}
    truth = {}
    with (
        Checkpoint.open(tmp_path / "base.safetensors") as base,
        Checkpoint.open(tmp_path / "variant.safetensors") as to,
    ):
        anatomy = recognise(base.tensors, source="base")
        for name, info in base.tensors.items():
            b, v = (np.frombuffer(file.read(name), "<f4").astype(np.float64) for file in (base, to))
            truth[name] = (v - b).reshape(info.shape)
    for part in anatomy.parts.values():
        if "pad_token" in part.name:
            continue
        rows = part.stored
        wanted = truth[rows.tensor][rows.row : rows.row + rows.rows]
        if np.any(wanted):
            tolerance = 1e-6 if part.name in whole else 1e-3
            assert error(stored(tmp_path, part.name).reshape(wanted.shape), wanted) < tolerance, part.name


def test_rows_of_a_fused_matrix_that_are_not_stored_whole_are_zeros_there(tmp_path: Path) -> None:
    checkpoint(tmp_path / "base.safetensors", dtype=F32)
    checkpoint(tmp_path / "variant.safetensors", variant=1, dtype=F32)
    diff(tmp_path, "variant.safetensors", full=True, full_layer=("layers.0.attention.to_k.weight",))
    whole = load_file(tmp_path / "full.safetensors")["diffusion_model.layers.0.attention.qkv.diff"]
    assert [bool(rows.any()) for rows in whole.chunk(3)] == [False, True, False]
    assert "diffusion_model.layers.0.attention.to_q.lora_A.weight" in load_file(tmp_path / "out.safetensors")


def test_without_full_the_one_dimensional_are_measured_and_not_stored(tmp_path: Path) -> None:
    base = base_of(tmp_path, {"blocks.0.norm.weight": gaussian(N, seed=7)})
    change = gaussian(N, seed=8)
    save(
        tmp_path / "v.safetensors",
        {NAME: base[NAME] + low(2, 9), "blocks.0.norm.weight": base["blocks.0.norm.weight"] + change},
    )
    found = diff(tmp_path, "v.safetensors")
    assert found.skipped["one-dimensional"]["blocks.0.norm.weight"] == pytest.approx(float(change.square().sum()), 1e-5)
    assert not found.whole


def test_a_whole_difference_is_rounded_once_and_says_by_how_much(tmp_path: Path) -> None:
    base = base_of(tmp_path, {"blocks.0.norm.weight": torch.zeros(N)})
    change = gaussian(N, seed=8)
    save(tmp_path / "v.safetensors", {NAME: base[NAME] + low(2, 9), "blocks.0.norm.weight": change})
    found = diff(tmp_path, "v.safetensors", full=True, dtype="fp16")
    key = "diffusion_model.blocks.0.norm.diff"
    half = load_file(tmp_path / "full.safetensors")[key]
    assert torch.equal(half, change.float().half())
    assert found.whole[0].residual == pytest.approx(error(half.double().numpy(), change.float().double()), rel=1e-6)


def test_a_whole_difference_beyond_the_dtype_is_refused(tmp_path: Path) -> None:
    base = base_of(tmp_path, {"blocks.0.norm.weight": torch.zeros(N)})
    save(tmp_path / "v.safetensors", {NAME: base[NAME] + low(2, 9), "blocks.0.norm.weight": torch.full((N,), 7e4)})
    with pytest.raises(NonFiniteError, match="too large for float16"):
        diff(tmp_path, "v.safetensors", full=True, dtype="fp16")
    assert not (tmp_path / "full.safetensors").exists()


def test_excluded_and_unchanged_tensors_are_not_stored_whole(tmp_path: Path) -> None:
    norms = {f"blocks.{i}.norm.weight": gaussian(N, seed=7 + i) for i in range(3)}
    base = base_of(tmp_path, norms)
    changed = {name: base[name] + (name != "blocks.2.norm.weight") for name in norms}
    save(tmp_path / "v.safetensors", {NAME: base[NAME] + low(2, 9), **changed})
    found = diff(tmp_path, "v.safetensors", full=True, exclude=("blocks.1.norm.weight",))
    assert list(load_file(tmp_path / "full.safetensors")) == ["diffusion_model.blocks.0.norm.diff"]
    assert found.skipped["one-dimensional"] == {"blocks.2.norm.weight": 0.0}


def test_what_vectors_share_is_stored_whole_too(tmp_path: Path) -> None:
    """A vector is a matrix of one row: of one and the same direction the weaker delta is common."""
    base = base_of(tmp_path, {"blocks.0.norm.weight": torch.zeros(N)})
    change = gaussian(N, seed=8)
    for name, strength in (("a", 1.0), ("b", 0.25)):
        save(
            tmp_path / f"{name}.safetensors",
            {NAME: base[NAME] + low(2, 9), "blocks.0.norm.weight": strength * change},
        )
    diff(tmp_path, "a.safetensors", "b.safetensors", full=True)
    assert error(stored(tmp_path, "blocks.0.norm.weight"), 0.25 * change) < 1e-5


def test_a_target_of_the_second_file_is_checked_before_the_work(tmp_path: Path) -> None:
    planted(tmp_path)
    options = DiffOptions(full=tmp_path / "b.safetensors")
    with open_diff(str(tmp_path / "base.safetensors"), str(tmp_path / "a.safetensors"), options) as pairing:
        with pytest.raises(OutputError, match="exists"):
            extract(pairing, tmp_path / "out.safetensors", options)
        with pytest.raises(UsageError, match="same file"):
            extract(pairing, tmp_path / "out.safetensors", replace(options, full=tmp_path / "out.safetensors"))
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"full_layer": ("blocks.0",)}, "`full=FILE"),
        ({"weights": (1.0, 2.0)}, "add `union`"),
        ({"union": True, "weights": (1.0, float("inf"))}, "two numbers"),
        ({"union": True}, "`variant2`"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(
    tmp_path: Path, options: dict[str, object], sentence: str
) -> None:
    planted(tmp_path)
    with pytest.raises(UsageError, match=sentence):
        diff(tmp_path, "a.safetensors", **options)


# ---------------------------------------------------------------- convolutions

CONV = "input_blocks.1.0.in_layers.2"
STORED = f"model.diffusion_model.{CONV}"


def conv_family(folder: Path, kernel: int = 3) -> torch.Tensor:
    shape = (48, 40, kernel, kernel)
    base = base_of(folder, {f"{STORED}.weight": gaussian(*shape, seed=11), f"{STORED}.bias": gaussian(48, seed=12)})
    change = low(5, 13, 48, 40 * kernel * kernel).reshape(shape)
    to = base | {f"{STORED}.weight": base[f"{STORED}.weight"] + change, f"{STORED}.bias": base[f"{STORED}.bias"] + 1}
    save(folder / "v.safetensors", {name: to[name] + (low(2, 9) if name == NAME else 0) for name in to})
    return change


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_convolution_is_folded_and_read_again(tmp_path: Path, kernel: int) -> None:
    change = conv_family(tmp_path, kernel)
    found = diff(tmp_path, "v.safetensors", rank_thresh=1.0 - 1e-9)
    factors = load_file(tmp_path / "out.safetensors")
    name = "diffusion_model.input_blocks.1.0.in_layers.2"
    down, up = factors[f"{name}.lora_A.weight"], factors[f"{name}.lora_B.weight"]
    assert tuple(down.shape[1:]) == (40, kernel, kernel)
    assert tuple(up.shape) == (48, len(down), 1, 1)
    folded = np.einsum("orxy,rihw->oihw", up.double().numpy(), down.double().numpy())
    assert error(folded, change) < 1e-4
    assert error(stored(tmp_path, f"{CONV}.weight"), change) < 1e-4
    assert {layer.name: layer.shape for layer in found.layers}[f"{CONV}.weight"] == (48, 40 * kernel * kernel)


def test_the_factors_of_a_convolution_are_two_convolutions_in_a_row(tmp_path: Path) -> None:
    """What programs do with such factors: down with the kernel, then up with a kernel of 1."""
    change = conv_family(tmp_path)
    diff(tmp_path, "v.safetensors", rank_thresh=1.0 - 1e-9)
    factors = load_file(tmp_path / "out.safetensors")
    name = "diffusion_model.input_blocks.1.0.in_layers.2"
    picture = gaussian(1, 40, 9, 9, seed=14)
    inner = torch.nn.functional.conv2d(picture, factors[f"{name}.lora_A.weight"].double(), padding=1)
    found = torch.nn.functional.conv2d(inner, factors[f"{name}.lora_B.weight"].double())
    assert error(found.numpy(), torch.nn.functional.conv2d(picture, change, padding=1)) < 1e-4


def test_a_convolutions_bias_goes_to_the_second_file(tmp_path: Path) -> None:
    conv_family(tmp_path)
    diff(tmp_path, "v.safetensors", full=True)
    whole = load_file(tmp_path / "full.safetensors")
    assert list(whole) == ["diffusion_model.input_blocks.1.0.in_layers.2.diff_b"]
    assert error(stored(tmp_path, f"{CONV}.bias"), np.ones(48)) < 1e-5


def test_a_convolution_lora_is_a_variant(tmp_path: Path) -> None:
    conv_family(tmp_path)
    down, up = gaussian(4, 40, 3, 3, seed=15).float(), gaussian(48, 4, 1, 1, seed=16).float()
    lora(tmp_path / "lora.safetensors", {"input_blocks.1.0.in_layers.2": (up, down)})
    diff(tmp_path, "lora.safetensors", rank_thresh=1.0)
    wanted = np.einsum("orxy,rihw->oihw", up.double().numpy(), down.double().numpy())
    assert error(stored(tmp_path, f"{CONV}.weight"), wanted) < 1e-6


def test_a_budget_counts_what_a_convolution_takes(tmp_path: Path) -> None:
    conv_family(tmp_path)
    diff(tmp_path, "v.safetensors", budget=9_000)
    assert 6_000 < (tmp_path / "out.safetensors").stat().st_size <= 9_000


# ---------------------------------------------------------------- devices


def test_what_a_device_cannot_do_is_done_on_the_cpu_to_the_byte(tmp_path: Path) -> None:
    """A LoRA's difference and one of two variants: asked of a device, they come out as without one."""
    planted(tmp_path)
    lora(tmp_path / "lora.safetensors", {"blocks.0.proj": (gaussian(M, 2, seed=2), gaussian(2, N, seed=3))})
    for variant, second, said in (("lora", None, "two plain float tensors"), ("a", "b", "`variant2`")):
        options = DiffOptions(variant2=second and tmp_path / f"{second}.safetensors")
        paths = [str(tmp_path / f"{name}.safetensors") for name in ("base", variant)]
        found = []
        for device in (None, torch.device("cpu")):
            with open_diff(paths[0], paths[1], options) as pairing:
                assert said in on_the_cpu(options, pairing=pairing)
                extract(pairing, tmp_path / "out.safetensors", options, device=device, overwrite=True)
            found.append((tmp_path / "out.safetensors").read_bytes())
        assert found[0] == found[1]


def test_convolutions_are_decomposed_on_a_device_as_here(tmp_path: Path) -> None:
    change = conv_family(tmp_path)
    options = DiffOptions(dtype="fp32", rank=5)
    with open_diff(str(tmp_path / "base.safetensors"), str(tmp_path / "v.safetensors"), options) as pairing:
        extract(pairing, tmp_path / "out.safetensors", options, device=torch.device("cpu"))
    assert error(stored(tmp_path, f"{CONV}.weight"), change) < 1e-4
