"""Every comparison, in the order of the table."""

from __future__ import annotations

from tests.methods.parity import cases_sparse
from tests.methods.parity.case import Case

CASES: list[Case] = sorted([*cases_sparse.CASES], key=lambda case: case.method)
