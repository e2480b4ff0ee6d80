"""Distances between models are those numpy finds in float64 from the files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from mergetool import models
from mergetool.comparison import distances
from mergetool.comparison.energies import Distance, relative
from mergetool.recipe.steps import Input
from tests.families import checkpoint


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    for seed, name in enumerate(["out", "parent"]):
        checkpoint(tmp_path / f"{name}.safetensors", variant=seed)
    return tmp_path / "out.safetensors", tmp_path / "parent.safetensors"


def measured(out: Path, parent: Path) -> list[Distance]:
    with models.open_model(str(out)) as a, models.open_model(str(parent)) as b:
        return distances.measure(Input("out", a.checkpoint, a.anatomy), Input("parent", b.checkpoint, b.anatomy))


def test_norms_are_numpys(pair: tuple[Path, Path]) -> None:
    out, parent = ({name: tensor.double().numpy() for name, tensor in load_file(path).items()} for path in pair)
    found = {distance.name: distance for distance in measured(*pair)}
    whole = [name for name in found if name in out]
    assert whole
    for name in whole:
        assert found[name].energies.base ** 0.5 == pytest.approx(np.linalg.norm(parent[name]), rel=1e-6)
        assert found[name].energies.delta ** 0.5 == pytest.approx(np.linalg.norm(out[name] - parent[name]), rel=1e-6)
    total = sum(np.sum((out[n] - parent[n]) ** 2) for n in out) / sum(np.sum(parent[n] ** 2) for n in out)
    assert relative(list(found.values())) == pytest.approx(total**0.5, rel=1e-6)


def test_a_group_is_measured_alone(pair: tuple[Path, Path]) -> None:
    found = measured(*pair)
    refiner = relative(found, lambda d: "refiner" in d.groups)
    assert refiner > 0
    assert refiner == relative([d for d in found if "refiner" in d.name])


def test_a_model_is_at_distance_zero_from_itself(pair: tuple[Path, Path]) -> None:
    assert relative(measured(pair[0], pair[0])) == 0.0
