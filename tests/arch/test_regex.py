"""Law: where Python's re gives an answer, Regex gives the same; where re would hang, Regex still answers."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergetool.arch.regex import Regex
from mergetool.errors import PatternError

ATOMS = st.sampled_from(
    [
        "a",
        "b",
        ".",
        r"\.",
        r"\d",
        r"\D",
        r"\w",
        r"\W",
        r"\s",
        r"\S",
        "[ab]",
        "[^a]",
        "[a-c0-1]",
        r"[^\d.]",
        "^",
        "$",
        r"\A",
        r"\Z",
    ]
)
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,3}", "{,2}", "{2,}"])).map(
            lambda pair: f"({pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=5,
)


@settings(deadline=None, max_examples=200)
@given(EXPRESSIONS, st.text(st.sampled_from("ab.0_ \n"), max_size=6))
def test_answers_are_those_of_re(expression: str, name: str) -> None:
    try:
        ours = Regex(expression)
    except PatternError as refused:
        assert "nested more than 3 deep" in str(refused)  # noqa: PT017
        return
    assert ours.fullmatch(name) == (re.fullmatch(expression, name) is not None)


@pytest.mark.parametrize(
    "expression",
    [
        "(a+)+x",
        "(a|a)*x",
        "(.*)*x",
        ".*" * 240 + "x",
        "a?" * 200 + "a" * 90,
        "(a?){2000000000}x",
        "((a{1,400}){1,400}){1,400}x",
    ],
)
def test_expressions_that_would_hang_re_end(expression: str) -> None:
    assert not Regex(expression).fullmatch("a" * 60)


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("(a", "not a regular expression: missing )"),
        ("a{99999999999}", "not a regular expression"),
        ("[[a]", "not a regular expression: Possible nested set"),
        ("(" * 5000 + ")" * 5000, "not a regular expression"),
        ("(" * 51 + ")" * 51, "groups more than 50"),
        (r"(a)\1", "groupref"),
        ("(?=a)b", "assert"),
        ("(?<!a)b", "assert not"),
        ("(?>a)b", "atomic group"),
        ("a*+b", "possessive repeat"),
        ("(?i)a", "an inline flag"),
        ("(?i:a)", "subpattern"),
        (r"a\bb", "a word boundary"),
        ("((((a*)*)*)*)", "repeats nested more than 3 deep"),
    ],
)
def test_what_cannot_be_matched_in_bounded_time_is_refused(expression: str, says: str) -> None:
    with pytest.raises(PatternError) as caught:
        Regex(expression)
    assert says in str(caught.value)
