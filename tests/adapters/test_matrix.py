"""What is written loads everywhere at the right scale: every format, in five releases of diffusers and in ComfyUI."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mergetool.adapters.formats import KEY_FORMATS, KeyFormat
from tests.adapters.matrix import COMFYUI, FAULT, LIMITS, PROGRAMS, SOURCES, Case, Changes, Matrix, agrees

DIALECTS = Path("docs/reference/lora-dialects.md")
EXACT = 2.0**-20
"""Of a change's largest value: float32 products of at most 16 terms, and one rounding for a scale."""


def of(matrix: Matrix, key_format: KeyFormat, *, exact: bool = True) -> list[Case]:
    """The sources in a format; with ``exact`` those whose factors are float32."""
    wanted = [source for source in SOURCES if not (exact and "bf16" in source)]
    return [matrix.cases[f"{key_format}: {source}"] for source in wanted]


def wrong(found: Changes, case: Case, limit: float) -> set[str]:
    return set(case.changes) - agrees(found, case.changes, limit=limit)


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_default_loads_whole_everywhere_at_the_right_scale(matrix: Matrix, program: str) -> None:
    found = matrix.found(program)
    assert {case.name: wrong(found[case.name].changes, case, EXACT) for case in of(matrix, "default")} == {
        case.name: set() for case in of(matrix, "default")
    }


@pytest.mark.parametrize("program", PROGRAMS)
def test_whatever_a_lora_was_spelled_like_the_default_loads_whole(matrix: Matrix, program: str) -> None:
    found = matrix.found(program)
    others = [case for case in matrix.cases.values() if case.key_format == "default" and case.size == "tiny"]
    assert len(others) > 20
    for case in others:
        if program == COMFYUI or not any(kind in case.source for kind in ("LoKr", "LyCORIS", "LoHa")):
            assert wrong(found[case.name].changes, case, LIMITS[program]) == set(), case.name


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_diffusers_format_loads_whole_everywhere_at_the_right_scale(matrix: Matrix, program: str) -> None:
    for case in of(matrix, "diffusers"):
        assert wrong(matrix.found(program)[case.name].changes, case, EXACT) == set(), case.name


def test_the_comfyui_format_is_added_whole_by_comfyui(matrix: Matrix) -> None:
    for case in of(matrix, "comfyui", exact=False):
        assert wrong(matrix.found(COMFYUI)[case.name].changes, case, LIMITS[COMFYUI]) == set(), case.name


@pytest.mark.parametrize("program", ["diffusers 0.39", "diffusers 0.40", "diffusers 0.42.1"])
def test_the_kohya_format_loads_whole_in_diffusers_since_0_39(matrix: Matrix, program: str) -> None:
    for case in of(matrix, "kohya"):
        assert wrong(matrix.found(program)[case.name].changes, case, EXACT) == set(), case.name


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_table_of_the_documentation_is_what_was_found(matrix: Matrix, program: str) -> None:
    rows = [line.strip("|").split("|") for line in DIALECTS.read_text().splitlines() if line.startswith("|")]
    heads = next(row for row in rows if len(row) == 7)
    column = [head.strip() for head in heads].index(program)
    told = {row[0].strip(" `"): int(row[column]) for row in rows if len(row) == 7 and row[column].strip().isdigit()}
    cases = {key_format: matrix.cases[f"{key_format}: mixed ranks, alpha"] for key_format in KEY_FORMATS}
    found = matrix.found(program)
    assert told == {
        name: len(agrees(found[case.name].changes, case.changes, limit=EXACT)) for name, case in cases.items()
    }


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    ("fault", "parts"), [("a wrong scale", "q"), ("q, k and v swapped", "qkv"), ("a renamed module", "q")]
)
def test_a_file_that_is_wrong_on_purpose_is_told(matrix: Matrix, program: str, fault: str, parts: str) -> None:
    case = matrix.cases[FAULT + fault]
    found = wrong(matrix.found(program)[case.name].changes, case, EXACT)
    assert found == {f"layers.0.attention.to_{letter}.weight" for letter in parts}


def test_the_sources_change_every_linear_layer(matrix: Matrix) -> None:
    cases = [case for case in matrix.cases.values() if case.source in SOURCES]
    assert {len(case.changes) for case in cases} == {84}
    assert all(np.linalg.matrix_rank(change) > 1 for change in cases[0].changes.values())
