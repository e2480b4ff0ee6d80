"""LoRAs added up, exactly or at a smaller rank, and written as one.

    with opened([("style.safetensors", Fraction(4, 5)), ("detail.safetensors", Fraction(-3, 10))]) as terms:
        combined = combine(gather(terms), Path("both.safetensors"), Exact())

A resize is the sum of one LoRA, recompressed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mergetool.adapters import output as lora_output
from mergetool.adapters.fused import joined
from mergetool.checkpoint.dtypes import DType
from mergetool.checkpoint.outputs import Target
from mergetool.checkpoint.stamp import display_names, stamp
from mergetool.engine.threads import asked
from mergetool.errors import DataError, NonFiniteError
from mergetool.lora.concatenation import WrittenSum, concatenated
from mergetool.lora.gathering import GatheredModule, Gathering, holding, total_of
from mergetool.lora.selection import Budget, ByRule, Exact, Fixed, Selection, ranks_within
from mergetool.lowrank.balanced import balanced, stored_residual
from mergetool.lowrank.low_rank import RankOf
from mergetool.lowrank.matrices import Matrix
from mergetool.ops.tensors import TORCH
from mergetool.options.multipliers import number, setting_text


@dataclass(frozen=True, slots=True)
class CombinedModule:
    """One module of the result.

    ``width`` is the sum of the ranks that were read (None where something other than a LoRA was), ``rank`` the one written.
    ``total`` is the squared Frobenius norm of the exact sum, ``energy`` the share that the kept singular values hold before they are
    rounded, ``residual`` the norm of what is stored minus the exact sum, over the sum's. ``wanted`` is the rank that a rule asked for,
    above ``rank`` where a cap stopped it; None without a rule.
    """

    name: str
    groups: frozenset[str]
    shape: tuple[int, int]
    width: int | None
    rank: int
    total: float
    energy: float
    residual: float
    dtype: DType
    wanted: int | None = None


@dataclass(frozen=True)
class Combined:
    """The modules that a run wrote, in file order, and those without any change. The latter are not written."""

    modules: list[CombinedModule]
    empty: list[str]

    @property
    def capped(self) -> list[CombinedModule]:
        """The modules whose rule asked for a higher rank than the cap allows."""
        return [one for one in self.modules if one.wanted is not None and one.wanted > one.rank]

    @property
    def residual(self) -> float:
        """The norm of the rounding error over that of the exact sums, all modules together."""
        whole = math.fsum(one.total for one in self.modules)
        return math.sqrt(math.fsum(one.residual**2 * one.total for one in self.modules) / whole) if whole else 0.0


T = TypeVar("T")
Made = tuple[CombinedModule, dict[str, Tensor]]
_NOTHING = 1e-24  # what rounding in float64 leaves of a sum of squares that is zero
Solve = Callable[[GatheredModule], Made]
Derive = Callable[[GatheredModule], Matrix]


def combine(
    gathering: Gathering,
    output: Path | Target,
    selection: Selection,
    *,
    dtype: DType | None = None,
    command: str = "merge",
    derive: Derive | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Combined:
    """Write the sum at ``output``: a whole file, or none.

    Without a ``dtype`` each module keeps that of its factors; with a budget all have the one that holds them. ``derive`` makes
    something else of a module than its sum. ``progress`` is told of every module, with a budget twice. Bytes do not depend on ``threads``. Raises OutputError, BusyError, StorageError,
    UsageError for a budget that is too small, DataError for what cannot be added and NonFiniteError.
    """
    target = lora_output.check(output, gathering.files, overwrite=overwrite)
    metadata = _metadata(gathering, selection, dtype, command)
    done: list[CombinedModule] = []
    empty: list[str] = []
    tensors: dict[str, Tensor] = {}
    with ThreadPoolExecutor(asked(threads), "combine", torch.set_num_threads, (1,)) as pool:
        try:
            solve = _solver(gathering, selection, dtype, derive, metadata, pool, progress)
            for outcome, made in _in_turn(pool, solve, gathering.modules, progress):
                if made:
                    done.append(outcome)
                    tensors |= made
                else:
                    empty.append(outcome.name)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if not tensors:
        names = " and ".join(f'"{term.file.name}"' for term in gathering.terms)
        raise DataError(f"{command} leaves nothing of {names} in any module; there is nothing to write.")
    if not gathering.family.keeps_names:  # whose names are as the first file spells them
        tensors = joined(tensors, gathering.family, gathering.terms[0].file.anatomy)
        tensors = lora_output.with_alphas_everywhere(tensors) if gathering.family.lora_alphas else tensors
    lora_output.write(target, tensors, metadata, gathering.files, overwrite=overwrite)
    return Combined(done, empty)


def source(module: GatheredModule) -> Matrix:
    """The sum of everything that is added to a module. Raises DataError for DoRA, and NonFiniteError."""
    return total_of(module.addends)


def _in_turn(
    pool: ThreadPoolExecutor,
    solve: Callable[[GatheredModule], T],
    modules: Iterable[GatheredModule],
    progress: Callable[[int], None],
) -> Iterator[T]:
    for result in pool.map(solve, modules):
        progress(1)
        yield result


def _solver(
    gathering: Gathering,
    selection: Selection,
    dtype: DType | None,
    derive: Derive | None,
    metadata: Mapping[str, str],
    pool: ThreadPoolExecutor,
    progress: Callable[[int], None],
) -> Solve:
    """Make the function that computes a module's tensors, once every rank that depends on other modules is known."""
    if isinstance(selection, Exact) and derive is None:
        return lambda module: _exact(module, dtype or module.dtype)
    of = derive or source
    if not isinstance(selection, Budget):
        if isinstance(selection, ByRule):
            return lambda module: _by_rule(
                module, of(module), selection, dtype or module.dtype, bare=derive is not None
            )
        rank = selection.rank if isinstance(selection, Fixed) else selection.rank_of
        return lambda module: _recompressed(module, of(module), rank, dtype or module.dtype, bare=derive is not None)
    one = dtype or holding(module.dtype for module in gathering.modules)
    spectra = list(_in_turn(pool, lambda module: of(module).spectrum(), gathering.modules, progress))
    ranks = ranks_within(selection, gathering.modules, spectra, one, metadata)
    return lambda module: _recompressed(module, of(module), ranks[module.part], one, bare=True)


