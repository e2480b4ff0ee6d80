"""``mergetool merge RECIPE.yaml``: the outputs of a recipe file, those that are not up to date."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergetool.cli import console, diff, merge_report
from mergetool.cli import merge as merging
from mergetool.cli import verify as verifying
from mergetool.errors import CheckFailed

if TYPE_CHECKING:
    from mergetool.cli.merge import Settings
    from mergetool.engine.device import Device
    from mergetool.making.places import Places
    from mergetool.making.survey import Task
    from mergetool.recipe.file import Recipe
    from mergetool.recipe.plan import Plan


def perform(path: Path, variables: Sequence[str], target: str | None, settings: Settings) -> None:
    """Survey a recipe's outputs, then make those that are not there as they would be written now."""
    from mergetool.engine import device as devices
    from mergetool.making import survey
    from mergetool.recipe import file

    devices.choose(settings.device, work=0)  # one that is not there is refused before any output is made
    recipe = file.load(path, variables)
    places = survey.places_for(recipe, target)
    passes = survey.survey(places, skip_unmatched=settings.skip_unmatched)
    tasks = [task for one in passes for task in one]
    if not settings.as_json:
        _print_survey(recipe, tasks)
    if not (settings.dry_run or settings.overwrite):
        survey.refuse_outdated(passes)
    run = _Run(places, settings, tasks)
    for one in passes:
        to_make = [task for task in one if task.is_to_be_made]
        if to_make:
            run.make(to_make)
    if not settings.dry_run:
        run.verify(tasks)
    if settings.as_json:
        console.print_json({"recipe": str(path), "outputs": [run.json[task.path] for task in tasks]})
    if run.failed:
        raise CheckFailed(f"{path}: {'; '.join(run.failed)}.")


def _print_survey(recipe: Recipe, tasks: Sequence[Task]) -> None:
    made = sum(task.is_to_be_made for task in tasks)
    console.heading("recipe", f"{recipe.path}: {console.plural(len(tasks), 'output')}, {made} to make")
    for task in tasks:
        what = {"absent": "to be made", "current": "up to date", "outdated": f"out of date: {task.state.why}"}
        console.heading("", f"{task.output.label} -> {task.target}  {what[task.state.kind]}")


