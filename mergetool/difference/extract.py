"""Extract a difference LoRA, one matrix at a time: variant - base, or a set of two variants.

While matrices are decomposed, one a core, the next one is read; so memory is a few matrices and the factors themselves
(`difference.memory`; the factors are 400 MB for all of Z-Image at rank 64 in bf16).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from mergetool.adapters import output as lora_output
from mergetool.adapters.fused import joined
from mergetool.checkpoint import system
from mergetool.checkpoint.outputs import Target
from mergetool.checkpoint.stamp import stamp
from mergetool.difference.diff_files import DiffFiles
from mergetool.difference.layer import ExtractedLayer, Result
from mergetool.difference.on_device import Solved, free_memory, solve_all
from mergetool.difference.operands import Operand, decomposed
from mergetool.difference.pairs import Pair, Pairing, pair_up
from mergetool.difference.ranks import WithinBudget, stored_result, with_spectra
from mergetool.difference.spectra import SideFile
from mergetool.difference.stream import DeltaStream
from mergetool.difference.whole import Whole, tensors
from mergetool.engine.feeding.values import Reader
from mergetool.engine.inputs import Inputs
from mergetool.engine.threads import asked
from mergetool.errors import DataError, NonFiniteError, UsageError
from mergetool.options.differences import DiffOptions
from mergetool.options.table import recorded
from mergetool.recipe.provenance import NOT_FULL, files_of, names_of


@dataclass
class Extraction:
    """The result of a run: ``layers`` in file order, ``whole`` tensors, and lost energies.

    The energy of parts that were not decomposed is by reason.

    With a second variant that energy is of the first one's delta. ``searched`` are the names of the matrices whose directions had to be searched for, where a side file of spectra was used.
    """

    layers: list[ExtractedLayer] = field(default_factory=list)
    whole: list[Whole] = field(default_factory=list)
    searched: list[str] = field(default_factory=list)
    skipped: dict[str, dict[str, float]] = field(default_factory=dict)  # reason -> name -> squared Frobenius norm

    @property
    def total(self) -> float:
        """The squared Frobenius norm of the whole difference."""
        stored = sum(layer.total for layer in self.layers) + sum(one.energy for one in self.whole)
        return stored + sum(sum(names.values()) for names in self.skipped.values())


@contextmanager
def open_diff(
    base: str,
    variant: str,
    options: DiffOptions,
    *,
    skip_unmatched: bool = False,
    inputs: Inputs | None = None,
) -> Iterator[Pairing]:
    """Pair two models by name or path. They are closed at the end of the ``with`` block, except those of ``inputs``.

    Both variants may be LoRAs, in any spelling; their keys tell. A key without a match in the base is an error, or with ``skip_unmatched``
    listed. No tensor is read. Raises InputMissing, DataError, FamilyError, PatternError or UsageError.
    """
    with ExitStack() as stack:
        opened = inputs or Inputs(stack, skip_unmatched=skip_unmatched)
        model = opened.model(base)
        variants = [
            opened.change_or_model(name, model)
            for name in (variant, *([] if options.variant2 is None else [str(options.variant2)]))
        ]
        yield pair_up(model, variants[0], options, *variants[1:])


def extract(
    pairing: Pairing,
    output: Path | Target | DiffFiles,
    options: DiffOptions,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    reader: Reader = "auto",
    device: torch.device | None = None,
    memory: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> Extraction:
    """Decompose every matrix of ``pairing``, and publish the factors, whole or not at all.

    The factors go to ``output``, under the names of `formats.factors_of`. Whole differences go to ``options.full``, which is published first,
    and only if there are any. ``threads`` is the number of matrices worked on at once (default: one a core); the bytes do not depend on it.
    With a ``device`` it decomposes matrices there, in batches that take about ``memory`` bytes of it (0: four fifths of the free memory). The
    file is then the same but for the last bits of its values, which differ with device and batch. The CPU does the work named by `on_the_cpu`
    in any case.

    ``options.spectra`` is a side file: its directions are used without a search, and missing ones are added, at least as many of each matrix as
    may be kept. The output is the same as without the file.

    Raises NonFiniteError for NaN or infinity in an input, UsageError where no direction is to be kept or the side file belongs to other
    models, OutputError, BusyError, StorageError or DataError.
    """
    files = [file for model in pairing.inputs for file in model.checkpoint.files]
    to = output if isinstance(output, DiffFiles) else DiffFiles.checked(output, options, pairing, overwrite=overwrite)
    if on_the_cpu(options, pairing):
        device = None
    system.keep_freed_memory()
    side = SideFile() if to.spectra is None else SideFile.open(to.spectra.path, pairing, options.seed)
    stream = DeltaStream(pairing, asked(threads), reader)
    with ThreadPoolExecutor(1, "metadata") as background:
        early = background.submit(metadata_of, pairing, options)
        solved: list[Solved] = []
        for pair, energy, result in _solved(stream, options, side, early.result, device, memory, progress):
            if not math.isfinite(energy):
                raise _not_finite(pairing, pair)
            solved.append((pair, energy, result))
            progress(pairing.nbytes(pair))
    found, factors = _in_order(pairing, solved, options)
    write = partial(lora_output.write, inputs=files, overwrite=overwrite, threads=stream.threads)
    if to.full is not None and found.whole:
        values = tensors({one.name: one for one in found.whole}, pairing.base.anatomy)
        write(to.full, values, early.result())
    not_full = {NOT_FULL: "nothing differs"} if to.full is not None and not found.whole else {}
    write(to.lora, joined(factors, pairing.base.anatomy.family, pairing.base.anatomy), early.result() | not_full)
    side.save(files, stream.threads)
    found.searched = sorted(side.added)
    return found


def _solved(
    stream: DeltaStream,
    options: DiffOptions,
    side: SideFile,
    metadata: Callable[[], Mapping[str, str]],
    device: torch.device | None,
    memory: int,
    progress: Callable[[int], None],
) -> Iterator[Solved]:
    """Every pair, by the way that the options ask for."""
    pairing = stream.pairing
    if device is not None:
        return _on_device(stream, options, device, memory or free_memory(device))
    if options.budget:
        return WithinBudget(stream, options, metadata(), side, progress).solve()
    if side.kept:
        return with_spectra(stream, options, side)
    return stream.solved(pairing.pairs, options, partial(_decompose, pairing, options))


def on_the_cpu(options: DiffOptions, pairing: Pairing | None = None) -> str:
    """Name the options, or traits of a pairing, that need the CPU's path.

    The text is empty when a device can do the work.
    """
    if pairing is not None and not any(pair.is_plain for pair in pairing.decomposed):
        return "`variant2`" if pairing.second else "what is not two plain float tensors"
    if options.budget:
        return "`budget`"
    if options.spectra is not None:
        return "`spectra`"
    return "" if options.rank or options.share is not None else f"`rule={options.rule}`"


def _nothing(pairing: Pairing, options: DiffOptions) -> DataError:
    names = [model.name for model in pairing.variants]
    if len(names) > 1 and options.orthogonal:
        return DataError(
            f"nothing of the difference to {names[0]} is orthogonal to that to {names[1]}; there is nothing to write."
        )
    if len(names) > 1 and options.takes_common:
        return DataError(f"{names[0]} and {names[1]} have nothing in common in any matrix; there is nothing to write.")
    return DataError(
        f"{pairing.base.name} and {' and '.join(names)} do not differ in any matrix that was compared; "
        "there is nothing to write."
    )


def _in_order(
    pairing: Pairing, solved: Sequence[Solved], options: DiffOptions
) -> tuple[Extraction, dict[str, torch.Tensor]]:
    """The results, and the tensors to store, in the order of the pairs.

    Raises UsageError or DataError where nothing is to be stored.
    """
    found = Extraction()
    factors: dict[str, torch.Tensor] = {}
    place = {pair.name: i for i, pair in enumerate(pairing.pairs)}
    for pair, energy, result in sorted(solved, key=lambda one: place[one[0].name]):
        if isinstance(result, Whole):
            found.whole.append(result)
        elif result is not None:
            found.layers.append(result.layer)
            factors |= result.factors
        else:
            reason = pair.reason or ("nothing in common" if pairing.second and options.takes_common else "unchanged")
            found.skipped.setdefault(reason, {})[pair.name] = energy
    if found.layers and not factors:
        raise UsageError(f"no singular value is above {options.threshold:g}; lower `rank_thresh`.")
    if not factors:
        raise _nothing(pairing, options)
    return found, factors


def _on_device(stream: DeltaStream, options: DiffOptions, device: torch.device, memory: int) -> Iterator[Solved]:
    """Every pair, plain matrices by way of ``device`` and the rest here: quantised ones, LoRAs', and those that are not decomposed."""
    pairing, beside = stream.pairing, replace(stream, threads=1, reader="pread")
    others = [pair for pair in pairing.pairs if pair.reason or not pair.is_plain]

    def on_cpu(pairs: Sequence[Pair]) -> list[Solved]:
        return list(beside.solved(pairs, options, partial(_decompose, pairing, options))) if pairs else []

    with ThreadPoolExecutor(1, "others") as background:
        skipped = background.submit(on_cpu, others)
        yield from solve_all(pairing, options, device, memory, alone=lambda pair: on_cpu([pair])[0])
        yield from skipped.result()


