"""Whether an output is there already, as it would be written now: the whole header, and so recipe, inputs, version and layout."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mergetool.checkpoint.outputs import Target
from mergetool.checkpoint.planned import first_difference, planned_files
from mergetool.checkpoint.reader import Checkpoint
from mergetool.engine.job import config_files, stem_of
from mergetool.errors import MergetoolError
from mergetool.lora.extract import metadata_of
from mergetool.lora.pairs import Pairing
from mergetool.options.differences import DiffOptions
from mergetool.recipe import provenance
from mergetool.recipe.plan import Plan


@dataclass(frozen=True, slots=True)
class State:
    """``absent``; ``current``: what would be written is there; ``outdated``: something else is there, and ``why`` says what."""

    kind: Literal["absent", "current", "outdated"]
    why: str = ""


ABSENT, CURRENT = State("absent"), State("current")


def of_merge(plan: Plan, target: Target, shard_size: int | None) -> State:
    """The state of a merge's output. No tensor is read: whether its bytes are right is what `mergetool replay` says."""
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


def of_diff(pairing: Pairing, options: DiffOptions, path: Path) -> State:
    """The state of a LoRA: its ranks, and so its header, are known only when it is made, but its recipe and inputs are."""
    if not os.path.lexists(path):
        return ABSENT
    try:
        with Checkpoint.open(path) as stored:
            reasons = provenance.changes(stored.metadata, metadata_of(pairing, options))
    except MergetoolError as error:
        return State("outdated", f"what is there cannot be read ({error})")
    return State("outdated", " and ".join(reasons)) if reasons else CURRENT
