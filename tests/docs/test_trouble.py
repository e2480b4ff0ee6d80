"""docs/trouble.md quotes the program's sentences as the program prints them."""

from __future__ import annotations

import re
from pathlib import Path

import mergetool
from tests.docs.pages import ROOT
from tests.test_sentences import texts

PAGE = ROOT / "docs" / "trouble.md"
PACKAGE = Path(mergetool.__file__).parent


def quotations(text: str) -> list[str]:
    """The lines that the page quotes (``> ...``): pieces of sentences that no command of the page provokes."""
    return re.findall(r"^> (.+)$", text, re.MULTILINE)


def test_every_quoted_piece_of_a_sentence_stands_in_the_program() -> None:
    said = [text for module in PACKAGE.rglob("*.py") for _, text in texts(module)]
    missing = [piece for piece in quotations(PAGE.read_text("utf-8")) if not any(piece in text for text in said)]
    assert not missing


def test_there_is_something_to_hold() -> None:
    assert len(quotations(PAGE.read_text("utf-8"))) >= 5


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_symptom_in_the_list_leads_to_its_part() -> None:
    text = PAGE.read_text("utf-8")
    linked = set(re.findall(r"\(#([^)]+)\)", text))
    assert linked <= anchors(text)
