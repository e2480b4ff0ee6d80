"""The text of a merge: what is read, what is refused, and the order of operations it stands for."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergetool.errors import ExpressionError
from mergetool.recipe.expression import MAX_TEXT, parse
from mergetool.recipe.graph import quote


def normal(text: str) -> str:
    return str(parse(text).graph)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("alkahest + 20 * (artshoot - 'z-image')", "alkahest + 20*(artshoot - 'z-image')"),
        ("alk + 171.1*(a - b) + 20*(c - d)", "alk + 171.1*(a - b) + 20*(c - d)"),
        ("a + 20*b - 20*c", "a + 20*(b - c)"),
        ("a + b - c", "a + (b - c)"),
        ("a - b + c", "(a - b) + c"),
        ("a - (b - c)", "a - (b - c)"),
        ("a + 2*3*(b - c)/4", "a + 1.5*(b - c)"),
        ("a + 2*(0.5*(b - c))", "a + (b - c)"),
        ("a/3 + b/3 + c/3", "1/3*a + 1/3*b + 1/3*c"),
        ("0.7*a + 0.3*b", "0.7*a + 0.3*b"),
        ("a + 0.5*a - 0.5*a", "a"),
        ("a + 20*(b - b)", "a"),
        ("a + -0.5*(b - c)", "a - 0.5*(b - c)"),
        ("lab.base + 2*(lab.tuned - lab.base)", "lab.base + 2*(lab.tuned - lab.base)"),
        ("'dir/x y.safetensors' + (b - c)", "'dir/x y.safetensors' + (b - c)"),
        ("+a + 1000*(b - c)", "a + 1000*(b - c)"),
    ],
)
def test_normal_form(text: str, expected: str) -> None:
    assert normal(text) == expected


@pytest.mark.parametrize(
    ("text", "anchors"),
    [
        ("alk + 20*(a - b)", ("alk",)),
        ("20*(a - b) + alk", ("alk",)),
        ("(a - b)*1.5 + alk", ("alk",)),
        ("20*a - 20*b + alk", ("alk",)),
        ("2*a - b", ("a",)),
        ("x - x + y", ("y",)),
        ("0*x + y", ("y",)),
        ("a + 0.5*(b - a)", ("a",)),
        ("20*(b - c) + (a + 0.5*d - 0.5*e)", ("a",)),
        ("slerp(a, b, t=0.5)", ("a",)),
        ("ties(a, b, base=c)", ("c",)),
        ("lora('x') + a", ("a",)),
        ("a + b - c", ("a", "b")),
        ("b + (a - c)", ("b",)),
        ("0.7*a + 0.3*b", ("a", "b")),
        ("0.5*(a + b)", ("a", "b")),
    ],
)
def test_the_anchor_is_the_model_whose_own_factor_is_1_wherever_it_stands(text: str, anchors: tuple[str, ...]) -> None:
    assert parse(text).anchors == anchors


def test_the_anchor_is_in_front_of_the_models() -> None:
    assert parse("20*(b - c) + a").models == ("a", "b", "c")


def test_an_expression_as_it_was_written_has_the_anchor_that_is_said() -> None:
    assert parse("20*(b - c) + a").as_written("b").anchor == "b"


def test_models_are_listed_once_each() -> None:
    assert parse("a + (b - c) + 2*(b - d)").models == ("a", "b", "c", "d")


def test_decimal_factors_are_exact() -> None:
    assert parse("a + 171.1*(b - c)").graph.coefficients()["b"] == Fraction(1711, 10)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a + b", ["adds two whole models", "0.5*a + 0.5*b", "a + (b - base)"]),
        ("a - b", ["difference of models", "degree 0", "mergetool diff"]),
        ("20*(a - b)", ["degree 0"]),
        ("0.7*a + 0.2*b", ["degree 0.9"]),
        ("a*b", ["multiplies two models"]),
        ("a/b", ["divides by a model"]),
        ("a/0", ["divides by zero"]),
        ("a + 1", ["adds a number"]),
        ("1 + 2", ["is a number"]),
        ("a**2", ["operator"]),
        ("a // 2", ["operator"]),
        ("a and b", ["not part of a merge expression"]),
        ("a[0]", ["not part"]),
        ("lambda: a", ["not part"]),
        ("(a := b)", ["not part"]),
        ("f'{a}'", ["letter before a quote"]),
        ("tiez(a - b)", ["no merge method", "tiez"]),
        ("__import__('os').system('true')", ["not a merge method"]),
        ("a + True*(b - c)", ["not a finite number"]),
        ("a + 1e999*(b - c)", ["not a finite number"]),
        ("a + 2j*(b - c)", ["not a finite number"]),
        ("a + 1e39*(b - c)", ["outside the range of float32"]),
        ("a + 1e-39*(b - c)", ["outside the range of float32"]),
        ("", ["empty"]),
        ("   ", ["empty"]),
        ("((a", ["cannot be read", "column"]),
        ("a +", ["cannot be read"]),
        ("a\0b", ["cannot be read"]),
        ("'' + (b - c)", ["empty"]),
        ("'a\0b' + (b - c)", ["NUL"]),
        ("a - a", ["cancels to nothing"]),
        ("a; b", ["cannot be read"]),
    ],
)
def test_refused(text: str, words: list[str]) -> None:
    with pytest.raises(ExpressionError) as caught:
        parse(text)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_an_unquoted_hyphenated_name_is_named_before_its_degree_looks_wrong() -> None:
    with pytest.raises(ExpressionError, match=r'no model named "z"\. "z-image" is a registered name: quote it'):
        parse("alkahest + 20 * (artshoot - z-image)", known=["alkahest", "artshoot", "z-image"])


def test_a_quoted_hyphenated_name_needs_no_advice() -> None:
    assert parse("a + 2*(b - 'z-image')", known=["a", "b", "z-image"]).models == ("a", "b", "z-image")


@pytest.mark.parametrize("text", ["(" * 5000 + "a" + ")" * 5000, "-" * 5000 + "a", "+".join(["a"] * 20_000)])
def test_size_and_depth_are_limited(text: str) -> None:
    with pytest.raises(ExpressionError):
        parse(text)


def test_a_text_past_the_limit_is_refused_unread() -> None:
    with pytest.raises(ExpressionError, match="limit"):
        parse("a" * (MAX_TEXT + 1))


def test_a_hundred_models_in_one_expression() -> None:
    text = "m0 + " + " + ".join(f"{i}*(m{i} - m0)" for i in range(1, 100))
    assert len(parse(text).models) == 100


def test_huge_exponents_cost_nothing() -> None:
    assert normal("a + 1e-999999999*(b - c)") == "a"
    with pytest.raises(ExpressionError):
        parse("a + 1e999999999*(b - c)")


NAMES = st.sampled_from(["a", "b2", "z-image", "lab.base", "x y", "it's", "hf://org/repo", "if", "é"])
FACTORS = st.fractions(min_value=-1000, max_value=1000, max_denominator=1000).filter(lambda f: f != 0)


@st.composite
def merges(draw: st.DrawFn) -> tuple[str, dict[str, Fraction]]:
    """A merge as text, and the exact factor of each model in it."""
    first = draw(NAMES)
    text, factors = quote(first), {first: Fraction(1)}
    for factor, x, y in draw(st.lists(st.tuples(FACTORS, NAMES, NAMES), max_size=4)):
        text += f" + ({factor.numerator}/{factor.denominator})*({quote(x)} - {quote(y)})"
        factors[x] = factors.get(x, Fraction(0)) + factor
        factors[y] = factors.get(y, Fraction(0)) - factor
    return text, factors


@given(merges())
def test_the_normal_form_reads_back_to_itself(merge: tuple[str, dict[str, Fraction]]) -> None:
    graph = parse(merge[0]).graph
    assert parse(str(graph)).graph == graph


@given(merges())
def test_the_normal_form_keeps_every_exact_factor(merge: tuple[str, dict[str, Fraction]]) -> None:
    text, factors = merge
    found = parse(text).graph.coefficients()
    assert {n: f for n, f in found.items() if f} == {n: f for n, f in factors.items() if f}


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused_with_one_sentence(text: str) -> None:
    assert "\n" not in _verdict(text)


def _verdict(text: str) -> str:
    try:
        return str(parse(text).graph)
    except ExpressionError as error:
        return str(error)
