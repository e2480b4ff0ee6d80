"""All checks of a merge one after the other: its weights, its pictures where they are wanted, and the page that shows both."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from mergetool.comparison import page
from mergetool.errors import CheckFailed
from mergetool.verification import looking, pictures
from mergetool.verification.looking import Wish
from mergetool.verification.pictures import PicturesReport
from mergetool.verification.report import render
from mergetool.verification.scores import clip_scorer
from mergetool.verification.weights import WeightsReport, check_weights

Bars = Callable[[str, int, str], AbstractContextManager[Callable[[int], None]]]
"""From a word, a total and its unit to a block in which progress is told by what was done since the last call."""


@dataclass(frozen=True)
class Verification:
    """Whether a merge is what its recipe says, and whether it makes pictures; ``left_out`` says why none were made."""

    output: str
    weights: WeightsReport
    pictures: PicturesReport | None
    left_out: str
    seconds: float

    @property
    def passed(self) -> bool:
        """Every check said yes."""
        return self.weights.sound and (self.pictures is None or self.pictures.passed)

    def require_passed(self) -> None:
        """Raises CheckFailed, naming what said no, unless all did say yes."""
        if not self.weights.sound:
            raise CheckFailed(f"{self.output} is not what its recipe says.")
        if self.pictures is not None and not self.pictures.passed:
            said = [verdict.name for verdict in self.pictures.verdicts if not verdict.passed]
            raise CheckFailed(f"{self.output} does not make the pictures it should ({', '.join(said)}).")


def verify(
    output: str,
    inputs: Mapping[str, str],
    wish: Wish,
    bars: Bars,
    *,
    with_images: bool | None,
    report: Path | None = None,
    clip: Path | None = None,
    threads: int | None = None,
    overwrite: bool = False,
) -> Verification:
    """Check a merge's weights, and its pictures: for True always, for False never, for None where that takes minutes.

    ``inputs`` maps recorded names to where those models are, ``report`` is an HTML file to write, ``clip`` a folder of a CLIP model. Raises
    what cannot be checked at all; what a check says no to is in the result.
    """
    started = time.monotonic()
    if report is not None:
        page.require_target(report, overwrite=overwrite)
    with bars("weights", 100, "%") as bar:
        percent = 0

        def advance(done: int, total: int) -> None:
            nonlocal percent
            bar(100 * done // total - percent)
            percent = 100 * done // total

        weights = check_weights(output, inputs=inputs, threads=threads, progress=advance)
    looked, left_out = None, "not asked for"
    if with_images is not False:
        try:
            studio, look = looking.plan(output, weights.parents[weights.anchor], wish, patient=bool(with_images))
        except looking.NotLookedAt as reason:
            left_out = str(reason)
        else:
            left_out = ""
            scorer = None if clip is None else clip_scorer(clip)
            with bars("look", pictures.evaluations(look, len(weights.parents)), "step") as bar:
                looked = pictures.check_pictures(weights.parents, output, studio, look, scorer=scorer, progress=bar)
    if report is not None:
        page.write(report, render(Path(output).name, weights, looked, left_out=left_out))
    return Verification(output, weights, looked, left_out, time.monotonic() - started)
