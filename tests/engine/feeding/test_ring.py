"""The page-locked buffer that a GPU's operands are read into: regions that never overlap, and none that is lost."""

from __future__ import annotations

import threading
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergetool.engine.feeding.ring import ALIGNMENT, Region, Ring

CAPACITY = 40 * ALIGNMENT


@given(st.lists(st.tuples(st.integers(0, CAPACITY), st.integers(0, 5))))
def test_regions_that_are_taken_never_share_a_byte(steps: list[tuple[int, int]]) -> None:
    """After every attempt to take one, the n-th oldest is given back: an order that writing threads might have."""
    ring, taken = Ring(CAPACITY), list[Region]()
    for size, back in steps:
        region = ring.take(size)
        if region is not None:
            assert region.size >= max(size, 1)
            taken.append(region)
        spans = sorted((held.start, held.start + held.size) for held in taken)
        assert all(0 <= start < end <= CAPACITY and start % ALIGNMENT == 0 for start, end in spans)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        if back < len(taken):
            ring.give_back(taken.pop(back))
    for region in taken:
        ring.give_back(region)
    assert ring.take(CAPACITY), "all of it is free again"


def test_what_fits_in_turn_is_taken_for_ever() -> None:
    ring, held = Ring(CAPACITY), list[Region]()
    for size in (7, 100, 250) * 50:
        while (region := ring.take(size)) is None:
            ring.give_back(held.pop(0))
        held.append(region)
    assert len(held) > 1


def test_there_is_no_room_until_the_oldest_is_given_back() -> None:
    ring = Ring(CAPACITY)
    old, new = ring.take(CAPACITY // 2), ring.take(CAPACITY // 2)
    assert old
    assert new
    assert ring.take(1) is None
    ring.give_back(new)
    assert ring.take(1) is None, "regions come back in the order they were taken"
    ring.give_back(old)
    assert ring.take(1)


def test_waiting_ends_when_another_thread_gives_back() -> None:
    ring = Ring(CAPACITY)
    held = ring.take(CAPACITY)
    assert held
    threading.Timer(0.05, ring.give_back, [held]).start()
    assert ring.take(CAPACITY, wait=True)


def test_more_than_the_buffer_is_refused() -> None:
    with pytest.raises(ValueError, match="a region of 656 bytes in a ring of 640"):
        Ring(CAPACITY).take(CAPACITY + 1)
