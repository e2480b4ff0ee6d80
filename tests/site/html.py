"""What a built page has: links, anchors, its words, and what a browser would fetch for it."""

from __future__ import annotations

from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
FETCHED = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "link": "href",
}


class Content(HTMLParser):
    """``links`` and ``words`` of the article, ``anchors`` of the page, each with the words from there on, and what is ``fetched``."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: dict[str, int] = {}
        self.fetched: list[str] = []
        self._words: list[str] = []
        self._inside = 0
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        """Collect; tags inside the article are counted to know where it ends."""
        given = {name: value or "" for name, value in attrs}
        if "id" in given:
            self.anchors[given["id"]] = len(self._words)
        if tag in FETCHED and FETCHED[tag] in given:
            self.fetched.append(given[FETCHED[tag]])
        if tag == "article" or self._inside:
            self._inside += tag not in VOID
            if tag == "a":
                self.links.append(given.get("href", ""))

    def handle_endtag(self, tag: str) -> None:
        """Leave what was entered."""
        if self._inside and tag not in VOID:
            self._inside -= 1

    def handle_data(self, data: str) -> None:
        """Words of the article."""
        if self._inside:
            self._words += data.split()

    def words(self, anchor: str = "", count: int = 10_000) -> str:
        """So many words from an anchor on, in small letters. KeyError for an anchor that the page has not."""
        start = self.anchors[anchor] if anchor else 0
        return " ".join(self._words[start : start + count]).lower()
