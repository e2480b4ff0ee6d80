"""The law: our verdict on a file is the safetensors library's, except where the corpus names a difference.

The library (Rust) shares no code with ours. When both accept, names, dtypes, shapes and bytes must be equal too.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergetool.checkpoint.dtypes import ALL, DType
from mergetool.checkpoint.header import MAX_HEADER, Header
from tests.checkpoint.header_corpus import DUPLICATE_NAME, METADATA, UNKNOWN_FIELD, file
from tests.checkpoint.header_mutants import CORPUS, by_library, by_us, verdicts_on_mutants


@pytest.mark.parametrize("case", CORPUS, ids=[case.name for case in CORPUS])
def test_verdict_is_the_library_s_except_where_meant(case: Any) -> None:
    expected = by_library(case.raw)
    if case.difference:
        assert expected is not None, "not a difference: the library refuses it too"
        expected = None
    assert by_us(case.raw) == expected


def test_the_corpus_covers_both_verdicts_and_all_differences() -> None:
    verdicts = Counter(by_library(case.raw) is not None for case in CORPUS)
    assert len(CORPUS) >= 300
    assert len({case.raw for case in CORPUS}) >= 300
    assert verdicts[True] >= 100
    assert verdicts[False] >= 200
    assert {case.difference for case in CORPUS} == {None, DUPLICATE_NAME, METADATA, UNKNOWN_FIELD}


def test_the_size_cap_is_the_library_s() -> None:
    largest = file(b"{}".ljust(MAX_HEADER))
    assert by_library(largest) == by_us(largest) == {}
    larger = file(b"{}".ljust(MAX_HEADER + 1))
    assert by_library(larger) is by_us(larger) is None


def test_50000_mutated_headers_are_judged_as_the_library_does() -> None:
    verdicts, unexplained = verdicts_on_mutants(50_000)
    assert not unexplained
    assert verdicts.total() == 50_000
    assert min(verdicts[kind] for kind in ("accepted", "refused", "meant")) > 100, verdicts


def test_the_mutants_would_expose_a_laxer_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proof that the test above can fail: reading -0 as Python does is seen."""
    monkeypatch.setattr("mergetool.checkpoint.strict_json._integer", int)
    _, unexplained = verdicts_on_mutants(50_000)
    assert unexplained


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
entries = st.dictionaries(
    names, st.tuples(st.sampled_from(ALL), st.lists(st.integers(0, 5), max_size=3).map(tuple)), max_size=8
).map(
    lambda tensors: [
        (name, dtype, shape if dtype.bits % 8 == 0 else (*shape, 4)) for name, (dtype, shape) in tensors.items()
    ]
)
metadata = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"]))
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(entries, metadata)
def test_what_we_encode_both_read_back(
    planned: list[tuple[str, DType, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    header = Header.plan(planned, metadata)
    raw = header.encode()
    data = random.Random(0).randbytes(header.data_size)
    assert Header.parse(raw, file_size=header.file_size, source="x") == header
    assert dict(header.metadata) == metadata
    assert {(name, info.dtype, info.shape) for name, info in header.tensors.items()} == set(planned)
    assert by_library(raw + data) == by_us(raw + data)
    assert len(raw) == header.data_start
    assert len(raw) % 64 == 0
    for info in header.tensors.values():
        assert info.begin % max(info.dtype.bits // 8, 1) == 0
