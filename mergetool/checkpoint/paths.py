"""Read a path that a person typed or copied."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

QUOTES = {'"': '"', "'": "'", "“": "”", "”": "”", "„": "“", "‘": "’", "’": "’", "‚": "‘", "«": "»", "»": "«", "‹": "›"}
"""Every opening quotation mark and its closing one: those of keyboards, word processors and web pages."""


def typed(text: str) -> str:
    """The path that ``text`` means, whether it exists or not.

    A pair of quotation marks around it is taken off, which Explorer's "Copy as path" puts there; ``file://`` addresses become paths;
    ``~`` and ``~name`` become home folders. A backslash is a backslash.
    """
    text = without_quotes(text)
    if text[:7].lower() == "file://":
        parts = urlsplit(text)
        host = "" if parts.netloc in ("", "localhost") else f"//{parts.netloc}"
        from urllib.request import url2pathname  # brings http and email: 14 ms of every start

        text = url2pathname(host + parts.path)
    return os.path.expanduser(text)


def without_quotes(text: str) -> str:
    """Remove blanks and one pair of quotation marks around ``text``."""
    inner = text.strip()
    if len(inner) > 2 and QUOTES.get(inner[0]) == inner[-1]:
        return inner[1:-1]
    return inner
