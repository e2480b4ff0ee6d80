"""A newcomer's questions are answered in two clicks; the site is read and searched without a network."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from playwright.sync_api import Page

from tests.site.html import Content

WIDTHS = (390, 1280)
WIDEST = "Math.max(...[document.documentElement, ...document.querySelectorAll('.content')].map(one => one.scrollWidth))"


def target(page: str, link: str) -> str | None:
    """Page and anchor that a link of ``page`` leads to; None where it leads out of the site."""
    if re.match(r"[a-z]+:", link):
        return None
    path, _, anchor = link.partition("#")
    found = os.path.normpath(os.path.join(os.path.dirname(page), unquote(path))) if path else page
    return f"{found}#{anchor}" if anchor else found


def clicks(site: Path, start: str = "index.html", most: int = 2) -> dict[str, int]:
    """Everything that can be reached by so many links of articles, with their least number."""
    found, newest = {start: 0}, [start]
    for click in range(1, most + 1):
        pages = dict.fromkeys(page.partition("#")[0] for page in newest)
        links = [target(page, link) for page in pages if page.endswith(".html") for link in Content(site / page).links]
        newest = [link for link in dict.fromkeys(links) if link is not None and link not in found]
        found |= dict.fromkeys(newest, click)
    return found


def fetched(site: Path) -> list[str]:
    """What browsers fetch of every page and style sheet."""
    pages = [link for path in site.rglob("*.html") for link in Content(path).fetched]
    styles = [path.read_text("utf-8") for path in site.rglob("*.css")]
    found = [one for text in styles for one in re.findall(r"url\([\"']?([^\"')]+)|@import\s+[\"']([^\"']+)", text)]
    return pages + [link for one in found for link in one if link]


QUESTIONS = {
    "How do I add a style to Turbo?": ("how-to/add-a-style-to-turbo.html", "merge"),
    "Why is my picture black?": ("trouble.html#pictures-are-black", "fp16"),
    "My LoRA has no effect.": ("trouble.html#a-lora-has-no-effect", "lora inspect"),
    "Which multiplier?": ("tutorials/alkahest.html#choose-it-compare", "compare"),
    "It runs out of memory.": ("trouble.html#it-runs-out-of-memory", "--threads"),
    "How do I use it in ComfyUI?": ("how-to/use-it-in-comfyui.html", "diffusion_models"),
    "Can I sell or publish it?": ("tutorials/publish.html#the-licence", "licence"),
    "How do I make the LoRA smaller?": ("how-to/make-a-lora-smaller.html", "lora resize"),
    "FP8 or BF16?": ("tutorials/fp8-and-int8.html", "fp8-scaled"),
    "How do I undo it?": ("how-to/undo-a-merge.html", "cannot be undone"),
}
"""What a newcomer asks, where it is answered, and words of the answer."""


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_newcomer_finds_the_answer_in_two_clicks(site: Path, question: str) -> None:
    place, words = QUESTIONS[question]
    assert clicks(site)[place] in (1, 2)
    page, _, anchor = place.partition("#")
    assert words in Content(site / page).words(anchor, count=400)


def test_what_is_further_than_two_clicks_is_not_found(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"{i}.html").write_text(
            f'<nav><a href="9.html"></a></nav><article><a href="{i + 1}.html#x"></a></article>'
        )
    assert clicks(tmp_path, start="0.html") == {"0.html": 0, "1.html#x": 1, "2.html#x": 2}


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    links = fetched(site)
    assert len(links) > 100
    assert [link for link in links if re.match(r"(?:[a-z]+:)?//", link)] == []


@pytest.mark.parametrize("word", ["refiner", "black"])
def test_search_finds_words_from_a_file(site: Path, browser_page: Page, word: str) -> None:
    asked: list[str] = []
    browser_page.on("request", lambda request: asked.append(request.url))
    browser_page.goto(f"{(site / 'search.html').as_uri()}?q={word}")
    browser_page.wait_for_function("Search.status && /page/.test(Search.status.innerText)")
    results = browser_page.locator("#search-results li a")
    assert results.count() > 0
    results.first.click()
    assert word in browser_page.locator("article").inner_text().lower()
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}


@pytest.mark.parametrize("width", WIDTHS)
def test_no_page_is_wider_than_its_window(site: Path, browser_page: Page, width: int) -> None:
    """Tables and code that are too wide scroll by themselves."""
    browser_page.set_viewport_size({"width": width, "height": 844})
    widths = {}
    for path in sorted(site.rglob("*.html")):
        browser_page.goto(path.as_uri())
        widths[path.relative_to(site).as_posix()] = browser_page.evaluate(WIDEST)
    assert {name: found for name, found in widths.items() if found > width} == {}
