"""The page of a comparison: whole in one file, true to the numbers, and safe with hostile names."""

from __future__ import annotations

import json
from dataclasses import replace
from html import unescape

import pytest

from mergetool.comparison import comparison as comparing
from mergetool.comparison import report
from mergetool.comparison.comparison import Report
from mergetool.comparison.lineage import Finding
from tests.verification.test_report import Page


@pytest.fixture(scope="module")
def found() -> Report:
    with comparing.open_comparison("lab.turbo", "lab.deturbo", reference="lab.hollow") as opened:
        return comparing.compare(opened)


def test_the_page_has_the_figures_and_needs_no_other_file(found: Report) -> None:
    page = Page(report.render(found))
    assert [address for address in page.addresses if not address.startswith(("#", "data:"))] == []
    assert page.tags.count("table") == 3
    assert page.tags.count("svg") == 1
    text = " ".join(page.texts)
    assert f"{100 * found.total.distance:.3g} %" in text
    assert f"{float(found.recommended or 0):g}" in page.texts
    assert "layers.5" in page.texts
    assert "refiner*" in page.texts
    assert "lab.turbo + (lab.deturbo - lab.turbo)" in page.texts


def test_the_record_in_the_page_is_the_json(found: Report) -> None:
    page = report.render(found)
    stored = json.loads(unescape(page[page.index("<pre>") + 5 : page.index("</pre>")]))
    assert stored == json.loads(json.dumps(report.record(found)))
    assert stored["total"]["multiplier_by_reference"] == found.total.to_reference
    assert stored["groups"]["refiner"]["excluded"] is True
    assert len(stored["parts"]) == 161


def test_names_cannot_become_markup(found: Report) -> None:
    hostile = "<script>alert(1)</script>"
    page = report.render(
        replace(
            found, variant=hostile, expression=hostile, lineage=(Finding("warn", hostile),), left_out=((hostile, "x"),)
        )
    )
    assert "<script" not in page
    assert "&lt;script&gt;" in page
