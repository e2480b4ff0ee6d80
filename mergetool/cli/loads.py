"""What commands say of the programs that load a LoRA, computed from the file that was read or written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mergetool.cli import console

if TYPE_CHECKING:
    from mergetool.adapters.loaders import Loading


def print_all(found: Sequence[Loading], *, verbose: bool) -> None:
    """A line for every group of releases that do the same, with what is lost; one line where nothing is known."""
    for one in found:
        _print(one, verbose=verbose)
    if not found:
        console.heading("loads", "not known: of no model but Z-Image is it known here which names programs look up")


def _print(one: Loading, *, verbose: bool) -> None:
    parts = one.applied + len(one.dropped)
    console.heading(
        "loads", f"{one.name}: {one.verdict}" + (f", {one.applied} of {parts} parts" if one.dropped else "")
    )
    if one.error:
        console.heading("", f"it raises an error: {one.error}")
        return
    reasons: dict[str, list[str]] = {}
    for part, reason in one.dropped.items():
        reasons.setdefault(reason, []).append(part)
    for reason, parts_of in reasons.items():
        console.heading("", f"{len(parts_of)} {reason}: {console.listed(parts_of, most=1000 if verbose else 2)}")


def as_json(found: Sequence[Loading]) -> dict[str, dict[str, Any]]:
    """Program -> release -> what it makes of the file; empty where nothing is known."""
    programs: dict[str, dict[str, Any]] = {}
    for one in found:
        told = {"verdict": one.verdict, "applied": one.applied, "error": one.error, "dropped": one.dropped}
        programs.setdefault(one.program, {}).update(dict.fromkeys(one.releases, told))
    return programs
