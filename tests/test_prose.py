"""Pages are written by an editor: somebody does something, and no sentence hides who."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "ARCHITECTURE.md",
    ROOT / "CONTRIBUTING.md",
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in page.parts),
]

HIDDEN = re.compile(r"\b(?:is|are|was|were|be|been|being) (?:said|told|looked at|asked for)\b(?! to\b)[^.;:]{0,40}")
"""Passives behind which nobody stands: "which is said with its error". Hearsay, "is said to", is another thing."""


def prose(text: str) -> str:
    """A page without its code, its comments and what is in backquotes."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"<!--.*?-->|`[^`\n]*`", "", text, flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_says_who_does_what(page: Path) -> None:
    found = [" ".join(hidden.split()) for hidden in HIDDEN.findall(prose(page.read_text("utf-8")))]
    assert not found, f"say who does it in {page.relative_to(ROOT)}: {found}"


def test_a_hidden_doer_is_found() -> None:
    assert HIDDEN.findall("A scale is rounded once, which is said with its error.") == ["is said with its error"]


def test_hearsay_code_and_comments_are_left_alone() -> None:
    text = "It is said to be noise.\n```\nis said\n```\nThe word `is said` <!-- is told --> stands."
    assert HIDDEN.findall(prose(text)) == []
