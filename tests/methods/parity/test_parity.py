"""Tensor by tensor: either equal to rounding, or different for the reason that is given."""

from __future__ import annotations

import re
from fnmatch import fnmatch

import pytest
from mergekit.merge_methods.registry import registered_methods
from sd_mecha.extensions.merge_methods import get_all

from tests.methods.parity.absent import ABSENT
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


@pytest.mark.parametrize("peer", ["mergekit", "sd-mecha"])
def test_every_method_of_a_peer_is_compared_or_said_to_be_absent(peer: str) -> None:
    registered = [method.spec.name for method in registered_methods()]
    if peer == "sd-mecha":
        registered = [method.identifier for method in get_all()]
    texts = [case.theirs.text for case in CASES if case.theirs.peer == peer]
    compared = {name for text in texts for name in re.findall(r"(\w+)\(", text)}
    left = {name for name in registered if name not in compared}
    assert {name for name in left if not any(fnmatch(name, pattern) for pattern in ABSENT[peer])} == set()
    assert {pattern for pattern in ABSENT[peer] if not any(fnmatch(name, pattern) for name in left)} == set()