def _exact(module: GatheredModule, dtype: DType) -> Made:
    stored = concatenated(module, TORCH[dtype])
    outcome = _outcome(module, stored.factors.width, stored.norm**2, 1.0, stored.residual, dtype)
    return outcome, _tensors(module, stored)


def _recompressed(module: GatheredModule, whole: Matrix, rank: int | RankOf, dtype: DType, *, bare: bool) -> Made:
    """The strongest directions; where those are all there are, the factors as they came, unless that would round more.

    ``bare`` allows no alpha, for which a budget left no room, or forbids the factors as they came.
    """
    decomposition = whole.truncated(rank, name=module.part)
    stored = WrittenSum(balanced(decomposition, TORCH[dtype]), 1.0, decomposition.total_energy**0.5, 0.0)
    residual = stored_residual(decomposition, stored.factors)
    if not bare and decomposition.lost_energy <= _NOTHING * decomposition.total_energy and module.width is not None:
        kept = _as_they_came(module, TORCH[dtype])
        if kept is not None and kept.factors.width <= decomposition.rank and kept.residual <= residual:
            stored, residual = kept, kept.residual
    outcome = _outcome(module, stored.factors.width, decomposition.total_energy, decomposition.share, residual, dtype)
    return outcome, _tensors(module, stored)


def _by_rule(module: GatheredModule, whole: Matrix, rule: ByRule, dtype: DType, *, bare: bool) -> Made:
    wanted = 0

    def rank_of(values: Tensor) -> int:
        nonlocal wanted
        wanted = rule.wanted(values)
        return rule.rank_of(values)

    outcome, tensors = _recompressed(module, whole, rank_of, dtype, bare=bare)
    return replace(outcome, wanted=wanted), tensors


def _as_they_came(module: GatheredModule, dtype: torch.dtype) -> WrittenSum | None:
    """The factors side by side; None where ``dtype`` is too narrow for one of them, which balanced factors need not be."""
    try:
        return concatenated(module, dtype)
    except NonFiniteError:
        return None


def _outcome(
    module: GatheredModule, rank: int, total: float, energy: float, residual: float, dtype: DType
) -> CombinedModule:
    return CombinedModule(module.part, module.groups, module.matrix, module.width, rank, total, energy, residual, dtype)


def _tensors(module: GatheredModule, stored: WrittenSum) -> dict[str, Tensor]:
    """A module's tensors by name; none for one that changes nothing."""
    down, up, rank = stored.factors.down, stored.factors.up, stored.factors.width
    if rank == 0 or not bool(up.any()) or not bool(down.any()):
        return {}
    kernel = module.shape[2:]
    if kernel:
        down, up = down.reshape(rank, module.shape[1], *kernel), up.reshape(*up.shape, *(1 for _ in kernel))
    tensors = {module.keys.down: down, module.keys.up: up}
    if stored.scale != 1 or module.keys.always_alpha:
        tensors[module.keys.alpha] = torch.tensor(stored.scale * rank, dtype=torch.float32)
    return tensors


def _metadata(gathering: Gathering, selection: Selection, dtype: DType | None, command: str) -> dict[str, str]:
    """The provenance of a sum: its LoRAs with strengths, and its cut; no path, host or time."""
    names = display_names([term.file.name for term in gathering.terms])
    recipe: dict[str, Any] = {
        "command": command,
        "loras": [{"name": names[term.file.name], "strength": number(term.strength)} for term in gathering.terms],
        **selection.recipe(),
    }
    if dtype is not None:
        recipe["dtype"] = dtype.name
    if gathering.multipliers:
        recipe["set"] = [setting_text(setting) for setting in gathering.multipliers]
    return stamp("lora", recipe, [(names[one.file.name], one.file.checkpoint.fingerprint()) for one in gathering.terms])
