"""Divide the rows of a fused tensor into its pieces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mergetool.arch.table import Match, Spot

SizeOf = Callable[[str, int], int | None]
"""The length of a dimension of a module's weight, None where that is not known."""


class IndivisibleError(ValueError):
    """Rows do not divide; the message gives the right numbers."""


def divide(match: Match, rows: int, columns: int | None, size: SizeOf, *, equally: bool = False) -> list[int]:
    """The rows of each piece of a fused tensor of ``rows`` rows and ``columns`` columns. They are those of its weight.

    ``size`` looks into the model. With ``equally`` a piece whose size it does not know has the same share as others. Raises IndivisibleError.
    """
    wanted: list[int | None] = []
    for spot in match.spots:
        source = spot.named.rows
        own = own_columns(spot, columns)
        count = own if own is not None or not source else size(_module(match, spot, source), 1)
        if source and count is None and not equally:
            weight = "its weight" if source.endswith("=") else f'a tensor "{_module(match, spot, source)}.weight"'
            raise IndivisibleError(f"{weight}, whose columns are as many as the rows of {label(spot)}")
        wanted.append(count)
    shared = wanted.count(None)
    share, odd = divmod(rows - sum(count or 0 for count in wanted), shared or 1)
    if (odd if shared else share) or (shared and share <= 0) or 0 in wanted:
        raise IndivisibleError(_in_words(match.spots, wanted))
    counts = [share if count is None else count for count in wanted]
    for spot, count in zip(match.spots, counts, strict=True):
        head = size(_module(match, spot, spot.named.heads), 0) if spot.named.heads else None
        if head is not None and (head == 0 or count % head):
            said = ", ".join(f"{label(spot)} has {count}" for spot, count in zip(match.spots, counts, strict=True))
            raise IndivisibleError(f"whole heads of {head} rows ({said})")
    return counts


def sizes(shapes: Mapping[str, tuple[int, ...]]) -> SizeOf:
    """Dimensions of weights among ``shapes``, by canonical name.

    A block that lost one takes those of the first blocks of its stack.
    """

    def size(module: str, axis: int) -> int | None:
        stack, _, inner = module.partition(".")
        others = (f"{stack}.{number}.{inner.partition('.')[2]}" for number in ("0", "1"))
        for name in (module, *others):
            shape = shapes.get(f"{name}.weight", ())
            if len(shape) == axis + 1:
                return shape[axis]
        return None

    return size


def own_columns(spot: Spot, columns: int | None) -> int | None:
    """The rows of a piece that the ``columns`` of its fused weight tell; None where they do not."""
    count, is_own, _ = (spot.named.rows or "").partition("=")
    return int(count.removesuffix("*") or 1) * columns if is_own and columns is not None else None


def label(spot: Spot) -> str:
    """A piece in words: ``q`` for ``to_q``."""
    return spot.path[-1].removeprefix("to_")


def listed(names: Sequence[str], between: str = " and ") -> str:
    """Names in words."""
    *others, last = names
    return f"{', '.join(others)}{between if others else ''}{last}"


def _module(match: Match, spot: Spot, name: str) -> str:
    return Match(match.spots, match.numbers, (), match.length, match.shared).name(spot.beside(name))


def _in_words(spots: Sequence[Spot], wanted: Sequence[int | None]) -> str:
    sized = [f"{count} rows of {label(spot)}" for spot, count in zip(spots, wanted, strict=True) if count is not None]
    shared = [label(spot) for spot, count in zip(spots, wanted, strict=True) if count is None]
    if shared:
        sized.append(
            f"an equal number each of {' and of '.join(shared)}" if len(shared) > 1 else f"more of {shared[0]}"
        )
    return listed(sized)
