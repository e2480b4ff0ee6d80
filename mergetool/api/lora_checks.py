"""Look into LoRAs: `lora_inspect`, `lora_verify` and `lora_interference`."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

from mergetool.api.computed import told
from mergetool.api.events import Events, Request
from mergetool.api.functions import called
from mergetool.api.loras import ALora, opened_lora
from mergetool.errors import UsageError
from mergetool.options.combining import LookUpOptions
from mergetool.options.kinds import File, Flag, ModelName, Models, Number, Strength
from mergetool.options.running import ThreadOptions, UnmatchedOptions
from mergetool.options.table import Option

if TYPE_CHECKING:
    from mergetool.adapters.describe import Contents
    from mergetool.adapters.dora_in_comfyui import Difference
    from mergetool.adapters.loaders import Loading
    from mergetool.adapters.lora_file import LoraFile
    from mergetool.lora.operations import Score
    from mergetool.lora.verify import LoraReport


@dataclass(frozen=True)
class LoraInterference(Request, ThreadOptions, UnmatchedOptions):
    """A request to score how much LoRAs, or differences, act on the same thing."""

    loras: Annotated[
        Sequence[str], Option(help="Two LoRAs or more; every pair gets a score.", kind=Models("LORA"), argument=True)
    ]
    base: Annotated[
        str | None,
        Option(help="Subtract this model from each; they may then be checkpoints.", section="Models", kind=ModelName()),
    ] = None
    signs: Annotated[
        bool, Option(help="Also count the elements that pull in opposite directions.", section="Checks", kind=Flag())
    ] = False

    def check(self) -> None:
        """Raises UsageError for fewer than two."""
        super().check()
        if len(self.loras) < 2:
            raise UsageError("give at least two LoRAs to compare.")


@dataclass(frozen=True)
class LoraVerify(Request, ThreadOptions):
    """Whether base + LoRA makes the tuned model."""

    base: Annotated[str, Option(help="The model that the LoRA is for.", kind=ModelName("BASE"), argument=True)]
    lora: ALora
    variant: Annotated[
        str, Option(help="The model that base + LoRA should be.", kind=ModelName("VARIANT"), argument=True)
    ]
    max_residual: Annotated[
        float | None,
        Option(
            help="End with exit code 1 if the residual after rounding is larger, e.g. than 0.1.",
            section="Checks",
            kind=Number(0),
        ),
    ] = None
    strength: Annotated[
        float | str | Fraction, Option(help="Strength of the LoRA.", section="Checks", kind=Strength())
    ] = 1


@dataclass(frozen=True)
class LoraInspect(Request, LookUpOptions):
    """A request to show what a LoRA holds, and who loads it."""

    lora: ALora
    plot: Annotated[
        str | os.PathLike[str] | None,
        Option(help="Draw the norms of all blocks as a heat map.", section="Output", kind=File("FILE.png")),
    ] = None
    overwrite: Annotated[bool, Option(help="Replace the picture if it exists.", section="Output", kind=Flag())] = False


@dataclass(frozen=True)
class PairScores:
    """The scores of two LoRAs, or differences, matrix by matrix.

    ``left_out`` are names with the reason.
    """

    first: str
    second: str
    scores: Sequence[Score]
    left_out: Sequence[tuple[str, str]]
    warnings: Sequence[str]


@dataclass(frozen=True)
class LoraVerified:
    """The residual that a LoRA leaves, and the bytes read in ``seconds``."""

    report: LoraReport
    bytes_read: int
    seconds: float
    max_residual: float | None

    @property
    def residual(self) -> float:
        """The overall residual after rounding."""
        return self.report.total(after=True)

    @property
    def passed(self) -> bool:
        """Whether the residual is as small as it has to be."""
        return self.max_residual is None or self.residual <= self.max_residual


@dataclass(frozen=True)
class LoraContents:
    """The contents of a LoRA, and which releases load it.

    Where a model is given, it says how far ComfyUI's formula of a DoRA leads from training's.
    """

    contents: Contents
    loading: Sequence[Loading]
    in_comfyui: Difference | None


def run_lora_interference(asked: LoraInterference, events: Events) -> list[PairScores]:
    """Score, pair by pair, how much LoRAs act on the same thing.

    With ``base`` they are models, and their differences to it are scored. Raises MergetoolError.
    """
    pairs = []
    for first, second in combinations(asked.loras, 2):
        of = _of_loras if asked.base is None else _of_differences
        pairs.append(of(first, second, asked, events))
        events.done(asked, pairs[-1])
    return pairs


def _of_loras(first: str, second: str, asked: LoraInterference, events: Events) -> PairScores:
    from mergetool.lora.gathering import gather, opened
    from mergetool.lora.operations import scores

    with opened([(first, Fraction(1)), (second, Fraction(1))]) as terms:
        gathering = gather(terms, skip_unmatched=asked.skip_unmatched)
        with events.progress("score", len(gathering.modules), " modules") as advance:
            modules = list(scores(gathering, signs=asked.signs, threads=asked.threads, progress=advance))
        left_out = [(name, reason) for name, reason, _ in gathering.left_out]
        return PairScores(first, second, modules, left_out, gathering.warnings)


def _of_differences(first: str, second: str, asked: LoraInterference, events: Events) -> PairScores:
    from mergetool.difference.extract import open_diff
    from mergetool.lora.operations import delta_scores
    from mergetool.options.differences import DiffOptions

    options = DiffOptions(variant2=second, orthogonal=True, min_dim=1)  # what only one of them changes is scored too
    with open_diff(str(asked.base), first, options, skip_unmatched=asked.skip_unmatched) as pairing:
        total = sum(map(pairing.nbytes, pairing.decomposed))
        with told(pairing.inputs, events), events.progress("score", total) as advance:
            modules = list(delta_scores(pairing, signs=asked.signs, threads=asked.threads, progress=advance))
        skipped = [(pair.name, pair.reason) for pair in pairing.pairs if pair.reason]
        return PairScores(first, second, modules, [*skipped, *pairing.left_out], [])


def run_lora_verify(asked: LoraVerify, events: Events) -> LoraVerified:
    """Compare base + LoRA with the tuned model, layer by layer, before and after rounding.

    Raises MergetoolError.
    """
    from mergetool.lora.verify import open_check, verify_lora

    started = time.monotonic()
    strength = cast(Fraction, asked.strength)
    with open_check(asked.base, str(asked.lora), asked.variant, strength=strength) as comparison:
        models = (comparison.base, comparison.variant)
        with told(models, events), events.progress("verify", comparison.bytes_read) as advance:
            report = verify_lora(comparison, threads=asked.threads, progress=advance)
        verified = LoraVerified(report, comparison.bytes_read, time.monotonic() - started, asked.max_residual)
        events.done(comparison, verified)
        return verified


def run_lora_inspect(asked: LoraInspect, events: Events) -> LoraContents:
    """Show what a LoRA holds: ranks, alphas, targets, norms, and who loads it whole. Raises MergetoolError."""
    from mergetool.adapters.describe import describe
    from mergetool.adapters.loaders import loading

    plot = cast("Path | None", asked.plot)
    if plot is not None:
        from mergetool.lora import plots

        plots.require_target(plot, overwrite=asked.overwrite)
    with opened_lora(asked.lora, asked.model) as file:
        with events.progress("norms", len(file.changes), "module") as advance:
            contents = describe(file, progress=advance)
        in_comfyui = None if contents.non_finite else _dora_difference(file, asked.model)
        if plot is not None:
            plots.write(plot, contents.targets, title=Path(asked.lora).name, overwrite=asked.overwrite)
        result = LoraContents(contents, loading(file), in_comfyui)
        events.done(file, result)
        return result


def _dora_difference(file: LoraFile, model: str | None) -> Difference | None:
    """Measure how far ComfyUI's formula leads from training's, if a model is given."""
    if model is None or not any("dora_scale" in adapter.tensors for adapter in file.adapters):
        return None
    from mergetool.adapters.dora_in_comfyui import difference
    from mergetool.engine.inputs import opened

    with opened(model) as base:
        return difference(file, base.anatomy, base.checkpoint)


lora_interference = called(LoraInterference, run_lora_interference, "lora_interference")
lora_verify = called(LoraVerify, run_lora_verify, "lora_verify")
lora_inspect = called(LoraInspect, run_lora_inspect, "lora_inspect")
