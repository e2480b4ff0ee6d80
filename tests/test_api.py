"""The Python API gives what the commands give, on the embedded models."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from mergetool import api
from mergetool.errors import MergetoolError, UsageError
from tests.cli.run import mergetool

BRIDGE = "lab.alkahest + 1.5*(lab.striped - lab.base)"


def test_a_merge_is_the_commands_bytes_and_says_what_was_done(tmp_path: Path) -> None:
    groups = {"layers": "linear(0.5,1)", "layers.0-1": 0.5, "v": Fraction(1, 3)}
    done = api.merge(BRIDGE, tmp_path / "api.safetensors", protect=["refiner"], multipliers=groups)
    settings = [word for group, value in groups.items() for word in ("--set", f"{group}={value}")]
    code = mergetool("merge", BRIDGE, "--protect", "refiner", *settings, "-o", "cli.safetensors", cwd=tmp_path).code
    assert code == 0
    assert done.output.read_bytes() == (tmp_path / "cli.safetensors").read_bytes()
    assert set(done.tensors) == {"merged", "protected: refiner"}
    assert done.outcome.movements.total.moved > 0


def test_progress_is_told_what_is_done_and_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    api.merge(BRIDGE, tmp_path / "out.safetensors", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_patterns_as_one_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r'\["refiner"\]'):
        api.merge(BRIDGE, tmp_path / "out.safetensors", protect="refiner")


def test_a_failed_merge_is_one_error_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(MergetoolError, match="no embedded model is named"):
        api.merge("lab.alkahest + (lab.stripes - lab.base)", tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_difference_is_the_commands_bytes(tmp_path: Path) -> None:
    found = api.diff("lab.base", "lab.striped", tmp_path / "api.safetensors", rank_thresh=0.9, exclude=["refiner"])
    options = ["--base", "lab.base", "--variant", "lab.striped", "--rank-thresh", "0.9", "--exclude", "refiner"]
    assert mergetool("diff", *options, "-o", "cli.safetensors", cwd=tmp_path).code == 0
    assert (tmp_path / "api.safetensors").read_bytes() == (tmp_path / "cli.safetensors").read_bytes()
    with safe_open(tmp_path / "api.safetensors", "np") as stored:
        ranks = [stored.get_slice(key).get_shape()[0] for key in stored.keys() if "lora_A" in key]  # noqa: SIM118
    assert sorted(layer.rank for layer in found.layers if layer.rank) == sorted(ranks)


def test_pictures_of_every_seed_and_strength_repeat(tmp_path: Path) -> None:
    def make() -> list[api.Picture]:
        return api.sample(
            "a blue circle on a gold background",
            base="lab.base",
            refiner="lab.turbo",
            steps=2,
            seeds=[1, 2],
            strength=[0.15, 0.4],
        )

    one, two = make(), make()
    assert [p.parameters["seed"] for p in one] == [1, 1, 2, 2]
    assert [p.parameters["second"]["strength"] for p in one] == [0.15, 0.4, 0.15, 0.4]
    assert one[0].image.size == (64, 64)
    for first, again in zip(one, two, strict=True):
        assert np.array_equal(np.asarray(first.image), np.asarray(again.image))


def test_verify_tells_a_sound_merge_from_a_damaged_one(tmp_path: Path) -> None:
    out = api.merge(BRIDGE, tmp_path / "out.safetensors").output
    assert api.verify(out, images=False).passed
    raw = bytearray(out.read_bytes())
    raw[-1] ^= 1
    out.write_bytes(raw)
    checked = api.verify(out, images=False)
    assert not checked.passed
    assert len(checked.weights.differing) == 1
    assert checked.left_out == "images=False"
