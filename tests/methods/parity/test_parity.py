"""Tensor by tensor: either equal to rounding, or different for the reason that is given."""

from __future__ import annotations

import pytest

from tests.methods.parity.case import Case
from tests.methods.parity.cases import CASES


@pytest.mark.parametrize("case", [case for case in CASES if not case.why], ids=lambda case: case.name)
def test_equal_to_rounding(case: Case) -> None:
    for shape in case.shapes:
        assert case.difference(shape) <= case.rounding, shape


@pytest.mark.parametrize("case", [case for case in CASES if case.why], ids=lambda case: case.name)
def test_what_is_explained_is_there(case: Case) -> None:
    for shape in case.shapes:
        assert case.difference(shape) > case.rounding, shape
