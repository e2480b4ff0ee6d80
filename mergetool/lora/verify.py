"""Does a LoRA make one model of another? base + strength * LoRA against the tuned model, streamed by tiles of rows.

For every parameter that both models have, with delta = tuned - base in float32,

    before = ||delta - strength * change|| / ||delta||           what the factors miss
    after  = ||tuned - round(base + strength * change)|| / ||delta||   that, and what the base's dtype misses when it is baked

``round`` is that of `mergetool lora bake` without options: to the base's dtype, and to bf16 where it is quantised. A parameter
that the LoRA leaves alone counts with all of its delta. Norms are Frobenius norms, summed in float64.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction

import torch

from mergetool import models
from mergetool.adapters import unmatched
from mergetool.adapters.loaders import Loading, loading
from mergetool.adapters.lora_file import LoraFile, open_lora
from mergetool.adapters.rows import ChangeRows, StackedRows, anatomy_of
from mergetool.adapters.whole import WholeRows
from mergetool.arch import Part, meeting
from mergetool.checkpoint.dtypes import BF16, F32
from mergetool.engine.feeding.values import ValueReader
from mergetool.engine.inputs import Inputs
from mergetool.engine.threads import TorchThreads, asked
from mergetool.errors import FamilyError, NonFiniteError
from mergetool.lowrank.norms import energy as energy_of
from mergetool.ops.cpu import CpuOps
from mergetool.ops.tensors import as_tensor
from mergetool.quant.encoding import Encoding
from mergetool.recipe.steps import Input, Window, window_of

TILE = 1 << 19
"""Elements of one step, in whole rows: 2 MB of float32 for each of five arrays a thread."""


@dataclass(frozen=True, slots=True)
class Residual:
    """One parameter: squared norms of its delta, and of the rest before and after rounding.

    Norms are Frobenius norms. ``changed`` says whether the LoRA changes it.
    """

    part: str
    groups: frozenset[str]
    changed: bool
    delta: float
    before: float
    after: float

    @property
    def relative_before(self) -> float:
        """The norm of the rest over that of the delta; infinite for a rest of no delta."""
        return _relative(self.before, self.delta)

    @property
    def relative_after(self) -> float:
        """The same after rounding."""
        return _relative(self.after, self.delta)


@dataclass(frozen=True)
class LoraReport:
    """The result of `verify_lora`.

    ``left_out`` are parameters that could not be compared, with the reason; ``unmatched`` keys of the LoRA that change
    nothing in the base.
    """

    residuals: tuple[Residual, ...]
    left_out: tuple[tuple[str, str], ...]
    unmatched: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    loading: tuple[Loading, ...]
    strength: float

    def total(self, *, after: bool = False, wanted: Callable[[Residual], bool] = lambda _: True) -> float:
        """The relative residual of all parameters that are ``wanted`` together."""
        chosen = [one for one in self.residuals if wanted(one)]
        left = math.fsum(one.after if after else one.before for one in chosen)
        return _relative(left, math.fsum(one.delta for one in chosen))


@dataclass(frozen=True)
class LoraCheck:
    """The two models and the LoRA, open, and the parameters that will be compared."""

    base: Input
    variant: Input
    lora: LoraFile
    changes: dict[str, Encoding]
    parts: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    strength: Fraction
    unmet: tuple[str, ...] = ()

    @property
    def bytes_read(self) -> int:
        """Bytes of both models that will be read."""
        models_ = (self.base, self.variant)
        return sum(model.anatomy.parts[part].nbytes for model in models_ for part in self.parts)


@contextmanager
def open_check(base: str, lora: str, variant: str, *, strength: Fraction = Fraction(1)) -> Iterator[LoraCheck]:
    """The three files, closed at the end of the ``with`` block; no tensor of the models is read.

    Raises what `Inputs.model` and `open_lora` raise, DataError for a LoRA that cannot be added to the base or changes nothing in it, and FamilyError for
    models of different families or shapes.
    """
    with ExitStack() as stack:
        opened = Inputs(stack)
        first, second = opened.model(base), opened.model(variant)
        file = stack.enter_context(open_lora(models.resolve(lora).path, name=lora, anatomy=first.anatomy))
        first = first.widened(file.widens)
        meeting.check_families(first, second)
        unmet = meeting.check(first, second)
        unmatched.require_match(file, base, skip_unmatched=True)
        parts, left_out = _comparable(first, second)
        changed = anatomy_of(file, first.anatomy, first.checkpoint).parts
        changes = {name: _scaled(part, strength) for name, part in changed.items()}
        yield LoraCheck(first, second, file, changes, parts, left_out, strength, tuple(unmet))


def verify_lora(
    check: LoraCheck, *, threads: int | None = None, progress: Callable[[int], None] = lambda _: None
) -> LoraReport:
    """Read both models once, on ``threads`` threads (default: one a core). Memory is some tiles and the factors of one parameter a thread.

    ``progress`` is told of bytes read, from this thread. Raises NonFiniteError for NaN or infinity in any of the three, naming the
    parameter, and what reading raises.
    """
    sizes = {part: _nbytes(check, part) for part in check.parts}
    count = asked(threads)
    files = [*check.base.checkpoint.files, *check.variant.checkpoint.files]
    local = threading.local()

    def measure(part: str) -> Residual:
        if not hasattr(local, "comparer"):
            local.comparer = _Comparer(check, ValueReader(files))
        found: Residual = local.comparer.measure(part)
        return found

    residuals = []
    # The parallelism is over parameters.
    with TorchThreads() as torch_threads, ThreadPoolExecutor(count, "verify", torch_threads.one) as pool:
        waiting = [pool.submit(measure, part) for part in check.parts]
        try:
            for part, future in zip(check.parts, waiting, strict=True):
                residuals.append(future.result())
                progress(sizes[part])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    file = check.lora
    return LoraReport(
        tuple(residuals),
        check.left_out,
        unmatched.left_aside(file),
        (*check.unmet, *file.warnings, *unmatched.remarks(file)),
        tuple(loading(file)),
        float(check.strength),
    )


class _Comparer:
    """One thread's buffers and way of reading."""

    def __init__(self, check: LoraCheck, values: ValueReader) -> None:
        self._check = check
        self._values = values
        width = max((check.base.anatomy.parts[part].shape[-1:] or (1,))[0] for part in check.parts)
        room = max(TILE, 64 * width)
        self._base, self._variant, self._change = (torch.empty(room) for _ in range(3))
        self._ops = CpuOps(capacity=room, registers=1)

    def measure(self, part: str) -> Residual:
        mine = self._check.base.anatomy.parts[part]
        change = self._check.changes.get(part)
        width = change.width if change is not None else 1
        tile = max(1, TILE // (64 * width)) * 64 * width
        energies = [0.0, 0.0, 0.0]
        for start in range(0, mine.numel, tile):
            for i, energy in enumerate(self._tile(mine, change, start, min(tile, mine.numel - start))):
                energies[i] += energy
        if not all(map(math.isfinite, energies)):
            raise self._not_finite(part)
        groups = self._check.base.anatomy.family.groups(part, mine.shape)
        return Residual(part, groups, change is not None, *energies)

    def _tile(self, mine: Part, change: Encoding | None, start: int, count: int) -> tuple[float, float, float]:
        check = self._check
        base, variant = self._base[:count], self._variant[:count]
        self._load(base, check.base, mine, start, slot=0)
        self._load(variant, check.variant, check.variant.anatomy.parts[mine.name], start, slot=1)
        difference = variant - base
        of_delta = energy_of(difference)
        dtype = BF16 if mine.encoding is not None else mine.dtype
        moved = self._ops.room(0, count)
        moved[:] = base.numpy()
        before = of_delta
        if change is not None:
            added = self._change[:count]
            self._add(change, start, added)
            difference.sub_(added)
            before = energy_of(difference)
            moved += added.numpy()
        stored, _ = self._ops.store(0, dtype)
        variant.sub_(as_tensor(stored, dtype).float())
        return of_delta, before, energy_of(variant)

    def _load(self, out: torch.Tensor, model: Input, part: Part, start: int, *, slot: int) -> None:
        window = window_of(slot, model, part)
        found = self._values.fetch(slot, model.checkpoint, window, start, out.numel())
        if found.is_plain:
            out.copy_(as_tensor(found.raw[0], found.dtype))
        else:
            found.decode(out.numpy())
        self._values.release(found)

    def _add(self, change: Encoding, start: int, out: torch.Tensor) -> None:
        """Add the LoRA's change at its strength, as `bake` does: the strength of a product is in its factors."""
        checkpoint = self._check.lora.checkpoint
        found = self._values.fetch(2, checkpoint, Window(2, change.tensor, 0, F32, change), start, out.numel())
        found.decode(out.numpy())
        if not isinstance(change, StackedRows | WholeRows):
            out.mul_(float(self._check.strength))

    def _not_finite(self, part: str) -> NonFiniteError:
        check = self._check
        return NonFiniteError(
            f'parameter "{part}" holds NaN or infinity in {check.base.name}, {check.variant.name} or '
            f"{check.lora.name}, or their sum overflows; mend that file."
        )


def _scaled(part: Part, strength: Fraction) -> Encoding:
    rows = part.encoding
    assert rows is not None
    if isinstance(rows, ChangeRows) and rows.is_product:
        return StackedRows.of([(strength, rows)])
    return rows


def _comparable(base: Input, variant: Input) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    parts, left_out = [], []
    for name, part in base.anatomy.parts.items():
        other = variant.anatomy.parts.get(name)
        if other is None:
            left_out.append((name, f"only in {base.name}"))
        elif not (part.dtype.blendable and other.dtype.blendable):
            left_out.append((name, f"{(other if part.dtype.blendable else part).dtype.name} is not a float"))
        elif part.shape != other.shape and name in base.anatomy.beside:
            left_out.append((name, "of another shape"))
        elif part.shape != other.shape:
            raise FamilyError(
                f'tensor "{name}" has shape {list(part.shape)} in {base.name} but {list(other.shape)} in {variant.name}; '
                "a LoRA leads to a model of equal shapes: pick the matching base."
            )
        else:
            parts.append(name)
    left_out += [(name, f"only in {variant.name}") for name in variant.anatomy.parts if name not in base.anatomy.parts]
    return tuple(parts), tuple(left_out)


def _nbytes(check: LoraCheck, part: str) -> int:
    return sum(model.anatomy.parts[part].nbytes for model in (check.base, check.variant))


def _relative(left: float, whole: float) -> float:
    return math.sqrt(left / whole) if whole else 0.0 if not left else math.inf


def worst(residuals: Sequence[Residual], count: int) -> list[Residual]:
    """List the largest residuals after rounding, in absolute terms."""
    return sorted((one for one in residuals if one.after), key=lambda one: -one.after)[:count]
