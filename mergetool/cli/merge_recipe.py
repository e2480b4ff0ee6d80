"""``mergetool merge RECIPE.yaml``: make the outputs of a recipe that are not up to date."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergetool.api.recipes import MadeOutput, Make, run_recipe
from mergetool.cli import console, verify_report
from mergetool.cli.diff_report import DiffReport
from mergetool.cli.merge_report import MergeReport
from mergetool.cli.parameters import Typed
from mergetool.errors import CheckFailed, UsageError
from mergetool.options.table import rows
from mergetool.recipe.plan import Plan

if TYPE_CHECKING:
    from mergetool.making.survey import Task
    from mergetool.recipe.file import RecipeFile
    from mergetool.verification.checks import Verification


def perform(path: Path, variables: Sequence[str], typed: Typed) -> None:
    """Make the outputs of a recipe that are absent or out of date."""
    from mergetool.recipe import file

    known = rows(Make)
    inside = [name for name in typed.given if name not in known and name not in ("expression", "output")]
    if inside:
        raise UsageError(
            f"{path} is a recipe and says itself what to merge and how; leave out {' and '.join(f'`{name}`' for name in inside)}, or write it in the file."
        )
    how = {name: value for name, value in typed.given.items() if name in known}
    asked = Make(typed.given.get("output"), **how)
    recipe = file.load(path, variables)
    report = _RecipeReport(typed, recipe)
    made = run_recipe(recipe, asked, report)
    if typed.as_json:
        console.print_json({"recipe": str(path), "outputs": list(report.outputs.values())})
    failed = _failed(made)
    if failed:
        raise CheckFailed(f"{path}: {'; '.join(failed)}.")


class _RecipeReport(MergeReport):
    """One output after the other; ``outputs`` has the JSON of each."""

    def __init__(self, typed: Typed, recipe: RecipeFile) -> None:
        super().__init__(typed)
        self._recipe, self._label = recipe, ""
        self.outputs: dict[Path, dict[str, Any]] = {}

    def survey(self, tasks: Sequence[Task]) -> None:
        """Print the outputs that exist, and those to make."""
        self.outputs = {task.path: _described(task) for task in tasks}
        if not self.prints:
            return
        made = sum(task.is_to_be_made for task in tasks)
        console.heading("recipe", f"{self._recipe.path}: {console.plural(len(tasks), 'output')}, {made} to make")
        for task in tasks:
            words = {"absent": "to be made", "current": "up to date", "outdated": f"out of date: {task.state.why}"}
            console.heading("", f"{task.output.label} -> {task.target}  {words[task.state.kind]}")

    def output(self, task: Task) -> None:
        """The next events are about this one."""
        self.json, self._label = self.outputs[task.path], task.output.label

    def waiting(self, task: Task) -> None:
        """Print an output that a dry run cannot plan."""
        self.output(task)
        self.json["after"] = [used.label for used in task.output.earlier]
        if self.prints:
            source = task.output.expression.text if task.output.expression else "a difference LoRA"
            after = " and ".join(self.json["after"])
            console.heading("plan", f"{task.output.label}: {source}, planned when {after} is there")

    def plan(self, plan: Any, memory: int) -> None:
        """The plan of a merge, or the pairs of a difference."""
        if self.prints:
            console.say()
            console.heading("output", self._label)
        if isinstance(plan, Plan):
            super().plan(plan, memory)
        else:
            self._of_difference().plan(plan, memory)

    def together(self, count: int, passes: int, moved: int, memory: int, written: int) -> None:
        """Print the plan and the memory of merges in one pass."""
        if not self.prints:
            return
        how = "in one pass over their models" if passes == 1 else f"in {passes} passes"
        takes = f"moves {console.size(moved)}, memory {console.size(memory)}, disk {console.size(written)}"
        console.say()
        console.heading("run", f"{count} merges {how}: {takes}")

    def done(self, plan: Any, result: Any) -> None:
        """Print the result of an output."""
        if isinstance(plan, Plan):
            super().done(plan, result)
        else:
            self._of_difference().done(plan, result)

    def _of_difference(self) -> DiffReport:
        """Put the JSON of a difference into that of this output."""
        report = DiffReport(self.typed)
        report.json = self.json
        return report

    def verifying(self, task: Task) -> None:
        """Print the output under verification."""
        self.output(task)
        if self.prints:
            console.say()
            console.heading("verify", self._label)

    def verified(self, task: Task, checked: Verification) -> None:
        """Prints the verification of an output."""
        self.json["verify"] = verify_report.described(checked)
        if self.prints:
            verify_report.print_verification(checked)


def _failed(made: Sequence[MadeOutput]) -> list[str]:
    """The checks that failed."""
    failed = []
    for output in made:
        try:
            if output.verification is not None:
                output.verification.require_passed()
        except CheckFailed as failure:
            failed.append(str(failure).rstrip("."))
    return failed


def _described(task: Task) -> dict[str, Any]:
    return {
        "name": task.output.name,
        "variables": {name: value.text for name, value in task.output.values.items()},
        "output": str(task.path),
        "state": task.state.kind,
        "why": task.state.why,
    }
