"""Pages of docs/reference are what the code says now."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import mergetool
from tests.reference.pages import DOCS, made_pages, renewed


@pytest.mark.parametrize("page", made_pages())
def test_what_a_page_has_from_the_code_is_current(page: str) -> None:
    text = (DOCS / page).read_text("utf-8")
    assert text == renewed(page, text), "run: python -m tests.reference"


def variables() -> set[str]:
    """Names of environment variables, in the modules that read any."""
    texts = [path.read_text("utf-8") for path in Path(mergetool.__file__).parent.rglob("*.py")]
    return {name for text in texts if "os.environ" in text for name in re.findall(r'"([A-Z]+(?:_[A-Z]+)+)"', text)}


def test_every_environment_variable_is_on_its_page() -> None:
    page = (DOCS / "reference" / "environment.md").read_text("utf-8")
    assert "MERGETOOL_CONFIG_DIR" in variables()
    assert {name for name in variables() if f"`{name}`" not in page} == set()


def test_a_page_that_lost_its_table_is_told() -> None:
    with pytest.raises(ValueError, match=r"methods\.md has 0 places for the table methods"):
        renewed("reference/methods.md", "# Merge methods\n")
