"""Formats that are written against the grammar by which LoRAs are read: one cannot say what the other does not understand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import pytest

from mergetool.adapters.adapter import ChangeKind
from mergetool.adapters.formats import FORMATS, KEY_FORMATS, LoraFormat, carrying
from mergetool.adapters.keys import Spelled, take_apart

ROLES: dict[ChangeKind, tuple[str, ...]] = {
    "lora": ("down", "up", "mid", "dora_scale", "alpha"),
    "loha": ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2", "dora_scale", "alpha"),
    "lokr": ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2", "dora_scale", "alpha"),
    "full": ("diff", "diff_b"),
    "whole": ("set_weight",),
}
MODULE = "layers.0.attention.to_q"


def carried(form: LoraFormat) -> Iterator[tuple[ChangeKind, str]]:
    for kind, roles in ROLES.items():
        yield from ((kind, role) for role in roles if form.carries(kind, frozenset({role})))


@pytest.mark.parametrize("name", KEY_FORMATS)
def test_every_key_of_a_format_is_read_as_what_was_written(name: str) -> None:
    form = FORMATS[name]  # type: ignore[index]
    for kind, role in carried(form):
        found = take_apart(form.key(MODULE, kind, role))
        assert isinstance(found, Spelled)
        module = MODULE.replace(".", "_") if form.flat else MODULE
        assert (found.prefix, found.module, found.role) == (form.prefix, module, role), (kind, role)


def test_every_format_that_can_be_asked_for_has_a_row() -> None:
    assert tuple(FORMATS) == KEY_FORMATS


@pytest.mark.parametrize("kind", get_args(ChangeKind))
def test_every_kind_of_change_can_be_written_in_some_format(kind: ChangeKind) -> None:
    assert carrying(kind, frozenset(ROLES[kind]))


def test_only_comfyuis_format_has_whole_differences() -> None:
    assert carrying("full", frozenset({"diff"})) == ["comfyui"]
