"""The picture of the rooms is that of the import contracts."""

from __future__ import annotations

import pytest

from tests import rooms


def test_the_picture_is_current() -> None:
    assert rooms.PICTURE.read_text("utf-8") == rooms.picture(), "run: python -m tests.rooms"


def test_every_package_and_lone_module_is_a_room() -> None:
    package = rooms.ROOT / "mergetool"
    there = {path.stem for path in package.glob("*.py")} | {path.parent.name for path in package.glob("*/__init__.py")}
    assert set(rooms.rooms()) == there - {"__init__", "__main__"}


def test_every_room_is_in_one_stripe_in_the_order_of_the_contract() -> None:
    assert [room for _, _, members in rooms.stripes() for room in members] == rooms.rooms()


def test_a_stripe_of_no_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "BANDS", (("Faces", "windows", "#ffffff"),))
    with pytest.raises(ValueError, match="windows"):
        rooms.stripes()
