"""Every harness catches protocols that are wrong: what cannot be caught is not tested."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from mergetool.checkpoint import files, shards
from tests.faults import broken, calls, doubles, inputs, kills, power, refusals, resuming, space, systems, together
from tests.faults.conftest import standing
from tests.faults.rows import Bench
from tests.faults.tally import Tally

pytestmark = pytest.mark.loaded


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    """A bench of their own: wrong protocols leave things behind, which other tests would find."""
    with standing() as made:
        yield made


CAUGHT: list[tuple[str, str, Callable[[Bench, str], Tally]]] = [
    ("calls", "rename first", lambda b, wrong: calls.sweep(b.world, count=25, broken=wrong)),
    ("kills", "rename first", lambda b, wrong: kills.kill(b.world, count=40, broken=wrong)),
    ("signals", "finalise on exit", lambda b, wrong: kills.signals(b.world, count=20, broken=wrong)),
    ("power", "no fsync", lambda b, wrong: power.cut(b.world, b.disk, count=20, broken=wrong)),
    ("power", "no folder fsync", lambda b, wrong: power.cut(b.world, b.disk, count=40, broken=wrong)),
    ("space", "keep temporaries", lambda b, wrong: space.full(b.world, count=20, broken=wrong)),
    ("inputs", "unchecked inputs", lambda b, wrong: inputs.change(b.world, count=100, broken=wrong)),
    ("resume", "trusted journal", lambda b, wrong: resuming.tamper(b.world, count=9, broken=wrong)),
    ("rivals", "no locks", lambda b, wrong: together.compete(b.world, count=6, most=4, broken=wrong)),
    ("modes", "private mode", lambda b, wrong: refusals.modes(b.world, broken=wrong)),
]


@pytest.mark.parametrize(("harness", "wrong", "run"), CAUGHT, ids=[f"{h}: {w}" for h, w, _ in CAUGHT])
def test_wrong_protocol_is_caught(bench: Bench, harness: str, wrong: str, run: Callable[[Bench, str], Tally]) -> None:
    tally = run(bench, wrong)
    assert tally.violations, f"{harness} did not see: {wrong}"


def test_inputs_that_are_written_are_caught() -> None:
    with standing() as spare:  # its inputs are good for nothing afterwards
        found = calls.sweep(spare.world, count=3, broken="write inputs").violations
    assert any("was changed" in told for told in found)


@pytest.mark.parametrize(
    "wrong", ["no fsync", "no folder fsync", "rename first", "finalise on exit", "keep temporaries"]
)
def test_wrong_protocol_is_caught_on_a_disk_in_memory(bench: Bench, wrong: str) -> None:
    assert doubles.sweep(bench.world, bench.empty, count=500, broken=wrong).violations


def test_file_that_is_removed_while_open_is_caught_under_windows_rules(bench: Bench) -> None:
    with broken.for_a_while("unlink while open"):
        assert systems.windows(bench.world, bench.empty).violations


def test_names_that_differ_in_case_and_are_both_written_are_caught(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "folded", lambda name: name)
    monkeypatch.setattr(files, "same_name", lambda one, other: one == other)
    assert len(systems.caseless(bench.empty).violations) > 50


def test_every_wrong_protocol_is_used() -> None:
    used = {wrong for _, wrong, _ in CAUGHT} | {"no flock", "unlink while open", "write inputs"}
    assert used == set(broken.PROTOCOLS)
