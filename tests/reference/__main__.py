"""Renew what docs/reference has from the code: ``python -m tests.reference``."""

from __future__ import annotations

from tests.reference.pages import DOCS, made_pages, renewed


def main() -> None:
    """Write the pages that are no longer true, and name them."""
    for page in made_pages():
        path = DOCS / page
        before = path.read_text("utf-8") if path.exists() else ""
        after = renewed(page, before)
        if after != before:
            path.write_text(after, "utf-8")
            print(f"docs/{page}: renewed")


if __name__ == "__main__":
    main()
