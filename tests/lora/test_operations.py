"""The part of a LoRA that is orthogonal to another, what two have in common, and their scores, against dense float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mergetool.checkpoint import dtypes
from mergetool.errors import DataError
from mergetool.lora import operations
from mergetool.lora.combine import combine
from mergetool.lora.gathering import Gathering, gather, opened
from mergetool.lora.selection import Exact, Fixed
from tests.lora.test_combine import changes, close, saved

MODULE = "layers.1.attention.to_q"


@contextmanager
def gathered(one: Path, other: Path, strengths: tuple[int, int] = (1, 1)) -> Iterator[Gathering]:
    with opened([(str(one), Fraction(strengths[0])), (str(other), Fraction(strengths[1]))]) as terms:
        yield gather(terms)


def planted(path: Path, columns: list[int], scale: float = 1.0) -> np.ndarray:
    """A LoRA of one module with these of 64 fixed orthonormal directions, each as strong as its number; and its change."""
    rng = np.random.default_rng(5)
    left, right = (np.linalg.qr(rng.standard_normal((64, 64)))[0].astype("f4") for _ in range(2))
    up, down = left[:, columns] * (np.array(columns, "f4") + 1) * np.float32(scale), right[columns]
    name = f"diffusion_model.{MODULE}"
    save_file(
        {f"{name}.lora_A.weight": torch.from_numpy(down.copy()), f"{name}.lora_B.weight": torch.from_numpy(up.copy())},
        path,
    )
    return up.astype("f8") @ down.astype("f8")


@pytest.mark.parametrize("selection", [Exact(), Fixed(8)])
def test_the_orthogonal_part_has_no_component_along_the_other(selection: Exact | Fixed, tmp_path: Path) -> None:
    (one, first), (other, second) = saved("bare", tmp_path), saved("kohya fused", tmp_path)
    with gathered(one, other) as gathering:
        combine(operations.orthogonal(gathering), tmp_path / "o.safetensors", selection, dtype=dtypes.F32)
    found = changes(tmp_path / "o.safetensors")
    assert found.keys() == first.changes.keys()
    for part, change in first.changes.items():
        along = second.changes.get(part)
        if along is None:
            close(found[part], change, 1e-6)
            continue
        close(found[part], change - (change * along).sum() / (along * along).sum() * along, 1e-6)
        assert abs((found[part] * along).sum()) < 1e-6 * np.linalg.norm(found[part]) * np.linalg.norm(along)


def test_nothing_of_a_multiple_is_orthogonal_to_it(tmp_path: Path) -> None:
    (one, _), (other, _) = saved("bare", tmp_path), saved("PEFT folder", tmp_path)  # the same factors, other alphas
    with gathered(one, other) as gathering, pytest.raises(DataError, match="leaves nothing"):
        combine(operations.orthogonal(gathering), tmp_path / "o.safetensors", Exact(), command="orthogonal")


@pytest.mark.parametrize("selection", [Exact(), Fixed(2)])
def test_the_common_part_of_two_with_shared_and_private_directions_is_what_they_share(
    selection: Exact | Fixed, tmp_path: Path
) -> None:
    planted(tmp_path / "a.safetensors", [0, 1, 2, 3])
    planted(tmp_path / "b.safetensors", [2, 3, 8, 9])
    shared = planted(tmp_path / "shared.safetensors", [2, 3])
    with gathered(tmp_path / "a.safetensors", tmp_path / "b.safetensors") as gathering:
        chosen = operations.both(gathering)
        combine(chosen, tmp_path / "c.safetensors", selection, derive=operations.common(chosen))
    close(changes(tmp_path / "c.safetensors")[f"{MODULE}.weight"], shared, 1e-5)


def test_two_without_shared_directions_have_nothing_in_common(tmp_path: Path) -> None:
    planted(tmp_path / "a.safetensors", [0, 1])
    planted(tmp_path / "b.safetensors", [8, 9])
    with gathered(tmp_path / "a.safetensors", tmp_path / "b.safetensors") as gathering:
        chosen = operations.both(gathering)
        with pytest.raises(DataError, match="leaves nothing"):
            combine(chosen, tmp_path / "c.safetensors", Exact(), derive=operations.common(chosen))


def test_modules_of_only_one_lora_are_named_as_not_common(tmp_path: Path) -> None:
    (one, _), (other, _) = saved("bare", tmp_path), saved("kohya fused", tmp_path)
    with gathered(one, other) as gathering:
        chosen = operations.both(gathering)
        assert len(chosen.modules) == 4
        assert {name for name, reason, _ in chosen.left_out if reason == f"only in {one}"} == {
            "layers.1.feed_forward.w1.weight", "layers.1.feed_forward.w2.weight",
            "noise_refiner.0.attention.to_q.weight",
        }  # fmt: skip


def test_scores_are_those_of_dense_matrices(tmp_path: Path) -> None:
    (one, first), (other, second) = saved("bare", tmp_path), saved("kohya fused", tmp_path)
    with gathered(one, other) as gathering:
        found = {score.name: score for score in operations.scores(gathering, signs=True)}
    for part, change in first.changes.items():
        along = second.changes.get(part)
        score = found[part]
        assert score.energies[0] == pytest.approx((change**2).sum(), rel=1e-9)
        if along is None:
            assert (score.cosine, score.column_share, score.energies[1], score.opposing) == (0, 0, 0, 0)
            continue
        product = change * along
        assert score.cosine == pytest.approx(product.sum() / np.linalg.norm(change) / np.linalg.norm(along), abs=1e-9)
        rank = int((np.linalg.svd(along, compute_uv=False) > 1e-6).sum())
        left, _, right = np.linalg.svd(along)
        left, right = left[:, :rank], right[:rank]
        energy = (change**2).sum()
        assert score.column_share == pytest.approx(((left.T @ change) ** 2).sum() / energy, rel=1e-6)
        assert score.row_share == pytest.approx(((change @ right.T) ** 2).sum() / energy, rel=1e-6)
        assert score.both_share == pytest.approx(((left.T @ change @ right.T) ** 2).sum() / energy, rel=1e-6)
        assert score.opposing == pytest.approx(-product.clip(max=0).sum() / np.abs(product).sum(), rel=1e-6)


def test_a_group_scores_as_the_block_diagonal_matrix_of_its_modules(tmp_path: Path) -> None:
    (one, first), (other, second) = saved("bare", tmp_path), saved("kohya fused", tmp_path)
    with gathered(one, other) as gathering:
        found = operations.summed(operations.scores(gathering), "overall")
    inner = sum((first.changes[part] * change).sum() for part, change in second.changes.items())
    norms = [sum((change**2).sum() for change in written.changes.values()) for written in (first, second)]
    assert found.cosine == pytest.approx(inner / (norms[0] * norms[1]) ** 0.5, rel=1e-9)
    assert found.energies == pytest.approx(norms, rel=1e-9)
    assert found.opposing is None


def test_a_lokr_is_compared_by_the_directions_of_most_of_its_energy(tmp_path: Path) -> None:
    (one, _), (other, written) = saved("bare", tmp_path), saved("LoKr", tmp_path)
    part = "layers.1.feed_forward.w1.weight"
    with gathered(one, other) as gathering:
        (found,) = [score for score in operations.scores(gathering) if score.name == part]
    values = np.linalg.svd(written.changes[part], compute_uv=False)
    assert found.energies[1] == pytest.approx((values**2).sum(), rel=1e-6)
    assert 0 < found.both_share < 1