def _decompose(pairing: Pairing, options: DiffOptions, pair: Pair, delta: Operand) -> Result:
    family = pairing.base.anatomy.family
    return stored_result(pair, options, family, lambda rule: decomposed(pair, delta, options, rule))


def _not_finite(pairing: Pairing, pair: Pair) -> NonFiniteError:
    names = [model.name for model in pairing.inputs]
    return NonFiniteError(
        f'tensor "{pair.name}" holds NaN or infinity in {", ".join(names[:-1])} or {names[-1]}; '
        "mend the file, or leave the tensor out with `exclude`."
    )


_CHOOSE_RANKS = ("rank", "budget", "rule", "rank_thresh", "rank_max")


def metadata_of(pairing: Pairing, options: DiffOptions) -> dict[str, str]:
    """The provenance of a difference: its models and its options, no path, host or time."""
    models_ = pairing.inputs
    names = names_of(models_)
    always = {"dtype": options.dtype, "min_dim": options.min_dim, "seed": options.seed}
    beside = {name: True for name in options.beside if name != "checkpoint"}  # directions of a file come through bf16
    said = {key: value for key, value in recorded(options).items() if key not in (*_CHOOSE_RANKS, *options.beside)}
    recipe = {"base": names[pairing.base.name], "variant": names[pairing.variant.name]} | always | said | beside
    recipe |= _ranks_recipe(options)
    if pairing.second is not None:
        recipe["variant2"] = names[pairing.second.name]
        recipe |= {"weights": list(options.weights)} if options.union else {}
    spec = {"modelspec.trigger_phrase": options.trigger} if options.trigger else {}
    return spec | stamp("diff", recipe, files_of(models_, lambda leaf: leaf.checkpoint.fingerprint()))


def _ranks_recipe(options: DiffOptions) -> dict[str, object]:
    """The choice of ranks, for the metadata."""
    if options.rank:
        return {"rank": options.rank}
    if options.budget:
        return {"budget": options.budget_bytes, "rank_max": options.cap}
    chosen: dict[str, object] = {"rule": options.rule, "rank_max": options.cap}
    return chosen if options.rule == "knee" else chosen | {"rank_thresh": options.threshold}
