"""Findings about models that are expressions, before and after they are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mergetool.api.events import Events

if TYPE_CHECKING:
    from mergetool.recipe.steps import Input


@contextmanager
def told(inputs: Iterable[Input], events: Events) -> Iterator[None]:
    """Report a sample of each expression before the block, and capped values after it.

    Of ``inputs`` those that are expressions count.

    Nothing is refused for it: no merge is written, and to look at one is how its findings are judged.
    """
    from mergetool.comparison import preflight

    inputs = list(inputs)
    for model in inputs:
        for remark in model.remarks if model.plan is not None else ():
            events.note(remark)
    for finding in preflight.of_models(inputs):
        if finding.level == "note":
            events.finding(finding)
        else:
            events.note(finding.text)
    yield
    for model in inputs:
        capped = getattr(model.checkpoint, "capped", ())
        if capped:
            events.note(
                f'{model.name}: values of {len(capped)} tensors ("{capped[0]}", ...) were beyond their dtype and became its largest.'
            )
