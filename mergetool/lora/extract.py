"""A difference LoRA: variant - base as low-rank factors, one matrix at a time.

While matrices are decomposed, one a core, the next one is read; so memory is a few matrices and the factors themselves
(400 MB for all of Z-Image at rank 64 in bf16).
"""

from __future__ import annotations

import json
import math
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from mergetool import __version__, models
from mergetool.checkpoint import system
from mergetool.checkpoint.inputs import InputFile
from mergetool.engine.memory import default_threads
from mergetool.engine.reading import Method, PositionedFetcher, fetcher, too_large
from mergetool.errors import DataError, NonFiniteError, UsageError
from mergetool.lora import output as lora_file
from mergetool.lora.choosing import WithinBudget, stored_result, with_spectra
from mergetool.lora.delta import Buffers, Delta, DeltaReader
from mergetool.lora.layer import Layer, Result
from mergetool.lora.on_device import Solved, free_memory, solve_all
from mergetool.lora.pairs import DiffOptions, Pair, Pairing, pair_up
from mergetool.lora.spectra import SideFile
from mergetool.lora.svd import Decomposition, decompose
from mergetool.recipe.provenance import display_names
from mergetool.recipe.steps import Input

T = TypeVar("T")


@dataclass
class Extraction:
    """What a run found: ``layers`` in file order, and the energy of what was not decomposed, by reason.

    ``searched`` are the names of the matrices whose directions had to be searched for, where a side file of spectra was used.
    """

    layers: list[Layer] = field(default_factory=list)
    searched: list[str] = field(default_factory=list)
    skipped: dict[str, dict[str, float]] = field(default_factory=dict)  # reason -> name -> squared Frobenius norm

    @property
    def total(self) -> float:
        """The squared Frobenius norm of the whole difference."""
        return sum(layer.total for layer in self.layers) + sum(sum(names.values()) for names in self.skipped.values())


@contextmanager
def open_diff(base: str, variant: str, options: DiffOptions) -> Iterator[Pairing]:
    """The pairing of two models by name or path; they are closed at the end of the ``with`` block.

    Raises InputMissing, DataError, FamilyError, PatternError or UsageError; no tensor is read.
    """
    with ExitStack() as stack:
        inputs = []
        for name in (base, variant):
            opened = models.open_model(name)
            stack.enter_context(opened.checkpoint)
            inputs.append(Input(name, opened.checkpoint, opened.anatomy))
        yield pair_up(inputs[0], inputs[1], options)


