"""Recipe files: make each output that is absent or out of date. The runners are those of single commands."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from mergetool.api import differences, merges
from mergetool.api.differences import Paired
from mergetool.api.events import Events, Request
from mergetool.api.functions import method
from mergetool.api.merges import Merged, Planned
from mergetool.options.kinds import OutputPath
from mergetool.options.running import DiffRunOptions, MergeRunOptions
from mergetool.options.table import Option, part, values
from mergetool.options.verifying import VerifyOptions

if TYPE_CHECKING:
    from mergetool.difference.extract import Extraction
    from mergetool.making.survey import Survey, Task
    from mergetool.recipe.file import RecipeFile as Read
    from mergetool.verification.checks import Verification


@dataclass(frozen=True)
class Make(Request, MergeRunOptions):
    """The options for making a recipe's outputs."""

    target: Annotated[
        str | os.PathLike[str] | None,
        Option(
            help="The folder for the outputs, or the file of an only one.",
            section="Output",
            kind=OutputPath(),
            default="this folder",
        ),
    ] = None


@dataclass(frozen=True)
class MadeOutput:
    """One output of a recipe; ``state`` was "absent", "current" or "outdated" before the run.

    ``merged`` is set where a merge was made, ``extraction`` where a LoRA was, neither where it was current and stayed; ``verification``
    where the recipe asks for one.
    """

    name: str
    path: Path
    state: Literal["absent", "current", "outdated"]
    merged: Merged | None = None
    extraction: Extraction | None = None
    verification: Verification | None = None


def run_recipe(recipe: Read, asked: Make, events: Events) -> list[MadeOutput]:
    """Make the outputs of a recipe that are absent or out of date.

    They go to the folder ``target``, an only one to that file.

    Merges of common models are one pass over them; every input is opened once. Raises OutputError for what is out of date, without ``overwrite``, before
    anything is made, and what merges and differences raise, with the place in the recipe.
    """
    from mergetool.engine import device as devices
    from mergetool.making import survey

    devices.choose(asked.device, work=0)  # one that is not there is refused before any output is made
    places = survey.places_for(recipe, asked.target)
    how = part(MergeRunOptions, asked)
    made: dict[Path, MadeOutput] = {}
    with survey.opened(places, skip_unmatched=how.skip_unmatched) as surveyed:
        events.survey(surveyed.tasks)
        if not (how.dry_run or how.overwrite):
            survey.refuse_outdated(surveyed.tasks)
        if not how.dry_run:
            _require_pages(surveyed, overwrite=how.overwrite)
            surveyed.check_files(overwrite=how.overwrite)
        for tasks in surveyed.passes:
            to_make = [task for task in tasks if task.is_to_be_made]
            if how.dry_run:
                for task in (task for task in to_make if task.waits):
                    events.waiting(task)
                to_make = [task for task in to_make if not task.waits]
            made |= _merge(surveyed, to_make, how, events)
            for task in (task for task in to_make if not task.is_merge):
                made[task.path] = _difference(surveyed, task, how, events)
        if not how.dry_run:
            made |= _verified(surveyed, made, how, events)
        return [
            made.get(task.path) or MadeOutput(task.output.label, task.path, task.state.kind) for task in surveyed.tasks
        ]


def _merge(surveyed: Survey, tasks: Sequence[Task], how: MergeRunOptions, events: Events) -> dict[Path, MadeOutput]:
    from mergetool.making import survey

    planned = [
        Planned(plan, task.target, task, partial(surveyed.places.located, task.output))
        for task, plan in surveyed.planned(tasks)
    ]
    if not planned:
        return {}
    merged = merges.make(planned, how, events, shard_size=survey.shard_size(planned[0].task.output))
    return {
        merge.task.path: MadeOutput(merge.task.output.label, merge.task.path, merge.task.state.kind, result)
        for merge, result in zip(planned, merged, strict=True)
    }


def _difference(surveyed: Survey, task: Task, how: MergeRunOptions, events: Events) -> MadeOutput:
    pairing, options = surveyed.paired(task)
    extracted = differences.make(Paired(pairing, options, task.target, task), part(DiffRunOptions, how), events)
    return MadeOutput(task.output.label, task.path, task.state.kind, extraction=extracted.extraction)


def _verified(
    surveyed: Survey, made: Mapping[Path, MadeOutput], how: MergeRunOptions, events: Events
) -> dict[Path, MadeOutput]:
    """Check what was made now and asks for it."""
    from mergetool.making import looks
    from mergetool.verification import checks

    verified = {}
    for task, plan in surveyed.planned([task for task in surveyed.tasks if task.path in made and task.is_merge]):
        look = looks.asked_of(surveyed.places, task.output)
        if look is not None:
            events.verifying(task)
            run = {
                "threads": how.threads,
                "device": how.device,
                "overwrite": True,
            }  # of what was there it was asked before
            asked = VerifyOptions(**values(look) | run, inputs=looks.places_of(plan))
            checked = checks.verify(str(task.path), asked, events.progress)
            events.verified(task, checked)
            verified[task.path] = replace(made[task.path], verification=checked)
    return verified


def _require_pages(surveyed: Survey, *, overwrite: bool) -> None:
    """Raises OutputError, before any work, where the page of an output cannot be written."""
    from mergetool.comparison import page
    from mergetool.making import looks

    for task in surveyed.tasks:
        look = looks.asked_of(surveyed.places, task.output) if task.is_to_be_made else None
        if look is not None and look.page is not None:
            with surveyed.places.located(task.output):
                page.require_target(look.page, overwrite=overwrite)


class Recipe:
    """A recipe file, read and checked, with variables set: ``Recipe("bridge.yaml", m=20)``.

    Raises RecipeError, with line and column, for any error in it, and InputMissing if it does not exist.
    """

    def __init__(self, path: str | os.PathLike[str], **variables: float | str | Fraction) -> None:
        from mergetool.recipe import file

        self._read = file.load(Path(path), [f"{name}={value}" for name, value in variables.items()])

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of its outputs, in the order in which they are made.

        An output of a sweep has its values in the name.
        """
        return tuple(output.label for output in self._read.outputs)

    make = method(Make, lambda self, asked, events: run_recipe(self._read, asked, events), run_recipe)
