"""Method calls in expressions: what is read, what is refused where, and that the text of a call reads back to it."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from mergetool import methods
from mergetool.errors import ExpressionError
from mergetool.recipe.expression import Expression, parse
from mergetool.recipe.graph import Call, quote


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("slerp(a, b)", "slerp(a, b)"),
        ("slerp( a , 0.5*b + 0.5*c, t = 1/4 )", "slerp(a, 0.5*b + 0.5*c, t=0.25)"),
        ("slerp(a, b, sizes='line', t=-0.1)", "slerp(a, b, t=-0.1, sizes='line')"),
        ("ties(a, b, base=c, normalize=False)", "c + ties(a - c, b - c, normalize=False)"),
        ("c + ties(a - c, b - c)", "c + ties(a - c, b - c)"),
        ("c + 20*slerp(a - c, b - c)", "c + 20*slerp(a - c, b - c)"),
        ("karcher(a, b, weights=(1, 2/3))", "karcher(a, b, weights=[1, 2/3])"),
        ("slerp(slerp(a, b), ties(c, base=a))", "slerp(slerp(a, b), a + ties(c - a))"),
        ("weighted_sum(a, b, alpha=0.3)", "0.7*a + 0.3*b"),
        ("weighted_sum(a, b, alpha=0)", "a"),
        ("linear(a, b, c)", "1/3*a + 1/3*b + 1/3*c"),
        ("add_difference(a, b, c, alpha=20)", "a + 20*(b - c)"),
        ("task_arithmetic(a, b, base=c, weights=[2, 1])", "c + 2*(a - c) + (b - c)"),
        ("a + 2*linear(b - c, d - c)", "a + 2*(0.5*(b - c) + 0.5*(d - c))"),
        ("slerp(a, b) + 2*(slerp(a, b) - slerp(a, b))", "slerp(a, b)"),
    ],
)
def test_normal_form(text: str, expected: str) -> None:
    assert str(parse(text).graph) == expected


def test_parameters_are_exact_fractions() -> None:
    (call,) = parse("slerp(a, b, t=0.1)").graph.calls()
    assert call == Call("slerp", call.arguments, (("t", Fraction(1, 10)),), Fraction(1))


@pytest.mark.parametrize(
    ("text", "column", "words"),
    [
        ("a + (slep(b, c) - d)", 6, 'no merge method "slep" is registered; did you mean "slerp"?'),
        ("a + (qwertz(b, c) - d)", 6, "`mergetool methods` lists them."),
        ("slerp(a)", 1, "slerp takes 2 arguments, not 1: slerp(x1, x2, t=0.5"),
        ("0.5*a + 0.5*clamp(a, b)", 13, "clamp takes 3 to 64 arguments, not 2"),
        (f"karcher({', '.join(['a'] * 65)})", 1, "karcher takes 1 to 64 arguments, not 65"),
        ("slerp(a, *b)", 10, "no * arguments"),
        ("slerp(a, **b)", 10, "no ** arguments"),
        ("slerp(a, 2*3)", 10, "slerp takes models, not the number 6; parameters are given by name"),
        ("slerp(a, b - b)", 10, "an argument of slerp cancels to nothing"),
        ("slerp(a, b - c)", 10, "not some of each: a has degree 1, and b - c has degree 0"),
        ("slerp(a, 2*b)", 10, "slerp takes models or differences of models, and 2*b has degree 2"),
        ("train_difference(a, b - c, d)", 21, "train_difference takes models, and b - c has degree 0"),
        ("ties(a - b, c)", 13, "ties takes differences of models, and c has degree 1; write x - y, or give base=y"),
        ("ties(a - b, base=b)", 6, "with base= the arguments of ties are models, and a - b has degree 0"),
        ("ties(a, base=b - c)", 14, "the base of ties must be a model"),
        ("ties(a, base=2)", 14, "ties takes models, not the number 2"),
        ("ties(b, a, base=b)", 6, "b is both an argument and the base of ties"),
        ("ties(a, base=b, base=c)", 17, "ties is given base twice"),
        ("slerp(a, b, base=c)", 13, 'slerp has no parameter "base"; it has: t, sizes.'),
        ("arcee_fusion(a, b, t=1)", 20, 'arcee_fusion has no parameter "t"; it has: none.'),
        ("slerp(a, b, t=1, t=2)", 18, "slerp is given t twice"),
        ("slerp(a, b, t=c)", 15, "t of slerp must be a number, not c"),
        ("slerp(a, b, t='0.5')", 15, "t of slerp must be a number, not '0.5'"),
        ("slerp(a, b, t=True)", 15, "t of slerp must be a number, not True"),
        ("slerp(a, b, t=1e300*1e300)", 15, "t of slerp must be a number"),
        ("slerp(a, b, t=1/0)", 15, "divides by zero"),
        ("crossover(a, b, alpha=1.01)", 23, "alpha of crossover must be a number from 0 to 1, not 1.01"),
        ("nearswap(a, b, t=-0.1)", 18, "t of nearswap must be a number from 0, not -0.1"),
        ("karcher(a, b, iterations=1.5)", 26, "iterations of karcher must be a whole number from 0 to 10000"),
        ("karcher(a, b, weights=[1])", 23, "weights of karcher must be a list of numbers, one an argument"),
        ("karcher(a, b, weights=[1, True])", 23, "must be a list of numbers"),
        ("karcher(a, b, weights=[1, [2]])", 23, "must be a list of numbers"),
        ("karcher(a, b, weights=1)", 23, "must be a list of numbers"),
        ("linear(a, b, normalize=1)", 24, "normalize of linear must be True or False, not 1"),
        ("linear(a, b, weights=[1, -1])", 1, "weights that add up to 0 cannot be normalized"),
        ("slerp(a, b, sizes='x')", 19, "sizes of slerp must be 'arc' or 'line', not 'x'"),
        ("slerp(a, b, sizes=line)", 19, "sizes of slerp must be 'arc' or 'line', not line"),
    ],
)
def test_refused_with_the_column(text: str, column: int, words: str) -> None:
    with pytest.raises(ExpressionError) as caught:
        parse(text)
    assert str(caught.value).startswith(f"column {column}: "), caught.value
    assert words in str(caught.value)


METHODS = list(methods.methods().values())
NUMBERS = st.fractions(min_value=-3, max_value=3, max_denominator=200)
MODELS = st.sampled_from(["a", "b2", "z-image", "lab.base", "it's", "é"])


def rendered(value: Fraction) -> str:
    return f"{value.numerator}/{value.denominator}"


@st.composite
def parameters(draw: st.DrawFn, method: methods.Method, count: int) -> list[str]:
    given = []
    for parameter in draw(st.permutations(method.parameters)):
        if draw(st.booleans()):
            continue
        if parameter.kind is bool:
            value = str(draw(st.booleans()))
        elif parameter.kind is str:
            value = repr(draw(st.sampled_from(parameter.choices)))
        elif parameter.kind is tuple:
            value = f"[{', '.join(rendered(draw(NUMBERS)) for _ in range(count))}]"
        else:
            low, high = max(parameter.low, -2), min(parameter.high, 9)
            number = draw(st.integers(int(low), int(high)))
            value = str(number) if parameter.kind is int else rendered(Fraction(number))
        given.append(f"{parameter.name}={value}")
    return given


@st.composite
def models(draw: st.DrawFn, depth: int) -> str:
    """A model as text: named, moved by a difference, or by a method."""
    if depth == 0 or draw(st.booleans()):
        return quote(draw(MODELS))
    if draw(st.booleans()):
        return f"{draw(models(depth - 1))} + ({rendered(draw(NUMBERS))})*({draw(deltas(depth - 1))})"
    return draw(calls(depth, "models"))


@st.composite
def deltas(draw: st.DrawFn, depth: int) -> str:
    """A difference of models as text."""
    if depth > 0 and draw(st.booleans()):
        return draw(calls(depth, "deltas"))
    first, second = draw(st.permutations(["a", "b2", "z-image", "lab.base"]))[:2]
    return f"{quote(first)} - {quote(second)}"


@st.composite
def calls(draw: st.DrawFn, depth: int, kind: str) -> str:
    method = draw(st.sampled_from([each for each in METHODS if each.takes in (kind, "any")]))
    count = draw(st.integers(method.least, min(method.most or 4, 4)))
    argument = models(depth - 1) if kind == "models" else deltas(depth - 1)
    return f"{method.name}({', '.join([*(draw(argument) for _ in range(count)), *draw(parameters(method, count))])})"


def parse_or_reject(text: str) -> Expression:
    """The expression; what a sum or its weights cancel in is no example."""
    try:
        return parse(text)
    except ExpressionError as error:
        if not any(
            words in str(error)
            for words in ("cancels to nothing", "add up to 0", "outside the range of float32", "degree")
        ):
            raise
        reject()


@settings(max_examples=100, deadline=None)
@given(models(depth=2))
def test_a_call_reads_back_from_its_text(text: str) -> None:
    expression = parse_or_reject(text)
    again = parse(expression.render({}))
    assert again.graph == expression.graph
    assert again.render({}) == expression.render({})
