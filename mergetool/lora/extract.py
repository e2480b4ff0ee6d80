"""A difference LoRA: variant - base, or what two variants share, as low-rank factors, one matrix at a time.

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
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from mergetool import __version__, models
from mergetool.adapters import is_lora
from mergetool.arch import Family
from mergetool.checkpoint import system
from mergetool.checkpoint.inputs import InputFile
from mergetool.engine.job import open_change
from mergetool.engine.memory import default_threads
from mergetool.engine.reading import Method, PositionedFetcher, fetcher, too_large
from mergetool.errors import DataError, NonFiniteError, UsageError
from mergetool.lora import output as lora_file
from mergetool.lora.delta import Buffers, Delta
from mergetool.lora.layer import Layer, Result
from mergetool.lora.on_device import Solved, free_memory, solve_all
from mergetool.lora.operands import Operand, OperandReader, Subject, decomposed, subject
from mergetool.lora.pairs import DiffOptions, Pair, Pairing, pair_up
from mergetool.lora.svd import balanced_factors, stored_residual
from mergetool.lora.whole import Whole, tensors, whole
from mergetool.ops.cpu import TORCH
from mergetool.recipe.provenance import display_names
from mergetool.recipe.steps import Input


@dataclass
class Extraction:
    """What a run found: ``layers`` in file order, what was stored ``whole``, and the energy of what was not decomposed, by reason.

    With a second variant that energy is of the first one's delta.
    """

    layers: list[Layer] = field(default_factory=list)
    whole: list[Whole] = field(default_factory=list)
    skipped: dict[str, dict[str, float]] = field(default_factory=dict)  # reason -> name -> squared Frobenius norm

    @property
    def total(self) -> float:
        """The squared Frobenius norm of the whole difference."""
        stored = sum(layer.total for layer in self.layers) + sum(one.energy for one in self.whole)
        return stored + sum(sum(names.values()) for names in self.skipped.values())


@contextmanager
def open_diff(
    base: str, variant: str, options: DiffOptions, *, second: str | None = None, skip_unmatched: bool = False
) -> Iterator[Pairing]:
    """The pairing of two models by name or path; they are closed at the end of the ``with`` block.

    ``variant`` and ``second`` may be LoRAs, in any spelling, which their keys tell; what of one matches nothing in the base is an
    error, or with ``skip_unmatched`` named. Raises InputMissing, DataError, FamilyError, PatternError or UsageError; no tensor
    is read.
    """
    with ExitStack() as stack:
        model = _open(base, stack)
        variants = [
            open_change(name, model, stack, skip_unmatched=skip_unmatched)
            if is_lora(models.resolve(name).path)
            else _open(name, stack)
            for name in (variant, second)
            if name is not None
        ]
        yield pair_up(model, variants[0], options, *variants[1:])


def _open(name: str, stack: ExitStack) -> Input:
    opened = models.open_model(name)
    stack.enter_context(opened.checkpoint)
    return Input(name, opened.checkpoint, opened.anatomy)


def extract(
    pairing: Pairing,
    output: Path,
    options: DiffOptions,
    *,
    full: Path | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    method: Method = "auto",
    device: torch.device | None = None,
    memory: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> Extraction:
    """Decompose every matrix of ``pairing`` and publish the factors at ``output``: a whole file, or none.

    Factors are named by ``dialects.keys`` and stored in ``options.dtype``. What is stored whole goes to ``full``, which is
    published first, and not at all where there is nothing for it. ``threads`` is how many matrices are worked
    on at once (default: one a core); the bytes do not depend on it. With a ``device`` matrices are decomposed there, in batches
    that take about ``memory`` bytes of it (0: four fifths of what is free); the file is the same but for the last bits of its
    values, which differ with device and batch. Raises NonFiniteError for NaN or infinity in an input, OutputError,
    BusyError, StorageError or DataError.
    """
    files = [file for model in pairing.inputs for file in model.checkpoint.files]
    # The header is known only when all ranks are; a target that may not be written is refused before the work.
    for target in (output,) if full is None else (output, full):
        lora_file.check(target, files, overwrite=overwrite)
    if options.full != (full is not None) or full == output:
        raise UsageError("--full needs a file of its own for what is stored whole.")
    plain = any(pair.is_plain for pair in pairing.decomposed)
    device = device if plain else None  # which would have nothing to do
    system.keep_freed_memory()
    with ThreadPoolExecutor(1, "metadata") as background:
        # Beside a device nothing else needs this processor: 0.3 s for two models of 12 GB.
        early = None if device is None else background.submit(_metadata, pairing, options)
        solved = []
        for pair, energy, result in (
            _decomposed(pairing, pairing.pairs, options, files, method, threads or default_threads())
            if device is None
            else _on_device(pairing, options, files, device, memory or free_memory(device))
        ):
            if not math.isfinite(energy):
                raise _not_finite(pairing, pair)
            solved.append((pair, energy, result))
            progress(pairing.nbytes(pair))
    found, factors = _in_order(pairing, solved, options)
    if not factors:
        raise _nothing(pairing, options)
    metadata = early.result() if early else _metadata(pairing, options)
    if full is not None and found.whole:
        values = tensors({one.name: one for one in found.whole}, pairing.base.anatomy)
        lora_file.write(full, values, metadata, files, overwrite=overwrite, threads=threads or default_threads())
    lora_file.write(output, factors, metadata, files, overwrite=overwrite, threads=threads or default_threads())
    return found


def _nothing(pairing: Pairing, options: DiffOptions) -> DataError:
    names = [model.name for model in pairing.variants]
    if len(names) > 1 and not options.union:
        return DataError(f"{names[0]} and {names[1]} have nothing in common in any matrix; there is nothing to write.")
    return DataError(
        f"{pairing.base.name} and {' and '.join(names)} do not differ in any matrix that was looked at; "
        "there is nothing to write."
    )


def _in_order(
    pairing: Pairing, solved: Sequence[Solved], options: DiffOptions
) -> tuple[Extraction, dict[str, torch.Tensor]]:
    """What was found, and the tensors to store, in the order of the pairs."""
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
            reason = pair.reason or ("unchanged" if pairing.second is None or options.union else "nothing in common")
            found.skipped.setdefault(reason, {})[pair.name] = energy
    return found, factors


def _on_device(
    pairing: Pairing, options: DiffOptions, files: Sequence[InputFile], device: torch.device, memory: int
) -> Iterator[Solved]:
    """Every pair, plain matrices by way of ``device`` and the rest here: quantised ones, LoRAs', and those that are not decomposed."""
    others = [pair for pair in pairing.pairs if pair.reason or not pair.is_plain]

    def on_cpu(pairs: Sequence[Pair]) -> list[Solved]:
        return list(_decomposed(pairing, pairs, options, files, "pread", 1)) if pairs else []

    with ThreadPoolExecutor(1, "others") as background:
        skipped = background.submit(on_cpu, others)
        yield from solve_all(pairing, options, device, memory, alone=lambda pair: on_cpu([pair])[0])
        yield from skipped.result()


