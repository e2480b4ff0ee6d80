"""Every page's commands run, and print what the page shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.pages import Page, pages
from tests.docs.running import picture_fault, run


@pytest.mark.first
@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_a_page_shows_what_its_commands_print(page: Page, tmp_path: Path) -> None:
    wrong = [*page.faults(), *filter(None, (ran.fault(page) for ran in run(page, tmp_path)))]
    wrong += filter(None, (picture_fault(picture, tmp_path) for picture in page.pictures))
    assert not wrong, "\n\n".join([*wrong, f"renew it: python -m tests.docs --renew {page.name}"])
