"""First sentences of docstrings are short, end, and have a subject or an imperative verb."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

import mergetool
import mergetool_kernels

PACKAGES = (Path(mergetool.__file__).parent, Path(mergetool_kernels.__file__).parent)

LONGEST = 90
"""Characters: what an editor or a page of reference shows of a docstring in one line."""

PHRASES = "What|Which|Who|Whose|Where|How|When|Why|That|Those|These"
PREPOSITIONS = "Of|By|For|From|In|On|At|With|Without|As|To|If|Into"

PATTERNS = {
    "begins with a clause or a preposition": re.compile(rf"^(?:{PHRASES}|{PREPOSITIONS})\b"),
    "has a clause in the place of a noun": re.compile(
        r"(?<!\bsay )(?<!\btell )(?<!\bshow )(?<!\bdecide )\bwhat(?:ever)?\b", re.IGNORECASE
    ),
    "hides who does it": re.compile(
        r"\b(?:is|are|was|were|be|been|being) (?:said|named|told|looked at|asked|meant|wanted|gone)\b"
    ),
    "does not end": re.compile(r"[^.?!]$"),
}
"""What makes a sentence bad. "Say what a file is" asks a question, and is fine; "what a file is" alone is no subject."""


def first_sentence(docstring: str) -> str:
    """The text up to the first point, question or exclamation mark before a space; at most a paragraph."""
    paragraph = " ".join(re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0].split())
    end = re.search(r"(?<!e\.g)(?<!i\.e)[.?!](?=\s|$)", paragraph)
    return paragraph[: end.end()] if end else paragraph


def misshapen(sentence: str) -> list[str]:
    """The rules that a sentence of any length breaks."""
    return [rule for rule, pattern in PATTERNS.items() if pattern.search(sentence)]


def faults(sentence: str) -> list[str]:
    """The rules that a first sentence breaks."""
    found = misshapen(sentence)
    return [*found, f"has {len(sentence)} characters"] if len(sentence) > LONGEST else found


def documented(node: ast.Module | ast.ClassDef, path: str) -> Iterator[tuple[str, str]]:
    """A module or a class and the public ones inside it, each with its docstring."""
    if docstring := ast.get_docstring(node):
        yield path, docstring
    for child in node.body:
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from documented(child, f"{path}:{child.name}")
        elif (
            isinstance(child, ast.FunctionDef)
            and not child.name.startswith("_")
            and (docstring := ast.get_docstring(child))
        ):
            yield f"{path}:{child.name}", docstring


def constants(module: ast.Module, path: str) -> Iterator[tuple[str, str]]:
    """Every string below an assignment, which says what was assigned."""
    for node in ast.walk(module):
        for statement, below in pairwise(
            getattr(node, "body", None) or [] if not isinstance(node, ast.Lambda | ast.IfExp) else []
        ):
            match statement, below:
                case ast.Assign() | ast.AnnAssign(), ast.Expr(value=ast.Constant(value=str(text))):
                    yield f"{path}:{below.lineno}", text


def modules(package: Path) -> list[Path]:
    return sorted(package.rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_every_first_sentence_is_one_that_an_editor_would_pass(package: Path) -> None:
    found = [
        f"{path}: {sentence} [{'; '.join(broken)}]"
        for module in modules(package)
        for path, docstring in documented(ast.parse(module.read_text("utf-8")), str(module.relative_to(package)))
        if (broken := faults(sentence := first_sentence(docstring)))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_a_constant_is_described_by_a_noun(package: Path) -> None:
    found = [
        f"{path}: {sentence} [{'; '.join(broken)}]"
        for module in modules(package)
        for path, text in constants(ast.parse(module.read_text("utf-8")), str(module.relative_to(package)))
        if (broken := misshapen(sentence := first_sentence(text)))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("sentence", "rule"),
    [
        ("What finds a step in other plans.", "begins with a clause or a preposition"),
        ("How far two models are apart.", "begins with a clause or a preposition"),
        ("Of a part the rows.", "begins with a clause or a preposition"),
        ("The rows and what they hold.", "has a clause in the place of a noun"),
        ("The rows that are looked at.", "hides who does it"),
        ("The rows", "does not end"),
        ("Count " + "the rows and " * 8 + "columns.", "has 118 characters"),
    ],
)
def test_a_bad_sentence_breaks_a_rule(sentence: str, rule: str) -> None:
    assert rule in faults(sentence)


@pytest.mark.parametrize(
    "sentence",
    [
        "Say what a file is.",
        "The outcome of a run beyond its output.",
        "Count the rows, e.g. of a table.",
        "Is it right?",
    ],
)
def test_a_plain_sentence_breaks_none(sentence: str) -> None:
    assert faults(sentence) == []


def test_the_first_sentence_is_that_of_the_first_paragraph() -> None:
    assert first_sentence("Count the rows\n    of `a.b`. None without.\n\n    Raises.") == "Count the rows of `a.b`."
