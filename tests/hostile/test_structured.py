"""The same promises as under the coverage-guided fuzzer, for inputs that hypothesis builds from each format's own grammar."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoint.header_corpus import file
from tests.hostile import targets

QUICK = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


class Drawn:
    """A target's choices from hypothesis."""

    def __init__(self, data: st.DataObject) -> None:
        self._data = data

    def number(self, most: int) -> int:
        return self._data.draw(st.integers(0, most))

    def text(self, most: int) -> str:
        return self._data.draw(st.text(max_size=most))

    def rest(self) -> bytes:
        return self._data.draw(st.binary(max_size=200))


@pytest.mark.parametrize("target", ["index", "lora", "quantisation"])
def test_files_of_pieces_of_all_dialects(target: str) -> None:
    with tempfile.TemporaryDirectory() as folder:

        @settings(QUICK, max_examples=120)
        @given(st.data())
        def judged(data: st.DataObject) -> None:
            assert targets.TARGETS[target](Drawn(data), Path(folder)) is None

        judged()


names = st.one_of(st.sampled_from(["a", "b", "__metadata__", "", "é", "\0", "dtype"]), st.text(max_size=6))
numbers = st.one_of(st.integers(-2, 20), st.sampled_from([2**32, 2**64 - 1, 2**64, -0.0, 1.0, True, None, "1", []]))
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(
            st.sampled_from(["F32", "U8", "F4", "BF16", "f32", None, {"F32": None}]), st.text(max_size=4)
        ),
        "shape": st.one_of(st.lists(numbers, max_size=3), st.none()),
        "data_offsets": st.one_of(st.lists(numbers, min_size=2, max_size=2), st.lists(numbers, max_size=3)),
        "extra": st.none(),
    },
)
tables = st.dictionaries(
    names, st.one_of(entries, st.dictionaries(names, st.one_of(st.text(max_size=3), numbers)), st.none()), max_size=4
)


@QUICK
@given(tables, st.integers(0, 24), st.booleans())
def test_headers_of_almost_right_entries(table: dict[str, object], data: int, ascii_only: bool) -> None:
    text = json.dumps(table, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    assert targets.header_fault(file(text, data)) is None


models = st.sampled_from(["a", "b", "lab.base", "'z-image'", "'x y.safetensors'", '"hf://org/repo"'])
factors = st.one_of(
    st.integers(-200, 200).map(str),
    st.floats(-1e4, 1e4, allow_nan=False).map(repr),
    st.sampled_from(["1/3", "1e-30", "2e5"]),
)
deltas = st.recursive(
    st.builds("({} - {})".format, models, models)
    | st.builds("lora({})".format, st.sampled_from(["'l.safetensors'", "'m'"])),
    lambda inner: st.one_of(
        st.builds("{} * {}".format, factors, inner),
        st.builds("({} + {})".format, inner, inner),
        st.builds("({} - {})".format, inner, inner),
        st.builds("-{}".format, inner),
        st.builds("task_arithmetic({}, {}, scale={})".format, inner, inner, factors),
        st.builds("ties({}, {}, density=0.{})".format, inner, inner, st.integers(1, 9)),
    ),
    max_leaves=6,
)
merges = st.one_of(
    st.builds("{} + {}".format, models, deltas),
    st.builds("slerp({}, {}, t={})".format, models, models, factors),
    st.builds("{0} * {2} + (1 - {0}) * {1}".format, factors, models, models),
    st.builds("{} + {} - {}".format, models, deltas, deltas),
)


@QUICK
@given(merges)
def test_expressions_of_the_grammar_read_again_as_the_same(text: str) -> None:
    assert targets.expression_fault(text) is None


texts = st.one_of(
    st.sampled_from(["a + 2*(b - c)", "bf16", "layers=1/2", "layers=1e-999999999", "../x", "hf://o/r"]),
    st.text(max_size=8),
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=2),
)
KEYS = [
    "expression",
    "protect",
    "include",
    "exclude",
    "set",
    "from",
    "dtype",
    "layout",
    "quant",
    "scale_search",
    "prefix",
    "rounding",
    "seed",
]
recipes = st.dictionaries(st.sampled_from(KEYS), st.one_of(texts, st.lists(texts, max_size=2), values), max_size=5)


@QUICK
@given(
    recipes.map(lambda recipe: {"expression": "a", **recipe}) | values,
    st.lists(st.fixed_dictionaries({"name": values, "fingerprint": texts}), max_size=3) | values,
)
def test_records_of_merges(recipe: object, inputs: object) -> None:
    assert targets.provenance_fault(json.dumps(recipe), json.dumps(inputs)) is None
