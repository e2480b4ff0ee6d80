"""docs/reference/exit-codes.md, from the tree of errors."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from mergetool import errors
from mergetool.errors import MergetoolError

HEAD = """\
# Exit codes and errors

A command ends with one of these numbers. A script can tell from the number what to do next; the sentence on the error stream is for people. Codes from 65 on are those of
BSD's `sysexits.h`.

In Python the same failures are exceptions. Each is a class of `mergetool.errors`, and all are a `MergetoolError`.

| code | exception | what it says |
|---:|---|---|
| 0 | | All was done. |"""


def lines() -> Iterator[str]:
    """The page."""
    yield from HEAD.splitlines()
    for code, name, text in sorted(_rows(), key=lambda row: row[0]):
        yield f"| {code} | `{name}` | {text} |"
    yield "| 130 | `KeyboardInterrupt` | The user stopped the run (Ctrl-C). |"
    yield from (
        "",
        "No error leaves half an output behind: a file or a folder is complete, or what was there before is untouched.",
    )


def _rows() -> Iterator[tuple[int, str, str]]:
    """Every class in the order of the module, which is that of the tree."""
    for name, one in vars(errors).items():
        if inspect.isclass(one) and issubclass(one, MergetoolError) and one is not MergetoolError:
            yield one.exit_code, name, " ".join((one.__doc__ or "").split()).replace("``", "`")