class _Run:
    """Makes passes one after the other; ``json`` has what ``--json`` prints, by path, ``failed`` the checks that said no."""

    def __init__(self, places: Places, settings: Settings, tasks: Sequence[Task]) -> None:
        self.places = places
        self.settings = settings
        self.json = {task.path: _described(task) for task in tasks}
        self.failed: list[str] = []
        self._inputs: dict[Path, dict[str, str]] = {}  # of a merge: where the models are, by the names that it records

    def make(self, tasks: Sequence[Task]) -> None:
        """One pass, or with ``--dry-run`` what it would do."""
        from mergetool.recipe.schema import MergeOutput

        if self.settings.dry_run:
            for task in (task for task in tasks if task.waits):
                self._say_waiting(task)
            tasks = [task for task in tasks if not task.waits]
        merges = [task for task in tasks if isinstance(task.output.spec, MergeOutput)]
        if merges:
            self._merge(merges)
        for task in tasks:
            if not isinstance(task.output.spec, MergeOutput):
                self._diff(task)

    def _say_waiting(self, task: Task) -> None:
        after = " and ".join(used.label for used in task.output.earlier)
        self.json[task.path] |= {"after": [used.label for used in task.output.earlier]}
        if not self.settings.as_json:
            what = task.output.expression.text if task.output.expression else "a difference LoRA"
            console.heading("plan", f"{task.output.label}: {what}, planned when {after} is there")

    def _merge(self, tasks: Sequence[Task]) -> None:
        from mergetool.engine import device as devices
        from mergetool.engine import job
        from mergetool.engine.memory import memory_needed
        from mergetool.making import looks, survey

        settings = self.settings
        outputs = [task.output for task in tasks]
        started = time.monotonic()
        with survey.open_plans(
            self.places, outputs, fingerprints=not settings.dry_run, skip_unmatched=settings.skip_unmatched
        ) as plans:
            on = devices.choose(
                settings.device, work=sum(plan.bytes_read for plan in plans), memory=settings.gpu_memory
            )
            total = job.bytes_moved(plans, on)
            for task, plan in zip(tasks, plans, strict=True):
                memory = job.BASE_MEMORY + memory_needed(plan, settings.threads, on)
                self.json[task.path] |= merge_report.plan_json(plan, memory)
                self._inputs[task.path] = looks.places_of(plan)
                if not settings.as_json:
                    console.say()
                    console.heading("output", task.output.label)
                    merge_report.print_plan(plan, memory, every_tensor=settings.verbose)
                with self.places.located(task.output):
                    checked = merging.guard(plan, force=settings.force or settings.dry_run, shown=not settings.as_json)
                self.json[task.path] |= checked.record()
            if len(plans) > 1 and not settings.as_json:
                console.say()
                _print_together(plans, settings.threads, on, total)
            if settings.dry_run:
                return
            with console.progress("merge", total, shown=settings.shows_progress, publishes=True) as advance:
                outcomes = job.run_merges(
                    plans,
                    [task.target for task in tasks],
                    overwrite=settings.overwrite,
                    shard_size=survey.shard_size(outputs[0]),
                    threads=settings.threads,
                    method=settings.reader,
                    non_finite=settings.nonfinite,
                    device=on,
                    measure=settings.measure,
                    resume=settings.resume,
                    progress=advance,
                )
            seconds = time.monotonic() - started
            for task, plan, outcome in zip(tasks, plans, outcomes, strict=True):
                self.json[task.path] |= merge_report.outcome_json(plan, outcome, task.target, seconds)
                if not settings.as_json:
                    merge_report.print_outcome(plan, outcome, task.target, seconds)

    def _diff(self, task: Task) -> None:
        from mergetool.lora import on_device
        from mergetool.lora.extract import extract
        from mergetool.making import survey

        settings = self.settings
        started = time.monotonic()
        with survey.open_pairing(self.places, task.output, skip_unmatched=settings.skip_unmatched) as (
            pairing,
            options,
        ):
            self.json[task.path] |= diff.pairing_json(pairing)
            if not settings.as_json:
                console.say()
                console.heading("output", task.output.label)
                diff.print_pairing(pairing, verbose=settings.verbose)
            if settings.dry_run:
                return
            device = on_device.choose(settings.device)
            with console.progress("diff", pairing.bytes_to_read(options), shown=settings.shows_progress) as bar:
                found = extract(
                    pairing,
                    task.path,
                    options,
                    overwrite=settings.overwrite,
                    threads=settings.threads,
                    method=settings.reader,
                    device=device,
                    memory=settings.gpu_memory,
                    progress=bar,
                )
            seconds = time.monotonic() - started
            self.json[task.path] |= diff.extraction_json(found, options, None, task.path, seconds)
            if not settings.as_json:
                diff.print_extraction(
                    found, options, pairing, task.path, seconds, full=None, checkpoint=None, verbose=settings.verbose
                )

    def verify(self, tasks: Sequence[Task]) -> None:
        """Check what was made now and asks for it."""
        from mergetool.making import looks
        from mergetool.recipe.schema import MergeOutput
        from mergetool.verification import checking

        for task in tasks:
            spec = task.output.spec
            if not (task.is_to_be_made and isinstance(spec, MergeOutput) and spec.verify):
                continue
            if not self.settings.as_json:
                console.say()
                console.heading("verify", task.output.label)
            wish, with_images = looks.wish_of(self.places, task.output, spec.verify)
            found = checking.verify(
                str(task.path),
                self._inputs[task.path],
                wish,
                partial(console.bar, shown=self.settings.shows_progress),
                with_images=with_images,
                threads=self.settings.threads,
            )
            self.json[task.path]["verify"] = verifying.described(found)
            if not self.settings.as_json:
                verifying.print_found(found)
            try:
                found.require_passed()
            except CheckFailed as failure:
                self.failed.append(str(failure).rstrip("."))


def _print_together(plans: Sequence[Plan], threads: int | None, on: Device, total: int) -> None:
    """How several merges are made, and what that takes."""
    from mergetool.engine import bundles, job
    from mergetool.engine.memory import memory_of

    rounds = bundles.passes(plans, on)
    how = "in one pass over their models" if len(rounds) == 1 else f"in {len(rounds)} passes"
    memory = job.BASE_MEMORY + memory_of(plans, threads, on)
    written = sum(plan.header.file_size for plan in plans)
    console.heading(
        "run",
        f"{len(plans)} merges {how}: moves {console.size(total)}, memory {console.size(memory)}, disk {console.size(written)}",
    )


def _described(task: Task) -> dict[str, Any]:
    return {
        "name": task.output.name,
        "variables": {name: value.text for name, value in task.output.values.items()},
        "output": str(task.path),
        "state": task.state.kind,
        "why": task.state.why,
    }
