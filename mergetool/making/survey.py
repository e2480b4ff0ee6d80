"""A recipe's outputs before they are made: their order, their passes, and each pass opened.

All outputs are surveyed before the first is begun, so that what can be known to fail fails before any work.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mergetool.checkpoint.names import quoted, why_not_plain
from mergetool.checkpoint.outputs import Target, is_file_name, lora_target, model_target
from mergetool.checkpoint.paths import typed
from mergetool.checkpoint.shards import is_model_folder
from mergetool.checkpoint.targets import require_folder
from mergetool.difference.diff_files import DiffFiles
from mergetool.difference.extract import open_diff
from mergetool.difference.pairs import Pairing
from mergetool.engine.inputs import Inputs
from mergetool.errors import OutputError, UsageError
from mergetool.making import state
from mergetool.making.passes import passes
from mergetool.making.places import Places
from mergetool.making.state import ABSENT, State
from mergetool.options.differences import DiffOptions
from mergetool.options.merging import MergeOptions
from mergetool.options.running import ShardOptions
from mergetool.recipe.file import RecipeFile, RecipeOutput, options_of
from mergetool.recipe.plan import Plan
from mergetool.recipe.schema import LoraOutput, MergeOutput


@dataclass(frozen=True)
class Task:
    """One output: its target, its state and its plan. The plan is None while an output that it uses is missing."""

    output: RecipeOutput
    target: Target
    state: State
    opened: Plan | tuple[Pairing, DiffOptions] | None

    @property
    def waits(self) -> bool:
        """Whether an output that it uses has to be made first."""
        return self.opened is None

    @property
    def is_merge(self) -> bool:
        """Whether it is a merge, not a difference."""
        return isinstance(self.output.spec, MergeOutput)

    @property
    def path(self) -> Path:
        """The path of the output."""
        return self.target.path

    @property
    def is_to_be_made(self) -> bool:
        """Whether it is not there as it would be written now."""
        return self.state.kind != "current"


def places_for(recipe: RecipeFile, name: str | os.PathLike[str] | None) -> Places:
    """The places of a recipe's outputs: in the folder ``name``, by default this one.

    A recipe's only output may be given a name of its own.

    Raises UsageError for one file for several outputs and what `outputs.model_target` raises, OutputError for a folder that is not there.
    """
    if name is None:
        return Places(recipe, Path())
    folder, only = Path(typed(os.fspath(name))), recipe.outputs[0]
    is_one = len(recipe.outputs) == 1
    if folder.is_dir() and not (is_one and only.is_folder and is_model_folder(folder)):
        return Places(recipe, folder)
    if not is_one and is_file_name(folder):
        raise UsageError(
            f'"{folder}" is one file, but {recipe.path} makes {len(recipe.outputs)} outputs; name a folder with -o.'
        )
    if not is_one:
        require_folder(folder)
    if isinstance(only.spec, LoraOutput):
        return Places(recipe, folder.parent, lora_target(name))
    return Places(recipe, folder.parent, model_target(name, folder=only.is_folder))


@dataclass
class Survey:
    """Every pass of a recipe, with the state of each output. Models stay open; each is opened and fingerprinted once."""

    places: Places
    inputs: Inputs
    stack: ExitStack
    passes: list[list[Task]] = field(default_factory=list)
    late: dict[int, Plan] = field(default_factory=dict)

    @property
    def tasks(self) -> list[Task]:
        """All outputs in the order in which they are made."""
        return [task for tasks in self.passes for task in tasks]

    def planned(self, tasks: Sequence[Task]) -> list[tuple[Task, Plan]]:
        """The merges of a pass with their plans. Merges that waited for other outputs are planned now."""
        waiting = [task.output for task in tasks if task.is_merge and task.waits and id(task.output) not in self.late]
        self.late |= zip(map(id, waiting), self._plans(waiting), strict=True)
        return [
            (task, task.opened if isinstance(task.opened, Plan) else self.late[id(task.output)])
            for task in tasks
            if task.is_merge
        ]

    def paired(self, task: Task) -> tuple[Pairing, DiffOptions]:
        """A difference with its options. A difference that waited for other outputs is opened now."""
        return task.opened if isinstance(task.opened, tuple) else self._pairing(task.output)

    def check_files(self, *, overwrite: bool) -> None:
        """Refuse files of differences that could not be written, before the first output.

        Raises OutputError, UsageError or BusyError.
        """
        for task in self.tasks:
            if task.is_to_be_made and isinstance(task.opened, tuple):
                pairing, options = task.opened
                with self.places.located(task.output):
                    DiffFiles.checked(task.target, options, pairing, overwrite=overwrite)

    def look(self) -> None:
        """Find the passes. Raises what planning an output raises, at its place in the recipe."""
        waiting: set[int] = set()
        for outputs in passes(self.places.recipe.outputs, lambda output: frozenset(self.places.names(output).values())):
            ready = [output for output in outputs if not any(id(used) in waiting for used in output.earlier)]
            opened = self._opened(ready)
            tasks = [self._task(output, opened.get(id(output))) for output in outputs]
            waiting |= {id(task.output) for task in tasks if task.is_to_be_made}
            self.passes.append(tasks)

    def _task(self, output: RecipeOutput, opened: Plan | tuple[Pairing, DiffOptions] | None) -> Task:
        target = self.places.target(output)
        if opened is None:
            there = State("outdated", "an output that it uses is made first") if target.path.exists() else ABSENT
        elif isinstance(opened, Plan):
            with self.places.located(output):
                there = state.of_merge(opened, target, shard_size(output))
        else:
            there = state.of_diff(*opened, target)
        return Task(output, target, there, opened)

    def _opened(self, outputs: Sequence[RecipeOutput]) -> dict[int, Plan | tuple[Pairing, DiffOptions]]:
        merges = [output for output in outputs if isinstance(output.spec, MergeOutput)]
        plans: dict[int, Plan | tuple[Pairing, DiffOptions]] = {}
        plans |= zip(map(id, merges), self._plans(merges), strict=True)
        return plans | {id(output): self._pairing(output) for output in outputs if isinstance(output.spec, LoraOutput)}

    def _plans(self, outputs: Sequence[RecipeOutput]) -> list[Plan]:
        """The plans of merges; errors have their place in the recipe."""
        plans = []
        for output in outputs:
            with self.places.located(output):
                options = options_of(MergeOptions, output, self.places.names(output))
                plans.append(self.inputs.plan(self.places.expression(output), options))
        return plans

    def _pairing(self, output: RecipeOutput) -> tuple[Pairing, DiffOptions]:
        """The pairing of a difference LoRA, and its options."""
        assert isinstance(output.spec, LoraOutput)
        asked, names = output.spec.diff, self.places.names(output)
        with self.places.located(output):
            options = _beside(options_of(DiffOptions, output, names), self.places.path(output))
            opened = open_diff(
                names[asked.base],
                names[asked.variant],
                options,
                skip_unmatched=self.inputs.skip_unmatched,
                inputs=self.inputs,
            )
            return self.stack.enter_context(opened), options


@contextmanager
def opened(places: Places, *, skip_unmatched: bool = False) -> Iterator[Survey]:
    """The survey of a recipe; its models are closed at the end of the ``with`` block."""
    with ExitStack() as stack:
        inputs = Inputs(stack, skip_unmatched=skip_unmatched)
        surveyed = Survey(places, inputs, stack)
        surveyed.look()
        _refuse_shared(surveyed.tasks)
        yield surveyed


def _beside(options: DiffOptions, lora: Path) -> DiffOptions:
    """The options with the files beside a LoRA in its folder. Raises UsageError for what is no plain name."""
    whole: dict[str, Any] = {}
    for name, place in options.beside.items():
        reason = why_not_plain(place, "")
        if reason:
            raise UsageError(
                f"`{name}` cannot be called {quoted(place)}, because {reason}; it goes into the folder of the output."
            )
        whole[name] = str(lora.parent / lora_target(place, role=f"`{name}`").path)
    return replace(options, **whole)


def _refuse_shared(tasks: Sequence[Task]) -> None:
    """Raises UsageError where two outputs would be written to one file; differences may share their directions."""
    owners: dict[str, Task] = {}
    for task in tasks:
        options = task.opened[1] if isinstance(task.opened, tuple) else DiffOptions()
        beside = [place for name, place in options.beside.items() if name != "spectra"]
        for place in (str(task.path), *beside):
            same = unicodedata.normalize("NFC", place).casefold()
            if owners.setdefault(same, task) is not task:
                raise task.output.place_of("diff").error(
                    f'{task.output.label} and {owners[same].output.label} would both be written to "{place}"; give one another name.'
                )


def refuse_outdated(tasks: Sequence[Task]) -> None:
    """Raises OutputError where an output would replace something else."""
    for task in tasks:
        if task.state.kind == "outdated":
            raise OutputError(
                f'{task.output.place_of("output")}: "{task.path}" exists and differs from the output of this recipe '
                f"({task.state.why}); `overwrite` replaces it, or choose another name."
            )


def shard_size(output: RecipeOutput) -> int | None:
    """The shard size of a merge in bytes, None for one file."""
    return options_of(ShardOptions, output, {}).shard_bytes if isinstance(output.spec, MergeOutput) else None
