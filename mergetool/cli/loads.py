"""Reports on the programs that load a LoRA, computed from the file read or written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mergetool.arch.families import FAMILIES
from mergetool.cli import console

if TYPE_CHECKING:
    from mergetool.adapters.loaders import Loading


def print_all(loadings: Sequence[Loading], *, verbose: bool) -> None:
    """Print a line for every group of releases that do the same.

    It names what they drop; where nothing is known, one line says so.
    """
    for loading in loadings:
        _print(loading, verbose=verbose)
    if not loadings:
        known = console.listed([family.name for family in FAMILIES if family.loader])
        console.heading(
            "loads",
            f"not proved: ComfyUI finds a model's own names behind diffusion_model.; what diffusers finds is known of these families only: {known}",
        )


def _print(loading: Loading, *, verbose: bool) -> None:
    parts = loading.applied + len(loading.dropped)
    console.heading(
        "loads",
        f"{loading.name}: {loading.verdict}" + (f", {loading.applied} of {parts} parts" if loading.dropped else ""),
    )
    if loading.error:
        console.heading("", f"it raises an error: {loading.error}")
        return
    reasons: dict[str, list[str]] = {}
    for part, reason in loading.dropped.items():
        reasons.setdefault(reason, []).append(part)
    for reason, parts_of in reasons.items():
        console.heading("", f"{len(parts_of)} {reason}: {console.listed(parts_of, most=1000 if verbose else 2)}")


def as_json(loadings: Sequence[Loading]) -> dict[str, dict[str, Any]]:
    """Program -> release -> its treatment of the file; empty where nothing is known."""
    programs: dict[str, dict[str, Any]] = {}
    for loading in loadings:
        told = {
            "verdict": loading.verdict,
            "applied": loading.applied,
            "error": loading.error,
            "dropped": loading.dropped,
        }
        programs.setdefault(loading.program, {}).update(dict.fromkeys(loading.releases, told))
    return programs
