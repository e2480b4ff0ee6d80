"""A merge's weights against its own recipe: every tensor is derived again from the recorded inputs and compared byte by byte.

report = check_weights("out.safetensors", inputs={"tuned": "/models/tuned.safetensors"})
report.sound        True when every tensor is what its recipe says
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from mergetool import models
from mergetool.checkpoint import dtypes
from mergetool.checkpoint.names import quoted
from mergetool.checkpoint.reader import Checkpoint
from mergetool.engine import merge
from mergetool.errors import DataError, InputMissing, MergetoolError
from mergetool.recipe.expression import parse
from mergetool.recipe.options import Options
from mergetool.recipe.plan import MERGED, Input, Plan, plan_merge


@dataclass
class WeightsReport:
    """What was found. ``merged`` and ``kept`` count tensors; a tensor with parts of both kinds counts as merged.

    ``differing`` maps a tensor to the offset of the first byte that is not what the recipe says; ``changed`` names
    inputs whose content is not what was merged; ``missing`` and ``extra`` are tensors that only the recipe or only
    the file has, or has in another shape or dtype.
    """

    expression: str
    merged: int = 0
    kept: int = 0
    bytes_compared: int = 0
    changed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    differing: dict[str, int] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """Every tensor is there and is what the recipe says, from the inputs that were recorded."""
        return not (self.changed or self.missing or self.extra or self.differing)


def check_weights(
    output: str,
    *,
    inputs: Mapping[str, str] | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> WeightsReport:
    """Do the merge that ``output`` records again, in memory, and compare.

    ``inputs`` gives the recorded names of models their places; other names are looked up as MODEL arguments, then beside
    the output. ``progress`` gets bytes moved and bytes to move. Raises DataError for a file without a recipe or with a
    damaged one, InputMissing for an input that is nowhere, and what planning and reading raise.
    """
    with ExitStack() as stack:
        opened = stack.enter_context(models.open_model(output))
        folder = models.resolve(output).path.absolute().parent
        recipe, recorded = _provenance(opened.checkpoint, output)
        found = [_open_input(name, (inputs or {}).get(name), folder, stack) for name in recorded]
        expression = parse(recipe["expression"], known=list(recorded))
        plan = plan_merge(expression, found, _options(recipe))
        report = WeightsReport(recipe["expression"])
        report.changed = [model.name for model in found if model.checkpoint.fingerprint() != recorded[model.name]]
        report.missing, report.extra = _against_header(plan, opened.checkpoint)
        comparer = _Comparer(opened.checkpoint, report)
        total = plan.bytes_read + plan.header.data_size
        if not (report.missing or report.extra):
            moved = 0

            def advance(count: int) -> None:
                nonlocal moved
                moved += count
                progress(moved, total)

            merge.run(plan, comparer, threads=threads, non_finite="keep", progress=advance)
        for tensor in plan.tensors:
            if any(step.reason == MERGED for step in tensor.steps):
                report.merged += 1
            else:
                report.kept += 1
        return report


def _provenance(checkpoint: Checkpoint, output: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The recorded recipe, and the fingerprint of each input by its recorded name."""
    stored = checkpoint.metadata
    if "mergetool.recipe" not in stored or "mergetool.inputs" not in stored:
        raise DataError(f"{output} carries no recipe: it was not made by mergetool merge, or lost its metadata since.")
    try:
        recipe = json.loads(stored["mergetool.recipe"])
        recorded = {entry["name"]: entry["fingerprint"] for entry in json.loads(stored["mergetool.inputs"])}
        if not isinstance(recipe["expression"], str):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{output} carries a damaged recipe in its metadata; it cannot be verified.") from None
    return recipe, recorded


def _open_input(name: str, place: str | None, folder: Path, stack: ExitStack) -> Input:
    """An input by the place that was given, as a MODEL, or beside the output under its recorded name."""
    beside = [folder / f"{name}.safetensors", folder / name]
    choices = [place] if place is not None else [name, *(str(path) for path in beside if path.exists())]
    for choice in choices:
        try:
            opened = models.open_model(choice)
        except InputMissing:
            continue
        stack.enter_context(opened.checkpoint)
        return Input(name, opened.checkpoint, opened.anatomy)
    raise InputMissing(
        f"the input {quoted(name)} of the recipe is not found; say where it is with --input {name}=PATH."
    )


def _options(recipe: Mapping[str, Any]) -> Options:
    try:
        return Options(
            protect=tuple(recipe.get("protect", ())),
            include=tuple(recipe.get("include", ())),
            exclude=tuple(recipe.get("exclude", ())),
            multipliers=tuple(
                (pattern, Fraction(value))
                for pattern, _, value in (text.rpartition("=") for text in recipe.get("set", ()))
            ),
            keep_from=recipe.get("from"),
            dtype=dtypes.output_dtype(recipe["dtype"]) if "dtype" in recipe else None,
            layout=recipe.get("layout"),
        )
    except (ValueError, TypeError, AttributeError, ZeroDivisionError, MergetoolError) as error:
        raise DataError(f"the recorded options are damaged ({error}); the file cannot be verified.") from None


def _against_header(plan: Plan, checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    wanted = {name: (info.dtype, info.shape) for name, info in plan.header.tensors.items()}
    stored = {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}
    missing = [name for name, kind in wanted.items() if stored.get(name) != kind]
    return missing, [name for name in stored if name not in wanted]


class _Comparer:
    """Takes what a merge would write, and compares it with what is there."""

    def __init__(self, checkpoint: Checkpoint, report: WeightsReport) -> None:
        self._checkpoint = checkpoint
        self._report = report
        self._lock = threading.Lock()

    def write(self, name: str, start: int, data: memoryview) -> None:
        wanted = bytes(data)
        found = self._checkpoint.read(name, start, len(wanted))
        with self._lock:
            self._report.bytes_compared += len(wanted)
            if found != wanted:
                first = start + next(i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
                self._report.differing[name] = min(first, self._report.differing.get(name, first))
