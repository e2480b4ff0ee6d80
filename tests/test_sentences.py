"""Sentences of the library say who does what; they name options in backquotes, since only the command line knows how those are typed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import mergetool
from mergetool.options.table import rows
from tests.faces.walk import operations

PACKAGE = Path(mergetool.__file__).parent

FLAG = re.compile(r"(?<![\w-])--[a-z]")


def texts(module: Path) -> Iterator[tuple[int, str]]:
    """Every text in a module, and the line it begins in; of one with values in it the pieces between them."""
    for node in ast.walk(ast.parse(module.read_text("utf-8"))):
        if isinstance(node, ast.JoinedStr):
            for piece, following in zip(node.values, [*node.values[1:], None], strict=True):
                if isinstance(piece, ast.Constant) and isinstance(following, ast.FormattedValue):
                    yield node.lineno, f"{piece.value}x"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def test_no_sentence_of_the_library_names_a_flag_of_the_command_line() -> None:
    modules = {module.relative_to(PACKAGE): module for module in sorted(PACKAGE.rglob("*.py"))}
    library = {
        place: module
        for place, module in modules.items()
        # packages.py writes commands of pip, whose options are pip's own.
        if place.parts[0] != "cli" and place.name not in ("__main__.py", "packages.py")
    }
    found = [
        f"{place}:{line}: {text.strip()[:100]}"
        for place, module in library.items()
        for line, text in texts(module)
        if FLAG.search(text)
    ]
    assert not found, "name the option in backquotes, as in `overwrite` or `device=cpu`:\n" + "\n".join(found)


RULES = {
    "begins without a subject": re.compile(r"^(?:what|whatever|of what|that which|which of|whose)\b", re.IGNORECASE),
    "has a clause in the place of a noun": re.compile(
        r"\b(?:of|to|for|with|from|by|in|is|are|and|beside|has|have|leave|leaves) what\b"
    ),
    "hides who does it": re.compile(
        r"\b(?:is|are|was|were|be|been|being) (?:said|told|named|looked at|meant|wanted|gone)\b"
    ),
    "ends in a verb that has lost its object": re.compile(r"\b(?:has|have) not(?=[.:;,]|$)"),
}
"""What makes a sentence hard to read for someone who meets it in a terminal."""

ERRORS = re.compile(r"(?:Error|Missing|Failed|Finding)$")

OTHER_ROOMS = {"arch", "adapters", "quant", "lab", "ops", "methods"}
"""Rooms whose sentences have not been through an editor."""


def sentences(module: Path) -> Iterator[tuple[int, str]]:
    """Every text that a module gives to an error or a finding, and its line; values in it are an x."""
    for call in ast.walk(ast.parse(module.read_text("utf-8"))):
        if isinstance(call, ast.Call) and ERRORS.search(ast.unparse(call.func)):
            for argument in call.args:
                yield from whole(argument)


def whole(node: ast.AST) -> Iterator[tuple[int, str]]:
    """The texts in an expression, each with its values as an x."""
    if isinstance(node, ast.JoinedStr):
        text = "".join(piece.value if isinstance(piece, ast.Constant) else "x" for piece in node.values)  # type: ignore[misc]
        yield node.lineno, text
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.lineno, node.value
    else:
        for child in ast.iter_child_nodes(node):
            yield from whole(child)


def broken(text: str) -> list[str]:
    """The rules that a sentence breaks."""
    return [rule for rule, pattern in RULES.items() if pattern.search(text)]


def test_every_error_says_who_does_what() -> None:
    found = [
        f"{module.relative_to(PACKAGE)}:{line}: {text[:100]} [{'; '.join(rules)}]"
        for module in sorted(PACKAGE.rglob("*.py"))
        if module.relative_to(PACKAGE).parts[0] not in OTHER_ROOMS
        for line, text in sentences(module)
        if (rules := broken(text))
    ]
    assert not found, "\n".join(found)


def test_every_option_says_what_it_does_in_a_sentence() -> None:
    helps = {row.option.help for operation in operations() for row in rows(operation.table).values()}
    found = [text for text in sorted(helps) if broken(text) or not text.endswith(".") or "what" in text.lower().split()]
    assert found == []


def test_every_option_is_in_a_section_and_no_argument_is() -> None:
    found = {
        row.option.argument == bool(row.option.section) for one in operations() for row in rows(one.table).values()
    }
    assert found == {False}


@pytest.mark.parametrize(
    "sentence",
    [
        "what is merged, and how, is said in r.yaml; leave that out.",
        "x is named; name another.",
        "there is more than one, and leave what is left alone.",
        "the output has x, and y has not: it is sampled as x is",
    ],
)
def test_a_sentence_without_a_subject_is_found(sentence: str) -> None:
    assert broken(sentence)
