"""Decide whether an output is up to date, by its whole header. The header holds recipe, inputs, version and layout."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mergetool.checkpoint.outputs import Target
from mergetool.checkpoint.planned import first_difference, planned_files
from mergetool.checkpoint.reader import Checkpoint
from mergetool.engine.job import config_files, open_merge, stem_of
from mergetool.errors import MergetoolError
from mergetool.options.differences import DiffOptions
from mergetool.recipe import provenance
from mergetool.recipe.plan import Plan

if TYPE_CHECKING:
    from mergetool.difference.pairs import Pairing


@dataclass(frozen=True, slots=True)
class State:
    """``absent``, ``current``, or ``outdated`` with the reason in ``why``.

    A current output is as it would be written now.
    """

    kind: Literal["absent", "current", "outdated"]
    why: str = ""


ABSENT, CURRENT = State("absent"), State("current")


def of_merge(plan: Plan, target: Target, shard_size: int | None) -> State:
    """The state of a merge's output. No tensor is read: whether its bytes are right is what `verification.replay` says."""
    path = target.path
    if not os.path.lexists(path):
        return ABSENT
    files = planned_files(
        path,
        plan.header,
        shard_size=shard_size,
        extra_files=config_files(plan),
        stem=stem_of(plan),
        single=not target.is_folder,
    )
    try:
        with Checkpoint.open(path) as stored:
            reasons = provenance.changes(stored.metadata, plan.header.metadata)
        difference = first_difference(path, files)
    except (MergetoolError, OSError) as error:
        return State("outdated", f"what is there cannot be read ({error})")
    if reasons or difference:
        return State("outdated", " and ".join(reasons) or difference)
    return CURRENT


def of_diff(pairing: Pairing, options: DiffOptions, target: Target) -> State:
    """Find the state of a LoRA by its recipe and inputs. Its ranks, and so its header, are known only when it is made.

    The file of whole differences has to say the same, and the checkpoint to be what both make of the base; directions decide nothing.
    """
    from mergetool.difference.diff_files import DiffFiles  # with it comes torch, which no merge needs here
    from mergetool.difference.extract import metadata_of

    files, expected = DiffFiles.named(target, options), metadata_of(pairing, options)
    if not os.path.lexists(files.lora.path):
        return ABSENT
    state, stored = _of_metadata(files.lora.path, expected)
    has_full = files.full is not None and provenance.NOT_FULL not in stored
    if state == CURRENT and files.full is not None and has_full and any(pair.whole for pair in pairing.pairs):
        state, _ = _of_metadata(files.full.path, expected)
    if state != CURRENT:
        return state
    if files.checkpoint is None:
        return CURRENT
    if not os.path.lexists(files.checkpoint.path):
        return State("outdated", f'"{files.checkpoint.path}" is missing')
    has_full = has_full and files.full is not None and os.path.lexists(files.full.path)
    with open_merge(files.baked(pairing.base.name, has_full=has_full)) as plan:
        return of_merge(plan, files.checkpoint, None)


def _of_metadata(path: Path, expected: Mapping[str, str]) -> tuple[State, Mapping[str, str]]:
    """The state of a file by its metadata, and these."""
    if not os.path.lexists(path):
        return State("outdated", f'"{path}" is missing'), {}
    try:
        with Checkpoint.open(path) as stored:
            reasons = provenance.changes(stored.metadata, expected)
    except MergetoolError as error:
        return State("outdated", f"what is there cannot be read ({error})"), {}
    return State("outdated", " and ".join(reasons)) if reasons else CURRENT, stored.metadata
