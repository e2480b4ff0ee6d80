"""Who loads a file: five releases of diffusers and ComfyUI are run on every spelling that is read and every format that is written."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from mergetool.adapters.loaders import Loading, loading
from mergetool.adapters.lora_file import open_lora
from tests.adapters.files import DORAS
from tests.adapters.matrix import COMFYUI, FAULT, LIMITS, PROGRAMS, Case, Matrix, agrees
from tests.adapters.spellings import DIM, Written, random
from tests.oracles import ComfyUI


def said(case: Case, program: str) -> Loading:
    """What is said of a program that loads a case's file."""
    with open_lora(case.path) as file:
        assert set(file.changes) >= set(case.changes)
        (found,) = (one for one in loading(file) if program in [f"{one.program} {release}" for release in one.releases])
    return found


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_changes_the_parts_that_are_said_and_no_other(matrix: Matrix, program: str) -> None:
    found, wrong = matrix.found(program), {}
    for case in matrix.cases.values():
        if case.name in DORAS or case.name.startswith(FAULT):
            continue
        loads = said(case, program)
        right = agrees(found[case.name].changes, case.changes, limit=LIMITS[program])
        expected = set(case.changes) - set(loads.dropped)
        if right != expected or (program != COMFYUI and (found[case.name].error is None) != (loads.error is None)):
            wrong[case.name] = (sorted(right ^ expected), found[case.name].error, loads.error)
    assert wrong == {}


@pytest.mark.parametrize("program", [program for program in PROGRAMS if program != COMFYUI])
@pytest.mark.parametrize("spelling", DORAS)
def test_diffusers_loses_the_magnitudes_that_are_said(matrix: Matrix, program: str, spelling: str) -> None:
    case, found = matrix.cases[spelling], matrix.found(program)[spelling]
    loads = said(case, program)
    assert (found.error is None) == (loads.error is None)
    kept = {f"{module}.weight" for module in found.magnitudes}
    lost = {part for part, reason in loads.dropped.items() if "magnitudes" in reason}
    assert lost == (set(found.changes) & set(case.changes)) - kept
    assert set(case.changes) - set(loads.dropped) <= kept


def test_pad_tokens_are_taken_by_comfyui_and_not_applied(tmp_path: Path, comfyui: ComfyUI, matrix: Matrix) -> None:
    written = Written({"diffusion_model.x_pad_token.diff": random(1, DIM, seed=1)}, {"x_pad_token": np.zeros((1, DIM))})
    path = written.save(tmp_path)
    with open_lora(path) as file:
        diffusers, program = loading(file)
    assert program.verdict == "not at all"
    assert "without being applied" in program.dropped["x_pad_token"]
    assert diffusers.error
    answer = comfyui.ask("patch", model=matrix.zeros, lora=path, out=tmp_path / "patched.safetensors")
    assert (answer["log"], answer["patched"]) == ([], ["diffusion_model.x_pad_token"])
    assert not load_file(tmp_path / "patched.safetensors")["x_pad_token"].any()


def test_of_another_family_nothing_is_said(tmp_path: Path) -> None:
    written = Written({f"unet.down.{x}.weight": random(4, 4, seed=1) for x in ("lora_A", "lora_B")})
    with open_lora(written.save(tmp_path)) as file:
        assert loading(file) == []


def test_the_words_are_those_of_the_command(tmp_path: Path) -> None:
    verdicts = partial(Loading, "x", ("1",), error=None)
    assert verdicts(2, {}).verdict == "whole"
    assert verdicts(1, {"a": "why"}).verdict == "partly"
    assert verdicts(0, {"a": "why"}).verdict == "not at all"
