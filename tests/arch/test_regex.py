"""``re:REGEX`` patterns: the answers are those of Python's re, in bounded time whatever the expression."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergetool.arch import recognise, select
from mergetool.checkpoint.dtypes import F32
from mergetool.checkpoint.header import TensorInfo
from mergetool.errors import PatternError

ATOMS = st.sampled_from(["a", "b", ".", r"\.", r"\d", r"\D", r"\w", r"\W", "[ab]", "[^a]", "[a-c0-1]", r"[^\d.]", "^"])
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,3}", "{2,}"])).map(
            lambda pair: f"({pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=5,
)


def selected(expression: str, *names: str) -> frozenset[str]:
    """The tensors of a model of ``names`` that ``re:expression`` selects; raises PatternError for none."""
    tensors = {name: TensorInfo(F32, (1,), 4 * i, 4 * i + 4) for i, name in enumerate(names)}
    (chosen,) = select([f"re:{expression}"], recognise(tensors, source="model")).values()
    return chosen


@settings(deadline=None, max_examples=200)
@given(EXPRESSIONS, st.text(st.sampled_from("ab0_"), min_size=1, max_size=6))
def test_answers_are_those_of_re(expression: str, name: str) -> None:
    names = (name, "other.weight")
    wanted = frozenset(one for one in names if re.fullmatch(expression, one))
    if wanted:
        assert selected(expression, *names) == wanted
    else:
        with pytest.raises(PatternError, match="matches no tensor"):
            selected(expression, *names)


@pytest.mark.parametrize("expression", ["(a+)+x", "(a|a)*x", "(.*)*x", ".*" * 240 + "x", "a?" * 200 + "a" * 90])
def test_expressions_that_would_hang_re_end(expression: str) -> None:
    with pytest.raises(PatternError, match="matches no tensor"):
        selected(expression, "a" * 60)


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("(a", "missing )"),
        ("a{99999}", "invalid repetition size"),
        ("((a{1,400}){1,400}){1,400}x", "invalid repetition size"),
        (r"(a)\1", r"invalid escape sequence: \1"),
        ("(?=a)b", "invalid perl operator: (?="),
        ("(?<!a)b", "invalid perl operator"),
        ("a*+b", "bad repetition operator"),
        ("a\ud800", "no text"),
    ],
)
def test_what_is_no_expression_is_refused_with_the_reason(expression: str, says: str) -> None:
    with pytest.raises(PatternError) as caught:
        selected(expression, "a")
    assert says in str(caught.value)
