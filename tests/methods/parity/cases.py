"""Every comparison, in the order of the table."""

from __future__ import annotations

from tests.methods.parity import cases_others, cases_sparse, cases_spherical
from tests.methods.parity.case import Case

CASES: list[Case] = sorted(
    [*cases_sparse.CASES, *cases_spherical.CASES, *cases_others.CASES], key=lambda case: case.method
)
