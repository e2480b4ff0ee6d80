"""No file of one family is taken for another's: the tensors of every class, in both programs, shown to every recogniser."""

from __future__ import annotations

import pytest

from mergetool.arch.families import FAMILIES
from tests.arch.tables import table
from tests.oracles import ComfyUI
from tests.oracles.architectures import FAMILIES as CLASSES
from tests.oracles.architectures import LAYOUTS, layouts
from tests.oracles.families import CASES

KNOWN = {family.name for family in FAMILIES}
UNSHOWN = frozenset({"SDXL"})
"""Known by widths that the small class has not; tests/arch has their published ones."""
CALLED = {"SD3.5": "SD3"}
"""Classes that a family has under another name."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", CLASSES)
def test_a_model_of_every_class_is_shown_to_its_own_family_alone(comfyui: ComfyUI, family: str, layout: str) -> None:
    tensors = table(layouts(comfyui, family).of(layout))
    name = CALLED.get(family, family)
    expected = [name] if name in KNOWN - UNSHOWN else []
    assert [one.name for one in FAMILIES if one.shows(tensors)] == expected


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "size"), [(name, size) for name, case in CASES.items() for size in case.published])
def test_a_published_model_is_shown_to_its_own_family_alone(name: str, size: str, layout: str) -> None:
    case = CASES[name]
    tensors = table(case.shapes(layout, case.published[size]))
    assert [one.name for one in FAMILIES if one.shows(tensors)] == [name]
