"""Upper bounds on the memory of a difference, from shapes alone.

Ranks are known only when matrices are decomposed, so that every matrix is counted at the largest rank that its options allow. Numbers of bytes are of
arrays that live at the same time; a test holds that runs stay below them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mergetool.difference.budget import FIRST_GUESS, uniform_rank
from mergetool.difference.directions import rule_of
from mergetool.difference.operands import largest_dense
from mergetool.difference.pairs import Pair, Pairing
from mergetool.engine.device import CPU, Device
from mergetool.engine.job import BASE_MEMORY
from mergetool.engine.threads import asked
from mergetool.lowrank.krylov import fast_bfloat16
from mergetool.lowrank.range_finder import BASIS_PER_RANK, LARGEST_BASIS
from mergetool.options.differences import DiffOptions

READING = 32 << 20  # windows of the files, and what is decoded of them
_PINNED = 16 << 20  # a page-locked buffer of `upload`
_LEAST_BASIS = 256  # rows that a search may need for a few directions
_GROWTH = 8  # rows of a basis for each direction, at most


def of_difference(pairing: Pairing, options: DiffOptions, threads: int | None = None, device: Device = CPU) -> int:
    """Bytes of anonymous memory that `extract` may come to take, the interpreter's among them."""
    workers = asked(threads)
    pairs = pairing.decomposed
    ranks = {pair.name: _most(pair, options, pairs) for pair in pairs}
    kept = sum(ranks[pair.name] * sum(pair.shape) for pair in pairs) * options.stored.itemsize
    directions = 0
    if options.budget:
        kept, directions = min(kept, options.budget_bytes), 2 * options.budget_bytes
    elif options.spectra is not None:
        directions = sum(2 * (ranks[pair.name] + 2) * min(pair.shape) for pair in pairs)
    whole = 2 * sum(pair.base.numel for pair in pairing.pairs if pair.whole) * options.stored.itemsize
    room = sum(largest_dense(pairing.pairs, pairing.variants)) * (4 + 2 * fast_bfloat16())
    work = largest((_of_pair(pair, ranks[pair.name], options) for pair in pairs), workers)
    if device.is_gpu:
        from mergetool.difference.on_device import READERS

        work, workers = largest((_of_pair(pair, ranks[pair.name], options) for pair in pairs), 1), 1
        room += 2 * READERS * _PINNED
    computed = sum(model.checkpoint.memory for model in pairing.inputs)
    return BASE_MEMORY + READING + (workers + 1) * room + work + kept + directions + whole + computed


def _most(pair: Pair, options: DiffOptions, pairs: Sequence[Pair]) -> int:
    """The largest rank that ``options`` allow a pair."""
    short = min(pair.shape)
    most = options.rank or options.cap or short
    if options.budget:
        guess = FIRST_GUESS * uniform_rank([one.shape for one in pairs], options.budget_bytes, options.stored)
        most = min(most, 4 * int(guess) + _LEAST_BASIS)
    return min(most, short)


def _of_pair(pair: Pair, rank: int, options: DiffOptions) -> int:
    """Bytes that one thread works in, besides the difference itself."""
    m, n = pair.shape
    searched = bool(options.rank or options.budget or not rule_of(options).needs_all)
    found = of_dense(m, n, rank, searched=searched, has_delta=True)
    return found + (24 * m * n if pair.second is not None else 0)


def of_dense(m: int, n: int, rank: int, *, searched: bool, has_delta: bool = False) -> int:
    """Bytes for a truncated decomposition of a matrix [m, n].

    Its search's basis, or the whole spectrum, counts, then the directions in float64.
    """
    short, long, exact = min(m, n), max(m, n), 4 if fast_bfloat16() else 8
    limit = int(LARGEST_BASIS * short)
    basis = min(limit, _GROWTH * rank + _LEAST_BASIS) if searched else 0
    bytes_taken = exact * basis * (2 * short + long) + 8 * basis * short + 32 * basis**2
    if not searched or BASIS_PER_RANK * rank > limit:
        bytes_taken += 80 * short**2 + 8192 * short
    return bytes_taken + 48 * rank * (m + n) + (0 if has_delta else 8 * m * n)


def largest(sizes: Iterable[int], count: int) -> int:
    """The sum of the ``count`` largest."""
    return sum(sorted(sizes, reverse=True)[:count])
