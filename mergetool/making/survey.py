"""A recipe's outputs before they are made: which there are, in which passes, and each pass opened.

All outputs are surveyed before the first is begun, so that what can be known to fail fails before any work.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from mergetool.checkpoint.outputs import Target, is_file_name, lora_target, model_target
from mergetool.checkpoint.paths import typed
from mergetool.checkpoint.shards import is_model_folder
from mergetool.checkpoint.sizes import parse_size
from mergetool.checkpoint.targets import require_folder
from mergetool.engine import job
from mergetool.errors import MergetoolError, OutputError, UsageError
from mergetool.lora import pairs
from mergetool.lora.extract import open_diff
from mergetool.lora.pairs import DiffOptions, Pairing
from mergetool.making import state
from mergetool.making.passes import passes
from mergetool.making.places import Places
from mergetool.making.state import ABSENT, State
from mergetool.recipe.file import Output, Recipe, options_of, patterns
from mergetool.recipe.options import Options
from mergetool.recipe.plan import Plan
from mergetool.recipe.schema import LoraOutput, MergeOutput


@dataclass(frozen=True)
class Task:
    """One output: where it goes, what is there, and whether an output that it uses has to be made first."""

    output: Output
    target: Target
    state: State
    waits: bool = False

    @property
    def path(self) -> Path:
        """Where it goes."""
        return self.target.path

    @property
    def is_to_be_made(self) -> bool:
        """Whether it is not there as it would be written now."""
        return self.state.kind != "current"


def places_for(recipe: Recipe, name: str | os.PathLike[str] | None) -> Places:
    """Where the outputs go: into the folder ``name``, by default this one; a recipe's only output may be given a name of its own.

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


def survey(places: Places, *, skip_unmatched: bool = False) -> list[list[Task]]:
    """Every pass of a recipe, with the state of each output. Raises what planning an output raises, at its place in the recipe."""
    waiting: set[int] = set()
    found = []
    for outputs in passes(places.recipe.outputs, lambda output: frozenset(places.names(output).values())):
        tasks = []
        ready = [output for output in outputs if not any(id(used) in waiting for used in output.earlier)]
        states = _states(places, ready, skip_unmatched=skip_unmatched)
        for output in outputs:
            waits = id(output) not in states
            there = State("outdated", "an output that it uses is made first")
            known = (there if places.path(output).exists() else ABSENT) if waits else states[id(output)]
            tasks.append(Task(output, places.target(output), known, waits))
            if known.kind != "current":
                waiting.add(id(output))
        found.append(tasks)
    return found


def refuse_outdated(tasks: Sequence[Sequence[Task]]) -> None:
    """Raises OutputError where an output would replace something else."""
    for task in (task for one in tasks for task in one):
        if task.state.kind == "outdated":
            raise OutputError(
                f'{task.output.place_of("output")}: "{task.path}" exists and is not what this recipe makes now '
                f"({task.state.why}); --overwrite replaces it, or choose another name."
            )


def _states(places: Places, outputs: Sequence[Output], *, skip_unmatched: bool) -> dict[int, State]:
    found: dict[int, State] = {}
    merges = [output for output in outputs if isinstance(output.spec, MergeOutput)]
    if merges:
        with open_plans(places, merges, skip_unmatched=skip_unmatched) as plans:
            for output, plan in zip(merges, plans, strict=True):
                with places.located(output):
                    found[id(output)] = state.of_merge(plan, places.target(output), shard_size(output))
    for output in outputs:
        if isinstance(output.spec, LoraOutput):
            with open_pairing(places, output, skip_unmatched=skip_unmatched) as (pairing, options):
                found[id(output)] = state.of_diff(pairing, options, places.path(output))
    return found


@contextmanager
def open_plans(
    places: Places, outputs: Sequence[Output], *, fingerprints: bool = True, skip_unmatched: bool = False
) -> Iterator[list[Plan]]:
    """The plans of merges that are made in one pass; errors have their place in the recipe."""
    items: list[tuple[str, Options]] = []
    for output in outputs:
        items.append((places.expression(output), options_of(output, places.names(output))))
    with ExitStack() as stack:
        try:
            opened = job.open_merges(items, fingerprints=fingerprints, skip_unmatched=skip_unmatched)
            plans = stack.enter_context(opened)
        except MergetoolError as error:
            for output, (text, options) in zip(outputs, items, strict=True):  # whose fault it is
                with (
                    places.located(output),
                    job.open_merge(text, options, fingerprints=False, skip_unmatched=skip_unmatched),
                ):
                    pass
            raise error from None
        yield plans


@contextmanager
def open_pairing(
    places: Places, output: Output, *, skip_unmatched: bool = False
) -> Iterator[tuple[Pairing, DiffOptions]]:
    """The pairing of a difference LoRA, and its options."""
    assert isinstance(output.spec, LoraOutput)
    asked, names = output.spec.diff, places.names(output)
    with ExitStack() as stack:
        with places.located(output):
            options = diff_options(output)
            second = names[asked.variant2] if asked.variant2 else None
            opened = open_diff(
                names[asked.base], names[asked.variant], options, second=second, skip_unmatched=skip_unmatched
            )
            pairing = stack.enter_context(opened)
        yield pairing, options


def diff_options(output: Output) -> DiffOptions:
    """What `mergetool diff` would be told. Raises UsageError."""
    assert isinstance(output.spec, LoraOutput)
    asked = output.spec.diff
    chosen = pairs.chosen(
        rank=asked.rank,
        rank_thresh=None if asked.rank_thresh is None else float(asked.rank_thresh),
        rank_max=asked.rank_max,
        rule=asked.rule,
        budget=_bytes(asked.budget) or 0,
        min_dim=asked.min_dim,
        include=patterns(asked.include),
        exclude=patterns(asked.exclude),
        dtype=asked.dtype,
        seed=asked.seed,
    )
    first, second = asked.weights or (1, 1)
    return replace(chosen, union=asked.union, orthogonal=asked.orthogonal, weights=(float(first), float(second)))


def shard_size(output: Output) -> int | None:
    """The shard size of a merge in bytes, None for one file."""
    return _bytes(output.spec.shard_size) if isinstance(output.spec, MergeOutput) else None


def _bytes(size: int | str | None) -> int | None:
    return parse_size(size) if isinstance(size, str) else size
