"""Names in quotes: what stands there is the name, and what is written is read back."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mergetool.errors import ExpressionError
from mergetool.recipe.expression import parse
from mergetool.recipe.names import names_in
from mergetool.recipe.quotes import in_quotes, one_line, quote

NAMES = st.text(
    st.one_of(
        st.sampled_from("'\"\\"),
        st.sampled_from("“”„‘’«» \n\t.+-*()#{}é模🎨aA1_"),
        st.characters(exclude_categories=["Cs"]),
    ),
    min_size=1,
).filter(lambda name: name.strip() and "\0" not in name)


@example('Bob\'s "mix"', "'\"")
@given(NAMES, NAMES)
def test_a_name_that_is_written_is_read_back(one: str, other: str) -> None:
    text = f"{quote(one)} + 0.5*({quote(other)} - {quote(one)})" if one != other else quote(one)
    read = parse(text)
    assert set(read.models) == {one, other}
    assert parse(read.render({})).graph == read.graph


@given(NAMES, NAMES.filter(lambda name: name != "base"))
def test_a_lora_that_is_written_is_read_back(model: str, lora: str) -> None:
    if model == lora:
        return
    read = parse(f"{quote(model)} + lora({in_quotes(lora)})")
    assert read.loras == (lora,)
    assert parse(read.render({})).loras == (lora,)


@given(NAMES)
def test_the_names_of_a_recipe_have_their_places(name: str) -> None:
    text = f"  2*{in_quotes(name)} - {in_quotes(name)}"
    for found in names_in(text):
        assert (found.name, text[found.start : found.end]) == (name, in_quotes(name))
    assert len(names_in(text)) == 2


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (r"'models\x41.safetensors'", r"models\x41.safetensors"),
        (r"'models\turbo.safetensors'", r"models\turbo.safetensors"),
        (r"'C:\Users\me\new.safetensors'", r"C:\Users\me\new.safetensors"),
        (r"'C:\models\lora\'", "C:\\models\\lora\\"),
        ('"\\\\nas\\N{DASH}"', r"\\nas\N{DASH}"),
        ("'Bob''s mix'", "Bob's mix"),
        ('"Bob\'s mix"', "Bob's mix"),
        ("“a b”", "a b"),
        ("„a b“", "a b"),
        ("«a  b»", "a  b"),
        ("'a\n  b'", "a\n  b"),
        ("'a # b'", "a # b"),
        ("'''a'''", "'a'"),
    ],
)
def test_in_quotes_a_path_is_a_path(text: str, name: str) -> None:
    assert parse(text).models == (name,)


def test_a_path_that_ends_in_a_backslash_ends_there() -> None:
    read = parse(r"0.5*'C:\models\lora\' + 0.5*'D\mix.safetensors'")
    assert read.models == ("C:\\models\\lora\\", "D\\mix.safetensors")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("'a", "column 1: .*not closed"),
        ("0.5*“a + 0.5*b", "column 5: .*not closed"),
        ("'a' 'b'", "side by side"),
        ("r'a'", "letter before a quote"),
        ("b'a'", "letter before a quote"),
        ("''", "empty"),
    ],
)
def test_quotes_that_mean_nothing_are_refused(text: str, words: str) -> None:
    with pytest.raises(ExpressionError, match=words):
        parse(text)


def test_columns_are_those_of_the_text() -> None:
    with pytest.raises(ExpressionError, match=re.escape('column 6: "c**d"')):
        parse("'é' +c**d".replace("é", "e"))


@given(st.text("a'\" \n\t", max_size=20))
def test_one_line_moves_no_character(text: str) -> None:
    try:
        line = one_line(text)
    except ExpressionError:
        return
    assert len(line) == len(text)
    assert all(a == b or (b == " " and a.isspace()) for a, b in zip(text, line, strict=True))
