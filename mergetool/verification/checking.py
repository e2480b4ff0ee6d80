"""All checks of a merge one after the other: its weights, its pictures where they are wanted, and the page that shows both."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from mergetool.comparison import page
from mergetool.errors import CheckFailed, UsageError
from mergetool.verification import looking, pictures
from mergetool.verification.looking import Wish
from mergetool.verification.pictures import PicturesReport
from mergetool.verification.report import badge, render
from mergetool.verification.scores import clip_scorer
from mergetool.verification.weights import WeightsReport, check_weights, has_recipe, look_at_weights

Bars = Callable[[str, int, str], AbstractContextManager[Callable[[int], None]]]
"""From a word, a total and its unit to a block in which progress is told by what was done since the last call."""


@dataclass(frozen=True)
class Verification:
    """Whether a model is what its recipe says, and whether it makes pictures; ``left_out`` says why none were made."""

    output: str
    weights: WeightsReport
    pictures: PicturesReport | None
    left_out: str
    seconds: float

    @property
    def passed(self) -> bool | None:
        """Whether every check that was made said yes; None where none was made."""
        return {"passed": True, "failed": False}.get(badge(self.weights, self.pictures))

    def require_passed(self) -> None:
        """Raises CheckFailed, naming what said no, if anything did."""
        if self.weights.damage():
            wrong = "is not what its recipe says" if self.weights.derived else "holds NaN or infinity"
            raise CheckFailed(f"{self.output} {wrong}.")
        if self.pictures is not None and not self.pictures.passed:
            said = [verdict.name for verdict in self.pictures.verdicts if verdict.passed is False]
            raise CheckFailed(f"{self.output} does not make the pictures it should ({', '.join(said)}).")


def verify(
    output: str,
    inputs: Mapping[str, str],
    wish: Wish,
    bars: Bars,
    *,
    parents: Sequence[str] = (),
    with_images: bool | None,
    report: Path | None = None,
    clip: Path | None = None,
    threads: int | None = None,
    overwrite: bool = False,
) -> Verification:
    """Check a model's weights, and its pictures: for True always, for False never, for None where that takes minutes.

    The weights of a merge are derived again from its recipe; of another file they are measured against ``parents``. ``inputs`` maps recorded names to where those models are, ``report`` is an HTML file to write, ``clip`` a folder of a CLIP model. Raises
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

        if has_recipe(output):
            if parents:
                raise UsageError(
                    f"{output} records its own parents; leave out --parents, or compare the two with mergetool compare."
                )
            weights = check_weights(output, inputs=inputs, threads=threads, progress=advance)
        else:
            if inputs:
                raise UsageError(f"{output} carries no recipe whose inputs --input could name; name its --parents.")
            weights = look_at_weights(output, parents, threads=threads, progress=advance)
    looked, left_out = None, "not asked for"
    if with_images is not False:
        try:
            studio, look = looking.plan(
                output, next(iter(weights.parents.values()), output), wish, patient=bool(with_images)
            )
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
