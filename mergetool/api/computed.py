"""What is told of models that are expressions: what a sample of them says, and what became of values that their dtype cannot hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mergetool.api.events import Events

if TYPE_CHECKING:
    from mergetool.recipe.steps import Input


@contextmanager
def told(inputs: Iterable[Input], events: Events) -> Iterator[None]:
    """Tell what a merge would be told of each of ``inputs`` that is one, before the block; after it what was capped in them.

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
