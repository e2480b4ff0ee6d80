"""``python -m tests.docs --renew [PAGE...]``: see the package."""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.docs.pages import Page, pages
from tests.docs.renewal import renew


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.docs", description="Write what commands print into the pages that show them."
    )
    parser.add_argument(
        "--renew",
        nargs="*",
        metavar="PAGE",
        type=Path,
        required=True,
        help="Markdown files [default: README and all of docs/]",
    )
    asked = parser.parse_args().renew
    wrong = [said for page in ([Page(path.resolve()) for path in asked] or pages()) for said in renew(page)]
    print("\n\n".join(wrong))
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
