"""Check a merge: its weights, its pictures where the options say so, and a page of both."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from mergetool import models
from mergetool.comparison import page
from mergetool.errors import CheckFailed, UsageError
from mergetool.models import OpenedModel
from mergetool.options.verifying import VerifyOptions
from mergetool.recipe import provenance
from mergetool.verification import looks, pictures
from mergetool.verification.pictures import PicturesReport
from mergetool.verification.replay import Replay, replay
from mergetool.verification.report import badge, render
from mergetool.verification.scores import clip_scorer
from mergetool.verification.weights import WeightsReport, check_weights, look_at_weights

Bars = Callable[[str, int, str], AbstractContextManager[Callable[[int], None]]]
"""A function from a word, a total and its unit to a block in which progress counts finished work."""


@dataclass(frozen=True)
class Verification:
    """The verdict on a model: the weights by its recipe, and the pictures. ``left_out`` says why no pictures were made.

    ``replay`` is the result for the whole file, where its bytes were compared.
    """

    output: str
    weights: WeightsReport
    replay: Replay | None
    pictures: PicturesReport | None
    left_out: str
    seconds: float

    @property
    def passed(self) -> bool | None:
        """Whether every check that was made said yes; None where none was made."""
        return {"passed": True, "failed": False}.get(badge(self.weights, self.pictures))

    def require_passed(self) -> None:
        """Raise CheckFailed, naming the failed checks, if any failed."""
        if self.replay is not None:
            self.replay.require_same(self.output)
        if self.weights.damage():
            wrong = "is not what its recipe says" if self.weights.derived else "holds NaN or infinity"
            raise CheckFailed(f"{self.output} {wrong}.")
        if self.pictures is not None and not self.pictures.passed:
            said = [verdict.name for verdict in self.pictures.verdicts if verdict.passed is False]
            raise CheckFailed(f"{self.output} does not make the pictures it should ({', '.join(said)}).")


def verify(output: str, asked: VerifyOptions, bars: Bars) -> Verification:
    """Check a model's weights, and its pictures.

    ``images`` makes them with True, never with False, and with None on a GPU or for a small model.

    The weights of a merge are derived again from its recipe, to the ``depth`` of bytes the whole file; those of another file are measured against
    ``parents``. Raises what cannot be checked at all; what a check says no to is in the result.
    """
    started = time.monotonic()
    if asked.page is not None:
        page.require_target(asked.page, overwrite=asked.overwrite)
    with bars("weights", 100, "%") as bar, models.open_model(output) as opened:
        weights, again = _weights(opened, asked, percent_of(bar))
    looked, left_out = None, "not asked for"
    if asked.images is not False:
        parent = next(iter(weights.parents.values()), output)
        try:
            studio, look = looks.plan(output, parent, asked, patient=bool(asked.images))
        except looks.NotLookedAt as reason:
            left_out = str(reason)
        else:
            left_out = ""
            scorer = None if asked.clip is None else clip_scorer(cast(Path, asked.clip))
            with bars("look", pictures.evaluations(look, len(weights.parents)), "step") as bar:
                looked = pictures.check_pictures(weights.parents, output, studio, look, scorer=scorer, progress=bar)
    if asked.page is not None:
        page.write(asked.page, render(Path(output).name, weights, looked, left_out=left_out))
    return Verification(output, weights, again, looked, left_out, time.monotonic() - started)


def _weights(
    opened: OpenedModel, asked: VerifyOptions, progress: Callable[[int, int], None]
) -> tuple[WeightsReport, Replay | None]:
    """Check the weights of an open file, and with a `depth` of bytes all of it."""
    output, inputs, threads = opened.name, asked.places, asked.threads
    if asked.depth == "bytes":
        again = replay(
            opened,
            inputs=inputs,
            write_to=asked.write_to,
            overwrite=asked.overwrite,
            threads=threads,
            progress=progress,
        )
        return again.weights, again
    if not provenance.is_recorded(opened.checkpoint.metadata):
        if inputs:
            raise UsageError(f"{output} carries no recipe, so `inputs` has no effect; name its `parents`.")
        return look_at_weights(opened, asked.parents, threads=threads, progress=progress), None
    if asked.parents:
        raise UsageError(
            f"{output} records its own parents; leave out `parents`, or compare the two with `mergetool compare`."
        )
    return check_weights(opened, inputs=inputs, threads=threads, progress=progress), None


def percent_of(advance: Callable[[int], None]) -> Callable[[int, int], None]:
    """Make of ``advance``, for a bar of 100, a function of done and total."""
    said = 0

    def tell(done: int, total: int) -> None:
        nonlocal said
        advance(100 * done // total - said)
        said = 100 * done // total

    return tell
