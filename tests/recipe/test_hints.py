"""Slips in expressions: the error offers the line that was meant, and that line is read."""

from __future__ import annotations

import re

import pytest

from mergetool.errors import ExpressionError
from mergetool.recipe.expression import parse


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("base + 0.5*(a b.safetensors - base)", "base + 0.5*('a b.safetensors' - base)"),
        ("a b.safetensors", "'a b.safetensors'"),
        ("./b.safetensors", "'./b.safetensors'"),
        (r"C:\models\a.safetensors + 0.5*(b - c)", r"'C:\models\a.safetensors' + 0.5*(b - c)"),
        ("0,5*a + 0,5*b", "0.5*a + 0.5*b"),
        ("a + 0,5*'x, y.safetensors' - 0,5*c", "a + 0.5*'x, y.safetensors' - 0.5*c"),
        ("ties(a - b, c - b, density=0,2) + b", "ties(a - b, c - b, density=0.2) + b"),
        ("a + 30%*(b - c)", "a + 0.3*(b - c)"),
        ("30% a + 70% b", "0.3*a + 0.7*b"),
        ("12.5% of a + 87,5 % of b", "0.125*a + 0.875*b"),
        ("a + 2 (b - c)", "a + 2*(b - c)"),
        ("a + 0.5x(b - c)", "a + 0.5*(b - c)"),
        ("a + 20 × (b - c)", "a + 20*(b - c)"),
        ("a + 1e-3(b - c)", "a + 1e-3*(b - c)"),
        ("0,5 ~/my models/x-1.safetensors + 50% b", "0.5*'~/my models/x-1.safetensors' + 0.5*b"),
    ],
)
def test_a_slip_is_answered_with_the_line_that_works(text: str, meant: str) -> None:
    assert parse(meant)
    with pytest.raises(ExpressionError) as error:
        parse(text)
    offered = re.search(r'; write "(.*)"\.$', str(error.value))
    assert offered is not None, str(error.value)
    assert offered[1] == meant
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["a +", "a * b", "a + b", "a - b", "z-image", "a + 2", "a ** b", "a, b", "%", "'a"])
def test_what_is_no_slip_keeps_its_own_error(text: str) -> None:
    with pytest.raises(ExpressionError) as error:
        parse(text)
    assert "; write " not in str(error.value)


@pytest.mark.parametrize(
    "text", ["0.5 \ue000 + 0,5*b", "1e9999999% a + b", "1e-9999999% a + b", "1e9999999999999999999999999% a + b"]
)
def test_text_that_no_one_types_is_refused_at_once(text: str) -> None:
    with pytest.raises(ExpressionError) as error:
        parse(text)
    assert "; write " not in str(error.value)


@pytest.mark.parametrize(
    "text", ["base + 0.5*'x.safetensors'", "base + x.safetensors", "base + 2*(a - b) + x.safetensors"]
)
def test_a_file_too_much_may_be_a_lora(text: str) -> None:
    with pytest.raises(ExpressionError, match=r"If x.safetensors is a LoRA, write lora\(x.safetensors\)\."):
        parse(text)