def extract(
    pairing: Pairing,
    output: Path,
    options: DiffOptions,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    method: Method = "auto",
    device: torch.device | None = None,
    memory: int = 0,
    spectra: Path | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Extraction:
    """Decompose every matrix of ``pairing`` and publish the factors at ``output``: a whole file, or none.

    Factors are named by ``dialects.keys`` and stored in ``options.dtype``. ``threads`` is how many matrices are worked
    on at once (default: one a core); the bytes do not depend on it. With a ``device`` matrices are decomposed there, in batches
    that take about ``memory`` bytes of it (0: four fifths of what is free); the file is the same but for the last bits of its
    values, which differ with device and batch; what `on_the_cpu` names is done on the CPU in any case.

    ``spectra`` is a side file: the directions that it has are not searched for again, those that it has not are added, at least
    ``options.rank`` or ``options.rank_max`` of each matrix. The output is the same as when they are found in the run.

    Raises NonFiniteError for NaN or infinity in an input, UsageError where no direction is to be kept or ``spectra`` belongs to other
    models, OutputError, BusyError, StorageError or DataError.
    """
    files = [file for model in (pairing.base, pairing.variant) for file in model.checkpoint.files]
    # The header is known only when all ranks are; a target that may not be written is refused before the work.
    lora_file.check(output, files, overwrite=overwrite)
    if spectra is not None:
        lora_file.check(spectra, files, overwrite=True)
        if spectra.absolute() == output.absolute():
            raise UsageError("--spectra and --output name the same file; give one of them another name.")
    if on_the_cpu(options, spectra):
        device = None
    system.keep_freed_memory()
    side = SideFile() if spectra is None else SideFile.open(spectra, pairing, options.seed)
    run = partial(_decomposed, pairing, files=files, method=method, threads=threads or default_threads())
    with ThreadPoolExecutor(1, "metadata") as background:
        early = background.submit(_metadata, pairing, options, spectra=spectra)
        solved: list[Solved] = []
        found_in: Iterator[Solved]
        if device is not None:
            found_in = _on_device(pairing, options, run, device, memory or free_memory(device))
        elif options.budget:
            found_in = WithinBudget(pairing, options, early.result(), side, run, progress).solve()
        elif spectra is not None:
            found_in = with_spectra(pairing, options, side, run)
        else:
            found_in = run(pairing.pairs, partial(_decompose, pairing, options))
        for pair, energy, result in found_in:
            if not math.isfinite(energy):
                raise _not_finite(pairing, pair)
            solved.append((pair, energy, result))
            progress(pair.base.nbytes + pair.variant.nbytes)
    found, factors = _in_order(pairing, solved)
    if found.layers and not factors:
        raise UsageError(f"no singular value is above {options.rank_thresh:g}; lower --rank-thresh.")
    if not factors:
        raise DataError(
            f"{pairing.base.name} and {pairing.variant.name} do not differ in any matrix that was looked at; "
            "there is nothing to write."
        )
    lora_file.write(output, factors, early.result(), files, overwrite=overwrite, threads=threads or default_threads())
    side.save(files, threads or default_threads())
    found.searched = sorted(side.added)
    return found


def on_the_cpu(options: DiffOptions, spectra: Path | None = None) -> str:
    """What of these options only the CPU's path can do, as the command line calls it; empty when a device can do them all."""
    if options.budget:
        return "--budget"
    if spectra is not None:
        return "--spectra"
    return "" if options.rank or options.share is not None else f"--rule {options.rule}"


def _in_order(pairing: Pairing, solved: Sequence[Solved]) -> tuple[Extraction, dict[str, torch.Tensor]]:
    """What was found, and the tensors to store, in the order of the pairs."""
    found = Extraction()
    factors: dict[str, torch.Tensor] = {}
    place = {pair.name: i for i, pair in enumerate(pairing.pairs)}
    for pair, energy, result in sorted(solved, key=lambda one: place[one[0].name]):
        if result is not None:
            found.layers.append(result.layer)
            factors |= result.factors
        else:
            found.skipped.setdefault(pair.reason or "unchanged", {})[pair.name] = energy
    return found, factors


def _on_device(
    pairing: Pairing, options: DiffOptions, run: partial[Iterator[Solved]], device: torch.device, memory: int
) -> Iterator[Solved]:
    """Every pair, the matrices by way of ``device`` and the rest, of which only the energy is wanted, here."""
    others = [pair for pair in pairing.pairs if pair.reason]

    def on_cpu(pairs: Sequence[Pair]) -> list[Solved]:
        work = partial(_decompose, pairing, options)
        return list(run(pairs, work, method="pread", threads=1)) if pairs else []

    with ThreadPoolExecutor(1, "others") as background:
        skipped = background.submit(on_cpu, others)
        yield from solve_all(pairing, options, device, memory, alone=lambda pair: on_cpu([pair])[0])
        yield from skipped.result()


def _decomposed(
    pairing: Pairing,
    pairs: Sequence[Pair],
    work: Callable[[Pair, Delta], T],
    *,
    files: Sequence[InputFile],
    method: Method,
    threads: int,
) -> Iterator[tuple[Pair, float, T | None]]:
    """Every one of ``pairs`` in order with its energy, and what ``work`` makes of its difference, unless that is zero or not finite.

    One thread reads, ``threads`` work on a matrix each, with torch's own threads off: no matrix waits for the serial
    part of another, nothing spins, and the bytes do not depend on the number of threads.
    """
    # Positioned reads into a buffer that is reused are half again as fast here as windows, which pay for new pages.
    reader = DeltaReader(
        pairing, fetcher(method, list(files)) if method == "mmap" else PositionedFetcher(forgetful=too_large(files))
    )
    free: queue.SimpleQueue[Buffers] = queue.SimpleQueue()
    for _ in range(threads + 1):
        free.put(Buffers(max((pair.base.numel for pair in pairs if not pair.reason), default=0)))
    reading = ThreadPoolExecutor(1, "delta", torch.set_num_threads, (1,))
    workers = ThreadPoolExecutor(threads, "decompose", torch.set_num_threads, (1,))

    def work_on(pair: Pair, delta: Delta, buffers: Buffers) -> T | None:
        try:
            usable = math.isfinite(delta.energy) and delta.energy > 0
            return work(pair, delta) if usable else None
        finally:
            free.put(buffers)

    def read(pair: Pair) -> tuple[float, Future[T | None] | None]:
        if pair.reason:
            return reader.energy(pair), None  # waits for no buffer and no worker
        buffers = free.get()
        try:
            delta = reader.read(pair, buffers)
        except BaseException:
            free.put(buffers)
            raise
        return delta.energy, workers.submit(work_on, pair, delta, buffers)

    try:
        for pair, started in [(pair, reading.submit(read, pair)) for pair in pairs]:
            energy, result = started.result()
            yield pair, energy, result.result() if result else None
    finally:
        reading.shutdown(cancel_futures=True)
        workers.shutdown(cancel_futures=True)


def _decompose(pairing: Pairing, options: DiffOptions, pair: Pair, delta: Delta) -> Result:
    def at(share: float | None) -> Decomposition:
        return decompose(
            delta.matrix,
            name=pair.name,
            rank=options.rank,
            rank_thresh=options.rank_thresh if share is None else share,
            rank_max=options.rank_max,
            seed=options.seed,
            sketch=delta.sketch,
            energy=delta.energy,
            rule=options.rule if share is None else "energy",
        )

    return stored_result(pair, options, pairing.base.anatomy.family, at)


def _not_finite(pairing: Pairing, pair: Pair) -> NonFiniteError:
    return NonFiniteError(
        f'tensor "{pair.name}" holds NaN or infinity in {pairing.base.name} or {pairing.variant.name}; '
        "mend the file, or leave the tensor out with --exclude."
    )


def _metadata(pairing: Pairing, options: DiffOptions, *, spectra: Path | None = None) -> dict[str, str]:
    """Provenance: what was subtracted from what, and how; no path, host or time."""
    models_ = [pairing.base, pairing.variant]
    names = display_names([model.name for model in models_])
    recipe: dict[str, object] = {
        "base": names[pairing.base.name],
        "variant": names[pairing.variant.name],
        "dtype": options.dtype.name,
        "min_dim": options.min_dim,
        "seed": options.seed,
    }
    recipe |= _ranks_recipe(options)
    if spectra is not None:
        recipe["spectra"] = True  # directions came through bf16, so the last bits are others
    recipe |= {key: list(v) for key, v in (("include", options.include), ("exclude", options.exclude)) if v}
    prints = [{"name": names[m.name], "fingerprint": m.checkpoint.fingerprint()} for m in models_]
    return {
        "format": "pt",
        "mergetool.version": __version__,
        "mergetool.diff": json.dumps(recipe, sort_keys=True),
        "mergetool.inputs": json.dumps(prints, sort_keys=True),
    }


def _ranks_recipe(options: DiffOptions) -> dict[str, object]:
    """How the ranks were chosen."""
    if options.rank:
        return {"rank": options.rank}
    if options.budget:
        return {"budget": options.budget, "rank_max": options.rank_max}
    chosen: dict[str, object] = {"rule": options.rule, "rank_max": options.rank_max}
    return chosen if options.rule == "knee" else chosen | {"rank_thresh": options.rank_thresh}
