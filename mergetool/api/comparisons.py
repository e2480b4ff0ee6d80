"""Measure how far apart two models are, and advise a multiplier for their difference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

from mergetool.api.computed import told
from mergetool.api.events import Events, Request
from mergetool.api.functions import called
from mergetool.options.comparing import CompareOptions
from mergetool.options.kinds import ModelName
from mergetool.options.table import Option

if TYPE_CHECKING:
    from mergetool.comparison.comparison import Report


@dataclass(frozen=True)
class Compare(Request, CompareOptions):
    """Two models side by side: the delta is ``variant - base``."""

    base: Annotated[str, Option(help="The model to start from, e.g. the base.", kind=ModelName("A"), argument=True)]
    variant: Annotated[
        str, Option(help="The model to compare with it, e.g. a fine-tune of it.", kind=ModelName("B"), argument=True)
    ]

    @property
    def models(self) -> list[str]:
        """All that are read, in the order of reading."""
        return [
            self.onto or self.base,
            self.variant,
            self.base,
            *(name for name in (self.reference, self.reference_base) if name is not None),
        ]

    @property
    def computes(self) -> bool:
        """Whether one of them is an expression: how much of its operands is used is not told."""
        from mergetool.recipe.argument import expression_of

        return any(expression_of(name) is not None for name in self.models)


def run_compare(asked: Compare, events: Events) -> Report:
    """Measure how far ``variant`` lies from ``base``, and advise a multiplier.

    It reads both in one pass, part by part. It advises two multipliers for the difference: one gives it the size of
    ``reference - reference_base``, the other makes it ``target`` of the norm of the model that it is added to. The result's ``failed`` has the
    conditions of ``fail_on`` that hold. Raises MergetoolError.
    """
    # Files are read while the libraries are imported; a choice of parts might leave most of them unread.
    with _reading_ahead([] if asked.include or asked.exclude or asked.computes else asked.models) as used:
        from mergetool.comparison import comparison
        from mergetool.options.merging import MergeOptions

        _require_targets(asked)
        options = MergeOptions(include=asked.include, exclude=asked.exclude, dtype=asked.dtype)
        with comparison.open_comparison(
            asked.base,
            asked.variant,
            reference=asked.reference,
            reference_base=asked.reference_base,
            onto=asked.onto,
            options=options,
        ) as opened:
            opened.require_groups(asked.conditions)
            with told(opened.operands.inputs, events), events.progress("compare", opened.bytes_read) as advance:

                def moved(count: int) -> None:
                    used(count)
                    advance(count)

                result = comparison.compare(
                    opened,
                    multiplier=asked.size,
                    target=asked.share,
                    threads=asked.threads,
                    reader=asked.reader,
                    progress=moved,
                )
            result = replace(result, failed=result.failing(asked.conditions))
            _draw(result, asked)
            events.done(opened, result)
            return result


@contextmanager
def _reading_ahead(names: Sequence[str]) -> Iterator[Callable[[int], None]]:
    """Within the block the models' files are read into memory; gives the function to tell of bytes used."""
    from mergetool import models
    from mergetool.checkpoint.reader import Checkpoint
    from mergetool.engine.feeding.read_ahead import ReadAhead

    with ExitStack() as stack:
        checkpoints = [stack.enter_context(Checkpoint.open(models.resolve(name).path)) for name in dict.fromkeys(names)]
        yield stack.enter_context(ReadAhead([file for checkpoint in checkpoints for file in checkpoint.files])).used


def _require_targets(asked: Compare) -> None:
    if asked.plot is not None:
        from mergetool.comparison import plots

        plots.require_target(cast(Path, asked.plot), overwrite=asked.overwrite)
    if asked.report is not None:
        from mergetool.comparison import page

        page.require_target(cast(Path, asked.report), overwrite=asked.overwrite)


def _draw(result: Report, asked: Compare) -> None:
    """Draw the heat map and the page, if their files have names."""
    if asked.plot is not None:
        from mergetool.comparison import heatmap, plots

        heat, title = heatmap.of_distances(result.distances), f"{result.variant} - {result.base}"
        plots.write_png(cast(Path, asked.plot), heat, label="relative distance", title=title, overwrite=asked.overwrite)
    if asked.report is not None:
        from mergetool.comparison import page
        from mergetool.comparison.report import render

        page.write(cast(Path, asked.report), render(result))


compare = called(Compare, run_compare, "compare")
