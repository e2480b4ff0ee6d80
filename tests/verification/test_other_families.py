"""Merges of other families are judged by pictures that diffusers' pipelines draw, as `sample` draws them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

import mergetool
from mergetool.errors import FamilyError, UsageError
from mergetool.verification.checks import Verification
from tests import foreign_pipelines

pytestmark = [
    *(pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Future", "Deprecation")),
    pytest.mark.filterwarnings("ignore:.*pictures may turn to noise"),
]
PROMPT = "a knight"


@pytest.fixture(scope="module")
def merge(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("merge")
    folder = foreign_pipelines.flux(root / "folder")
    mergetool.convert(str(folder), root / "a.safetensors")
    mergetool.convert(str(foreign_pipelines.flux(root / "other", seed=5)), root / "b.safetensors")
    mergetool.merge(
        f"0.5*'{root / 'a.safetensors'}' + 0.5*'{root / 'b.safetensors'}'", root / "m.safetensors", layout="comfyui"
    )
    (root / "prompts.txt").write_text(PROMPT)
    return {name: root / f"{name}.safetensors" for name in "abm"} | {"folder": folder, "prompts": root / "prompts.txt"}


def verified(merge: Mapping[str, Path], **given: object) -> Verification:
    how = {"prompts": merge["prompts"], "seeds": 7, "size": (64, 64), "steps": 2, "images": True} | given
    return mergetool.verify(str(merge["m"]), pipeline=str(merge["folder"]), **how)


def test_the_pictures_of_merge_and_parents_are_those_of_sample(merge: Mapping[str, Path], tmp_path: Path) -> None:
    checked = verified(merge, report=tmp_path / "page.html")
    assert checked.weights.sound
    looked = checked.pictures
    assert looked is not None
    for column, model in zip(looked.columns, (merge["a"], merge["b"], merge["m"]), strict=True):
        (alone,) = mergetool.sample(
            PROMPT, base=str(model), pipeline=str(merge["folder"]), seeds=7, size=(64, 64), steps=2
        )
        assert np.array_equal(column.pictures[0], np.asarray(alone.image)), column.label
    assert {verdict.name for verdict in looked.verdicts} == {"noise", "collapsed", "unlike", "prompts"}
    assert any(note.startswith("drift is not judged") for note in looked.look.notes)
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "2 steps at guidance 3.5" in page
    assert "drift is not judged" in page


def test_turbo_is_the_second_stage_of_another_family_and_drift_is_judged(merge: Mapping[str, Path]) -> None:
    looked = verified(merge, refiner="lab.turbo", refine_steps=1).pictures
    assert looked is not None
    (alone,) = mergetool.sample(
        PROMPT,
        base=str(merge["m"]),
        pipeline=str(merge["folder"]),
        refiner="lab.turbo",
        seeds=7,
        size=(64, 64),
        steps=2,
        refine_steps=1,
        strength=0.5,
    )
    assert np.array_equal(looked.columns[-1].pictures[0], np.asarray(alone.image))
    assert "drift" in {verdict.name for verdict in looked.verdicts}


def test_a_folder_of_another_family_is_refused(merge: Mapping[str, Path], tmp_path: Path) -> None:
    other = foreign_pipelines.chroma(tmp_path / "chroma")
    with pytest.raises(FamilyError, match="that its architecture needs"):
        mergetool.verify(str(merge["m"]), pipeline=str(other), images=True, prompts=merge["prompts"])


def test_a_refiner_alone_cannot_be_judged_by_its_pictures(merge: Mapping[str, Path], tmp_path: Path) -> None:
    base = foreign_pipelines.sdxl(tmp_path / "base")
    refiner = foreign_pipelines.sdxl_refiner(tmp_path / "refiner", base)
    with pytest.raises(UsageError, match="draws from pictures alone"):
        mergetool.verify(str(refiner), images=True)
