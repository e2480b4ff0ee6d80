"""Pictures, made by one model or by two in a row."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mergetool.api.computed import told
from mergetool.api.events import Events, Request
from mergetool.api.functions import called
from mergetool.options.kinds import OutputPath
from mergetool.options.pictures import SampleOptions
from mergetool.options.running import OverwriteOptions
from mergetool.options.table import Option

if TYPE_CHECKING:
    from PIL.Image import Image

    from mergetool.sampler.session import MadePicture


@dataclass(frozen=True)
class Sample(Request, SampleOptions, OverwriteOptions):
    """Pictures of every prompt with every seed."""

    output: Annotated[
        str | os.PathLike[str] | None,
        Option(
            help="Write one picture to FILE.png, several to a folder.",
            section="Output",
            kind=OutputPath(),
            short="-o",
            default="sample.png or samples/",
        ),
    ] = None


@dataclass(frozen=True)
class Picture:
    """A picture, and every parameter that made it; ``unscaled`` is it before ``upscale``."""

    image: Image
    parameters: Mapping[str, Any]
    unscaled: Image | None = None


@dataclass(frozen=True, slots=True)
class Drawn:
    """The pictures that `Events.done` receives.

    There is a row for each prompt and seed, with the files they were written to, and how long that took.
    """

    made: Sequence[Sequence[MadePicture]]
    target: Path | None
    paths: Sequence[Path]
    seconds: float


def run_sample(asked: Sample, events: Events, *, always_writes: bool = False) -> list[Picture]:
    """Make a picture of every prompt with every seed, in that order, by one model or two stages.

    With a ``refiner`` each picture is the last stage's, one for each ``strength``; with ``upscale`` it is enlarged. They are written to ``output``, or without one, with
    ``always_writes``, to its default. The same seed gives the same picture. Options without effect are noted. Raises MergetoolError.
    """
    from mergetool.checkpoint.paths import typed
    from mergetool.sampler import settings, written

    started = time.monotonic()
    prepared = settings.prepare(asked)
    request = prepared.request
    target = None
    if asked.output is not None:
        target = Path(typed(os.fspath(asked.output)))
    elif always_writes:
        target = Path("samples" if request.many else "sample.png")
    if target is not None:
        written.require_target(
            target, many=request.many, enlarges=prepared.upscale is not None, overwrite=asked.overwrite
        )

    from PIL.Image import fromarray

    from mergetool.sampler import session  # torch and the libraries of models: what could be wrong was told before

    studio = session.opened(prepared)
    upscaler = session.opened_upscaler(prepared, studio)
    prepared = replace(prepared, device=studio.device, enlargement=None if upscaler is None else upscaler.stage)
    events.plan(prepared, 0)
    for note in prepared.notes:
        events.note(note)
    _tell_of_merges([asked.base, asked.refiner], events)
    with events.progress("sample", request.evaluations, "step") as advance:
        made = session.make(studio, request, progress=advance)
    if upscaler is not None:
        tiles = len(request.shots) * request.last * upscaler.tiles(request.size)
        with events.progress("upscale", tiles, "tile") as advance:
            made = session.enlarge(made, request, upscaler, progress=advance)
    paths = [] if target is None else written.write(made, target, many=request.many)
    for note in studio.notes:
        events.note(note)
    events.done(prepared, Drawn(made, target, paths, time.monotonic() - started))
    return [_shown(picture, fromarray) for row in made for picture in row[-request.last :]]


def _shown(made: MadePicture, image: Callable[[Any], Image]) -> Picture:
    unscaled = None if made.unscaled is None else image(made.unscaled)
    return Picture(image(made.picture), made.parameters, unscaled)


def _tell_of_merges(models: Sequence[str | None], events: Events) -> None:
    """Tell what a sample says of models that are expressions."""
    from mergetool.engine.inputs import Inputs
    from mergetool.recipe.argument import expression_of

    with ExitStack() as stack:
        inputs = Inputs(stack)
        named = dict.fromkeys(name for name in models if name is not None)
        with told([inputs.model(name) for name in named if expression_of(name) is not None], events):
            pass


sample = called(Sample, run_sample, "sample")
