"""A recipe that is wrong is refused in one sentence that begins with the file, line and column of what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mergetool.errors import RecipeError
from mergetool.recipe import file
from mergetool.recipe.document import MAX_BYTES
from tests.patience import HANG
from tests.recipe.malformed import MALFORMED, MODELS

ROOT = Path(__file__).parents[2]


def test_there_are_200_and_each_is_wrong_in_its_own_way() -> None:
    assert len({name for name, _, _ in MALFORMED}) == len({text for _, text, _ in MALFORMED}) == len(MALFORMED) >= 200


@pytest.mark.parametrize(("name", "text", "words"), MALFORMED, ids=[name for name, _, _ in MALFORMED])
def test_a_malformed_recipe_is_an_error_at_its_place(name: str, text: str, words: str) -> None:
    text = MODELS + text[1:] if text.startswith("+") else text
    at = text.index("§")
    line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
    with pytest.raises(RecipeError) as caught:
        file.read(text.replace("§", "").encode(), Path("r.yaml"))
    sentence = str(caught.value)
    assert sentence.startswith(f"r.yaml:{line}:{column}: ")
    assert words in sentence
    assert len(sentence.splitlines()) == 1


@pytest.mark.parametrize(
    ("raw", "place", "words"),
    [
        (b"merge: a\n# caf\xe9", "2:6", "0xe9 is not UTF-8"),
        (b"\xff\xfem\0e\0r\0", "1:1", "0xff is not UTF-8"),
        (b"merge: \xed\xa0\x80", "1:8", "not UTF-8"),
        (b"\xef\xbb\xbf# a mark of byte order\n\xc0\xaf", "2:1", "not UTF-8"),
        (b"#" * (MAX_BYTES + 1), "1:1", f"the limit for a recipe is {MAX_BYTES}"),
        (b"\x89PNG\r\n\x1a\n", "1:1", "not UTF-8"),
    ],
)
def test_bytes_that_are_no_text_are_an_error_at_their_place(raw: bytes, place: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        file.read(raw, Path("r.yaml"))
    assert str(caught.value).startswith(f"r.yaml:{place}: ")
    assert words in str(caught.value)


def fuzzed(count: int, seed: int) -> dict[str, object]:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.recipe.fuzz", str(count), str(seed)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=4 * HANG,
    )
    return json.loads(ran.stdout)  # type: ignore[no-any-return]


@pytest.mark.first
def test_twenty_thousand_damaged_recipes_crash_nothing_and_touch_nothing() -> None:
    found = fuzzed(20_000, seed=1)
    assert found["crashes"] == []
    assert found["events"] == {}
    assert int(str(found["refused"])) > 10_000
    assert int(str(found["read"])) > 400
