"""Merges: by expression, by recipe file, and again from what one records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mergetool.api.progress import Progress, StrPath, bars, counting, patterns, reporting

if TYPE_CHECKING:
    from mergetool.comparison.preflight import Preflight
    from mergetool.engine.running import Outcome
    from mergetool.lora.extract import Extraction
    from mergetool.making.places import Places
    from mergetool.making.survey import Task
    from mergetool.recipe.plan import Plan
    from mergetool.verification.checking import Verification
    from mergetool.verification.replay import Replay


@dataclass(frozen=True)
class Merged:
    """A merge that was written to ``output``.

    ``tensors`` maps what was done ("merged", "protected: refiner", ...) to the output tensors that it was done to, ``left_out`` a name to why it is not
    in the output; ``warnings`` are what a user should know. ``outcome`` has what became of the delta in rounding, and what was capped.
    """

    output: Path
    expression: str
    tensors: Mapping[str, Sequence[str]]
    left_out: Mapping[str, str]
    warnings: Sequence[str]
    outcome: Outcome


def merge(
    expression: str,
    output: StrPath,
    *,
    protect: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    keep_from: str | None = None,
    multipliers: Mapping[str, float | str | Fraction] | None = None,
    dtype: str | None = None,
    quant: str | None = None,
    scale_search: bool = False,
    bundled: Literal["keep", "drop", "drop-ema", "merge"] = "keep",
    layout: str | None = None,
    rounding: Literal["nearest", "stochastic", "error-feedback"] = "nearest",
    seed: int = 0,
    shard_size: int | None = None,
    device: str = "auto",
    threads: int | None = None,
    non_finite: Literal["refuse", "keep"] = "refuse",
    skip_unmatched: bool = False,
    overwrite: bool = False,
    force: bool = False,
    progress: Progress = False,
) -> Merged:
    """Merge checkpoints by an expression into ``output``, a .safetensors file or with ``/`` at its end a folder; complete, or not at all.

    ``multipliers`` scales the change in groups, as ``--set`` does: ``{"layers": "linear(0.2,1)", "refiner": 0}``; a later entry wins. ``protect``,
    ``include`` and ``exclude`` are patterns of groups and tensors. ``bundled`` is what becomes of the VAE, text encoders, EMA weights and the like in the
    first model's file: copied, left out (all or EMA weights), or merged. Sizes are in bytes. ``force`` merges models that do not look as if they belong
    together, which is a LineageError otherwise. Raises MergetoolError: ExpressionError, PatternError or
    UsageError for what is asked, InputMissing and DataError for inputs, OutputError, BusyError and StorageError for the output, NonFiniteError for
    NaN and infinity.
    """
    from mergetool.checkpoint import dtypes
    from mergetool.checkpoint.outputs import model_target
    from mergetool.comparison import preflight
    from mergetool.engine import device as devices
    from mergetool.engine import job
    from mergetool.recipe.groups import parse_setting
    from mergetool.recipe.options import Options

    options = Options(
        protect=patterns(protect),
        include=patterns(include),
        exclude=patterns(exclude),
        multipliers=tuple(parse_setting(f"{pattern}={value}") for pattern, value in (multipliers or {}).items()),
        keep_from=keep_from,
        dtype=dtypes.output_dtype(dtype),
        layout=layout,
        rounding=rounding,
        seed=seed,
        quant=quant,
        scale_search=scale_search,
        bundled=bundled,
    )
    target = model_target(output, layout=layout, shard_size=shard_size, overwrite=overwrite)
    with job.open_merge(expression, options, skip_unmatched=skip_unmatched) as plan:
        checked = preflight.check(plan)
        if not force:
            checked.refuse(way_out="force=True merges anyway")
        on = devices.choose(device, work=plan.bytes_read, memory=0)
        with counting("merge", plan.bytes_read + plan.header.data_size, progress) as advance:
            outcome = job.run_merge(
                plan,
                target,
                overwrite=overwrite,
                shard_size=shard_size,
                threads=threads,
                non_finite=non_finite,
                device=on,
                progress=advance,
            )
        return _merged(plan, target.path, checked, outcome)


def _merged(plan: Plan, output: Path, checked: Preflight, outcome: Outcome) -> Merged:
    warnings = (*plan.warnings, *(finding.text for finding in checked.findings))
    return Merged(output, str(plan.expression.graph), plan.reasons(), dict(plan.left_out), warnings, outcome)


@dataclass(frozen=True)
class Made:
    """One output of a recipe: ``state`` is what was there before ("absent", "current" or "outdated").

    ``merged`` is set where a merge was made, ``extraction`` where a LoRA was, neither where it was current and stayed; ``verification``
    where the recipe asks for one.
    """

    name: str
    path: Path
    state: Literal["absent", "current", "outdated"]
    merged: Merged | None = None
    extraction: Extraction | None = None
    verification: Verification | None = None


class Recipe:
    """A recipe file, read and checked, with variables set: ``Recipe("bridge.yaml", m=20)``.

    Raises RecipeError, with line and column, for all that is wrong in it, InputMissing where it is not there.
    """

    def __init__(self, path: StrPath, **variables: float | str | Fraction) -> None:
        from mergetool.recipe import file

        self._read = file.load(Path(path), [f"{name}={value}" for name, value in variables.items()])

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of its outputs, each with the values of a sweep, in the order in which they are made."""
        return tuple(output.label for output in self._read.outputs)

    def make(
        self,
        target: StrPath = ".",
        *,
        device: str = "auto",
        threads: int | None = None,
        skip_unmatched: bool = False,
        overwrite: bool = False,
        force: bool = False,
        progress: Progress = False,
    ) -> list[Made]:
        """Make the outputs that are not there as they would be written now, in the folder ``target`` (the only one: in that file).

        Merges of common models are one pass over them. Raises OutputError for what is out of date, without ``overwrite``, before anything
        is made, and what merges and differences raise, with the place in the recipe.
        """
        from mergetool.engine import device as devices
        from mergetool.making import survey

        devices.choose(device, work=0)  # one that is not there is refused before any output is made
        places = survey.places_for(self._read, target)
        passes = survey.survey(places, skip_unmatched=skip_unmatched)
        if not overwrite:
            survey.refuse_outdated(passes)
        how = _How(device, threads, skip_unmatched, overwrite, force, progress)
        made: dict[Path, Made] = {}
        for tasks in passes:
            to_make = [task for task in tasks if task.is_to_be_made]
            merges = [task for task in to_make if task.output.expression is not None]
            if merges:
                made |= _merge_all(places, merges, how)
            for task in (task for task in to_make if task.output.expression is None):
                made[task.path] = _take_difference(places, task, how)
        tasks = [task for one in passes for task in one]
        return [made.get(task.path) or Made(task.output.label, task.path, task.state.kind) for task in tasks]