def _decomposed(
    pairing: Pairing,
    pairs: Sequence[Pair],
    options: DiffOptions,
    files: Sequence[InputFile],
    method: Method,
    threads: int,
) -> Iterator[Solved]:
    """Every one of ``pairs`` in order with its energy, and its result where it has one.

    One thread reads, ``threads`` decompose a matrix each, with torch's own threads off: no matrix waits for the serial
    part of another, nothing spins, and the bytes do not depend on the number of threads.
    """
    # Positioned reads into a buffer that is reused are half again as fast here as windows, which pay for new pages.
<<<<<<< HEAD
    reader = OperandReader(
        pairing, fetcher(method, list(files)) if method == "mmap" else PositionedFetcher(forgetful=too_large(files))
=======
    reader = DeltaReader(
        pairing, fetcher(method, list(files)) if method == "mmap" else PositionedFetcher(forgetful=too_large(files))
>>>>>>> main
    )
    free: queue.SimpleQueue[list[Buffers]] = queue.SimpleQueue()
    for _ in range(threads + 1):
        free.put([Buffers(_elements(pairs, of_lora=model.is_lora)) for model in pairing.variants])
    reading = ThreadPoolExecutor(1, "delta", torch.set_num_threads, (1,))
    workers = ThreadPoolExecutor(threads, "decompose", torch.set_num_threads, (1,))

    def solve(pair: Pair, operands: Sequence[Operand], buffers: list[Buffers]) -> tuple[float, Result | Whole | None]:
        try:
            return _solve(pair, operands, options, pairing.base.anatomy.family)
        finally:
            free.put(buffers)

    def read(pair: Pair) -> float | Future[tuple[float, Result | Whole | None]]:
        if pair.reason and not pair.whole:
            return reader.energy(pair)  # waits for no buffer and no worker
        buffers = free.get()
        try:
            operands = reader.read(pair, buffers)
        except BaseException:
            free.put(buffers)
            raise
        return workers.submit(solve, pair, operands, buffers)

    try:
        for pair, started in [(pair, reading.submit(read, pair)) for pair in pairs]:
            found = started.result()
            yield pair, *((found, None) if isinstance(found, float) else found.result())
    finally:
        reading.shutdown(cancel_futures=True)
        workers.shutdown(cancel_futures=True)


def _elements(pairs: Sequence[Pair], *, of_lora: bool) -> int:
    """Elements of the largest delta that is read into a buffer; a LoRA's matrices are not."""
    return max(
        (
            pair.base.numel
            for pair in pairs
            if (pair.whole or not pair.reason) and not (of_lora and len(pair.base.shape) > 1)
        ),
        default=0,
    )


def _solve(
    pair: Pair, operands: Sequence[Operand], options: DiffOptions, family: Family
) -> tuple[float, Result | Whole | None]:
    """The energy of what is stored of a pair, or of its first delta where that is nothing, and what it decomposed into."""
    for operand in operands:
        if isinstance(operand, Delta) and not math.isfinite(operand.energy):
            return operand.energy, None
    found = subject(pair, operands, options)
    energy = found.energy
    if energy == 0 or not math.isfinite(energy):
        return found.energies[0] if math.isfinite(energy) else energy, None
    if pair.whole:
        return energy, whole(pair, found.delta, energy, TORCH[options.dtype])
    return energy, _result(pair, found, options, family)


def _result(pair: Pair, found: Subject, options: DiffOptions, family: Family) -> Result:
    kept = decomposed(pair, found.delta, options)
    if kept.rank == 0:
        return Result.nothing(pair, found.energy)
    down, up = balanced_factors(kept, TORCH[options.dtype])
    result = Result.of(pair, kept, down, up, stored_residual(kept, down, up), family)
    if found.shared is None:
        return result
    first, second = (found.shared / energy if energy else 0.0 for energy in found.energies)
    return replace(result, layer=replace(result.layer, shared=(first, second)))


def _not_finite(pairing: Pairing, pair: Pair) -> NonFiniteError:
    names = [model.name for model in pairing.inputs]
    return NonFiniteError(
        f'tensor "{pair.name}" holds NaN or infinity in {", ".join(names[:-1])} or {names[-1]}; '
        "mend the file, or leave the tensor out with --exclude."
    )


def _metadata(pairing: Pairing, options: DiffOptions) -> dict[str, str]:
    """Provenance: what was subtracted from what, and how; no path, host or time."""
    models_ = pairing.inputs
    names = display_names([model.name for model in models_])
    recipe: dict[str, object] = {
        "base": names[pairing.base.name],
        "variant": names[pairing.variant.name],
        "dtype": options.dtype.name,
        "min_dim": options.min_dim,
        "seed": options.seed,
    }
    recipe |= (
        {"rank": options.rank} if options.rank else {"rank_thresh": options.rank_thresh, "rank_max": options.rank_max}
    )
    patterns = (("include", options.include), ("exclude", options.exclude), ("full_layer", options.full_layers))
    recipe |= {key: list(v) for key, v in patterns if v}
    if options.full:
        recipe["full"] = True
    if pairing.second is not None:
        recipe |= {"variant2": names[pairing.second.name]}
        recipe |= {"union": True, "weights": list(options.weights)} if options.union else {}
    prints = [{"name": names[m.name], "fingerprint": m.checkpoint.fingerprint()} for m in models_]
    return {
        "format": "pt",
        "mergetool.version": __version__,
        "mergetool.diff": json.dumps(recipe, sort_keys=True),
        "mergetool.inputs": json.dumps(prints, sort_keys=True),
    }
