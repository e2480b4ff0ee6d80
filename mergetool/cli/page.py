"""The page of ``--help``: usage, purpose, arguments, options in sections, examples."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from typer.core import TyperCommand

from mergetool.cli.epilogs import fitted
from mergetool.options.table import SECTIONS, rows

NAMES_WIDTH = 26
"""Columns for the names of options, where a section has names as long; a longer one has a line to itself."""

_HYPHEN = "\N{NON-BREAKING HYPHEN}"

Records = Sequence[tuple[str, str]]


class PagedCommand(TyperCommand):
    """A command whose page has its options in the sections of the table of options."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """List the arguments and options that a command needs, then the word for the others."""
        arguments = [_argument(param) for param in self.params if param.param_type_name == "argument"]
        return [*filter(None, arguments), *_needed_options(self.callback), "[OPTIONS]"]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, then each section that has options."""
        params: list[Any] = self.get_params(ctx)
        arguments = [(_metavar(p), p.help) for p in params if p.param_type_name == "argument" and not p.hidden]
        lists = {"Arguments": arguments} | {section: [] for section in SECTIONS}
        sections = getattr(self.callback, "sections", {})
        for param in params:
            record = param.get_help_record(ctx) if param.param_type_name == "option" else None
            if record is not None:
                lists[sections.get(param.name) or "Screen"].append(record)
        for section, records in aligned(lists):
            with formatter.section(section):
                formatter.write_dl([(name, _unbroken(text)) for name, text in records], col_max=NAMES_WIDTH)
        formatter.buffer[:] = [piece.replace(_HYPHEN, "-") for piece in formatter.buffer]

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples and the text below them in lines as wide as the page."""
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(fitted(self.epilog or "", formatter.width - formatter.current_indent))


def aligned(lists: dict[str, Any]) -> Iterator[tuple[str, Records]]:
    """The lists that are not empty, their names padded to one width."""
    names = [len(name) for records in lists.values() for name, _ in records]
    width = min(max(names, default=0), NAMES_WIDTH)
    for section, records in lists.items():
        if records:
            yield section, [(name.ljust(width), text) for name, text in records]


def _unbroken(text: str) -> str:
    """``text`` that is not wrapped at a hyphen: ``--rank-thresh`` stays in one line."""
    return re.sub(r"(?<=\S)-(?=\w)|(?<!\S)--?(?=\w)", lambda match: _HYPHEN * len(match[0]), text)


def _metavar(param: Any) -> str:
    return str(param.metavar or param.name).removeprefix("[").removesuffix("]")


def _argument(param: Any) -> str:
    if param.hidden:
        return ""
    metavar = _metavar(param)
    return metavar if param.required else f"[{metavar}]"


def _needed_options(callback: Any) -> Iterator[str]:
    """Options without which the command does not run, with their values."""
    request = getattr(callback, "request", None)
    for row in rows(request).values() if request else ():
        if row.is_needed and not row.option.argument:
            yield f"{row.flag} {row.option.kind.metavar}"