@dataclass(frozen=True, slots=True)
class _How:
    device: str
    threads: int | None
    skip_unmatched: bool
    overwrite: bool
    force: bool
    progress: Progress


def _merge_all(places: Places, tasks: Sequence[Task], how: _How) -> dict[Path, Made]:
    from mergetool.comparison import preflight
    from mergetool.engine import device as devices
    from mergetool.engine import job
    from mergetool.making import looks, survey
    from mergetool.recipe.schema import MergeOutput
    from mergetool.verification import checking

    outputs = [task.output for task in tasks]
    with survey.open_plans(places, outputs, skip_unmatched=how.skip_unmatched) as plans:
        on = devices.choose(how.device, work=sum(plan.bytes_read for plan in plans), memory=0)
        preflights = [preflight.check(plan) for plan in plans]
        for output, each in zip(outputs, preflights, strict=True):
            if not how.force:
                with places.located(output):
                    each.refuse(way_out="force=True merges anyway")
        with counting("merge", job.bytes_moved(plans, on), how.progress) as advance:
            outcomes = job.run_merges(
                plans,
                [task.target for task in tasks],
                overwrite=how.overwrite,
                shard_size=survey.shard_size(outputs[0]),
                threads=how.threads,
                device=on,
                progress=advance,
            )
        made = {
            task.path: Made(task.output.label, task.path, task.state.kind, _merged(plan, task.path, each, outcome))
            for task, plan, each, outcome in zip(tasks, plans, preflights, outcomes, strict=True)
        }
        inputs = {task.path: looks.places_of(plan) for task, plan in zip(tasks, plans, strict=True)}
    for task in tasks:
        spec = task.output.spec
        if isinstance(spec, MergeOutput) and spec.verify:
            wish, with_images = looks.wish_of(places, task.output, spec.verify)
            checked = checking.verify(
                str(task.path),
                inputs[task.path],
                wish,
                bars(how.progress),
                with_images=with_images,
                threads=how.threads,
            )
            made[task.path] = replace(made[task.path], verification=checked)
    return made


def _take_difference(places: Places, task: Task, how: _How) -> Made:
    from mergetool.lora import on_device
    from mergetool.lora.extract import extract
    from mergetool.making import survey

    with (
        survey.open_pairing(places, task.output, skip_unmatched=how.skip_unmatched) as (pairing, options),
        counting("diff", pairing.bytes_to_read(options), how.progress) as advance,
    ):
        found = extract(
            pairing,
            task.path,
            options,
            overwrite=how.overwrite,
            threads=how.threads,
            device=on_device.choose(how.device),
            progress=advance,
        )
    return Made(task.output.label, task.path, task.state.kind, extraction=found)


def replay(
    output: StrPath,
    *,
    inputs: Mapping[str, str] | None = None,
    threads: int | None = None,
    progress: Progress = False,
) -> Replay:
    """Make a merge again from the recipe in its metadata, and compare every byte of the file or folder; nothing is written.

    ``inputs`` maps names of the recipe to where those models are now. What is not the same is in the result, with the reason.
    """
    from mergetool.verification.replay import replay as again

    with reporting("replay", progress) as reported:
        return again(str(output), inputs=inputs or {}, threads=threads, progress=reported)
