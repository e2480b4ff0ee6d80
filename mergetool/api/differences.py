"""The difference of two models as a LoRA."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mergetool.api import merges
from mergetool.api.computed import told
from mergetool.api.events import Bar, Events, Request
from mergetool.api.functions import called
from mergetool.api.merges import Planned
from mergetool.options.differences import DiffOptions
from mergetool.options.kinds import ModelName, OutputPath
from mergetool.options.running import DiffRunOptions, MergeRunOptions
from mergetool.options.table import Option, part, values

if TYPE_CHECKING:
    from mergetool.adapters.loaders import Loading
    from mergetool.checkpoint.outputs import Target
    from mergetool.difference.diff_files import DiffFiles
    from mergetool.difference.extract import Extraction
    from mergetool.difference.pairs import Pairing


LONGEST_NAME = 60
"""Characters of a model in the name of a file."""


@dataclass(frozen=True)
class Diff(Request, DiffOptions, DiffRunOptions):
    """The difference of two models, ``variant - base``, as a LoRA."""

    base: Annotated[str, Option(help="The model that you will load the LoRA on.", section="Models", kind=ModelName())]
    variant: Annotated[
        str,
        Option(
            help="The model that base + LoRA should become, or a LoRA on the base.", section="Models", kind=ModelName()
        ),
    ]
    output: Annotated[
        str | os.PathLike[str] | None,
        Option(
            help="Write the LoRA to FILE.safetensors.",
            section="Output",
            kind=OutputPath(),
            short="-o",
            default="VARIANT-minus-BASE.safetensors, here",
        ),
    ] = None

    @property
    def name(self) -> str:
        """``output``, or the default name."""
        if self.output is not None:
            return os.fspath(self.output)
        from mergetool.checkpoint.stamp import display_names

        base, variant = _plain(self.base), _plain(self.variant)
        names = display_names([base, variant])
        return f"{names[variant]}-minus-{names[base]}.safetensors"


def _plain(model: str) -> str:
    """A file name for a model: the names in its expression, with dashes for characters that have a meaning to some system or shell."""
    from mergetool.checkpoint.stamp import display_names
    from mergetool.recipe.argument import expression_of

    expression = expression_of(model)
    if expression is None:
        return model
    text = expression.render(display_names([*expression.models, *expression.loras]))
    return re.sub(r"[^\w.]+", "-", text).strip("-")[:LONGEST_NAME]


@dataclass(frozen=True)
class Extracted:
    """A difference LoRA, written to ``output`` in ``seconds``.

    With ``dry_run`` it would be, and ``extraction`` is None.

    ``options`` have the whole names of the files beside it, ``loading`` says which releases load it whole.
    """

    output: Path
    options: DiffOptions
    extraction: Extraction | None = None
    loading: Sequence[Loading] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Paired:
    """A difference before it is taken: its pairs, its options and its target."""

    pairing: Pairing
    options: DiffOptions
    target: Target
    task: Any = None


def run_diff(asked: Diff, events: Events, *, keeps_current: bool = False) -> Extracted:
    """Take the difference ``variant - base`` as a LoRA; both variants may be LoRAs themselves.

    The result has rank, energy and residual of every matrix, and lists skipped parts. Raises MergetoolError: UsageError and PatternError for
    the request, InputMissing, DataError and FamilyError for inputs, OutputError, BusyError and StorageError for outputs, NonFiniteError for NaN
    and infinity.
    """
    from mergetool.checkpoint.outputs import lora_target
    from mergetool.difference.extract import open_diff
    from mergetool.making import state

    target = lora_target(asked.name)
    options = _named(part(DiffOptions, asked), events, target)
    with open_diff(asked.base, asked.variant, options, skip_unmatched=asked.skip_unmatched) as pairing:
        if keeps_current and state.of_diff(pairing, options, target) == state.CURRENT:
            events.current(target.path)
            return Extracted(target.path, options)
        return make(Paired(pairing, options, target), part(DiffRunOptions, asked), events)


def _named(options: DiffOptions, events: Events, target: Target) -> DiffOptions:
    """The options with whole names of the files beside the LoRA; notes tell of changed names."""
    from mergetool.checkpoint.outputs import lora_target

    beside = {name: lora_target(place, role=f"`{name}`") for name, place in options.beside.items()}
    for named in (target, *beside.values()):
        if named.note:
            events.note(named.note)
    whole: dict[str, Any] = {name: str(named.path) for name, named in beside.items()}
    return replace(options, **whole)


def make(paired: Paired, how: DiffRunOptions, events: Events) -> Extracted:
    """Take one difference, and bake it where the options say so.

    Every face comes through here. Raises what `run_diff` says.
    """
    from mergetool.adapters.loaders import loading_of
    from mergetool.comparison import headers
    from mergetool.difference import memory, on_device
    from mergetool.difference.diff_files import DiffFiles
    from mergetool.difference.extract import extract, on_the_cpu
    from mergetool.engine import device as devices

    started = time.monotonic()
    pairing, options, path = paired.pairing, paired.options, paired.target.path
    moved = pairing.bytes_to_read(options)
    device = devices.choose(how.device, work=moved, memory=how.gpu_bytes, kernels=False)
    only = on_the_cpu(options, pairing) if device.is_gpu else ""
    events.output(paired.task)
    events.plan(paired, memory.of_difference(pairing, options, how.threads, device))
    for variant in pairing.variants:
        for finding in () if variant.is_lora else headers.of_difference(variant, pairing.base):
            events.finding(finding)
    if only:
        events.note(f"{only} works on the CPU; the device is not used.")
    if how.dry_run:
        return Extracted(path, options)
    files = DiffFiles.checked(paired.target, options, pairing, overwrite=how.overwrite)
    with told(pairing.inputs, events), events.progress("diff", moved, publishes=files.checkpoint is None) as advance:
        extraction = extract(
            pairing,
            files,
            options,
            overwrite=how.overwrite,
            threads=how.threads,
            reader=how.reader,
            device=on_device.of(device),
            memory=how.gpu_bytes,
            progress=advance,
        )
    _bake(pairing, files, has_full=bool(extraction.whole), how=how, events=events)
    loading = loading_of(path, pairing.base.anatomy.family)
    extracted = Extracted(path, options, extraction, loading, time.monotonic() - started)
    events.done(paired, extracted)
    return extracted


def _bake(pairing: Pairing, files: DiffFiles, *, has_full: bool, how: DiffRunOptions, events: Events) -> None:
    """Write the base with the stored factors added, if the options say so; nothing needs guarding in it."""
    if files.checkpoint is None:
        return
    from mergetool.engine import job

    expression = files.baked(pairing.base.name, has_full=has_full)
    run = MergeRunOptions(**values(how), force=True, measure="off")
    with job.open_merge(expression) as plan:
        merges.make([Planned(plan, files.checkpoint)], run, _Bar(events), word="bake")


class _Bar(Events):
    """The events of another run, of which only the bar is shown."""

    def __init__(self, events: Events) -> None:
        self._events = events

    def progress(self, word: str, total: int, unit: str = "B", *, publishes: bool = False) -> Bar:
        """The bar of the whole run."""
        return self._events.progress(word, total, unit, publishes=publishes)


diff = called(Diff, run_diff, "diff")
