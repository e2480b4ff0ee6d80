"""A family's names as a table: every module's name in each layout, its groups, its shape.

Names are compared component by component, the longest row decides, and what stands behind a row's name is carried over: ``x_embedder`` says
what ``x_embedder.weight`` and ``x_embedder.bias`` are called, and ``layers.1`` is no beginning of ``layers.10``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mergetool.arch.anatomy import is_number, natural_key

BLOCK = "{i}"
LEAVES = ("weight", "bias")
_PIECE = re.compile(r"(.+)\[(\d)\]")
Dimension = str | int
"""A number, or the name of one of a model's sizes, as ``dim`` and ``4*dim``."""


@dataclass(frozen=True, slots=True)
class Named:
    """A module, or a parameter, under its canonical name, with everything ``inside`` it. Names inside go on from there.

    ``{i}`` is a block's number. ``comfyui`` and ``diffusers`` are the names in those layouts where they are others; ``qkv[1]`` is the second
    piece, in row order, of a tensor that several rows share. ``groups`` hold whatever is beneath the name. ``shape`` is that of the
    weight, ``bias`` whether there is a vector of its rows beside it; of a ``tensor``, which is neither weight nor bias of a module, its own. Of a piece ``rows`` says how many rows it has: as many as the
    weight of that module, a name beside this one, has columns, or for ``=`` the fused one itself (``4*=``: four times as many); pieces
    without share the rest equally. They are whole heads of the length of ``heads``.
    """

    name: str
    comfyui: str | None = None
    groups: tuple[str, ...] = ()
    inside: tuple[Named, ...] = ()
    diffusers: str | None = None
    shape: tuple[Dimension, ...] | None = None
    bias: bool = False
    rows: str | None = None
    heads: str | None = None
    tensor: bool = False


@dataclass(frozen=True, slots=True)
class Spot:
    """A row of the table in full: its canonical ``path``, its names ``stored`` in each layout.

    A stored name comes with its piece of the tensor there. ``place`` and ``end`` are where the row stands, ``blocks``
    the places of the numbered rows around it.
    """

    named: Named
    path: tuple[str, ...]
    stored: Mapping[str, tuple[tuple[str, ...], int | None]]
    groups: frozenset[str]
    place: int
    end: int
    blocks: tuple[int, ...]

    def beside(self, name: str) -> tuple[str, ...]:
        """The path of a row whose name goes on from where this one's does."""
        return (*self.path[: len(self.path) - self.named.name.count(".") - 1], *name.split("."))


@dataclass(slots=True)
class _Node:
    after: dict[str, _Node] = field(default_factory=dict)
    spots: list[Spot] = field(default_factory=list)
    pieces: list[Spot] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Match:
    """The rows that a name was read as: the ``spots``, the numbers of blocks, and the rest.

    The longest row decides; spots are in row order where it is a fused tensor's. The rest is the components behind it.
    """

    spots: tuple[Spot, ...]
    numbers: tuple[str, ...]
    rest: tuple[str, ...]
    length: int
    shared: bool
    pieces: tuple[Spot, ...] = ()

    @property
    def divided(self) -> Match:
        """The same name as that of ``pieces``."""
        return Match(self.pieces, self.numbers, self.rest, self.length, shared=True)

    def name(self, path: Iterable[str]) -> str:
        """``path`` with these numbers and the components behind."""
        numbers = iter(self.numbers)
        return ".".join((*(next(numbers) if part == BLOCK else part for part in path), *self.rest))


class NameTable:
    """The rows ``names`` of a family, found by canonical name or by a layout's. The family has ``layouts``."""

    def __init__(self, names: Iterable[Named], layouts: Iterable[str]) -> None:
        self.layouts = tuple(layouts)
        self.spots: list[Spot] = []
        for named in names:
            self._add(named, (), dict.fromkeys(self.layouts, ()), frozenset(), ())
        self._canonical = _Node()
        self._stored = {layout: _Node() for layout in self.layouts}
        self._fused: dict[tuple[str, tuple[str, ...]], list[Spot]] = {}
        for spot in self.spots:
            _put(self._canonical, spot.path, [spot])
            for layout, (path, piece) in spot.stored.items():
                if piece is not None:
                    self._fused.setdefault((layout, path), []).append(spot)
                else:
                    _put(self._stored[layout], path, [spot])
                if path[-1] == "scale":  # some programs call a norm's scale weight, and all read either
                    _put(self._stored[layout], (*path[:-1], "weight"), [spot])
        for (layout, path), pieces in self._fused.items():
            pieces.sort(key=lambda spot: spot.stored[layout][1] or 0)
            _put(self._stored[layout], path, pieces, shared=True)

    def _add(
        self,
        named: Named,
        path: tuple[str, ...],
        above: Mapping[str, tuple[str, ...]],
        groups: frozenset[str],
        blocks: tuple[int, ...],
    ) -> None:
        path = (*path, *named.name.split("."))
        own = {"comfyui": named.comfyui, "diffusers": named.diffusers}
        stored: dict[str, tuple[tuple[str, ...], int | None]] = {}
        for layout in self.layouts:
            name, piece = own.get(layout) or named.name, None
            match = _PIECE.fullmatch(name)
            if match is not None:
                name, piece = match[1], int(match[2])
            stored[layout] = (*above[layout], *name.split(".")), piece
        place = len(self.spots)
        blocks = (*blocks, *(place for component in named.name.split(".") if component == BLOCK))
        self.spots.append(Spot(named, path, stored, groups | frozenset(named.groups), place, place, blocks))
        for inner in named.inside:
            self._add(
                inner, path, {layout: stored[layout][0] for layout in self.layouts}, self.spots[place].groups, blocks
            )
        spot = self.spots[place]
        self.spots[place] = Spot(named, path, stored, spot.groups, place, len(self.spots) - 1, blocks)

    def find(self, part: str) -> Match | None:
        """The row of a canonical name; None for one that the table does not know."""
        return _find(self._canonical, tuple(part.split(".")))

    def read(self, name: str, layout: str) -> Match | None:
        """The row of a tensor's name in a file of ``layout``.

        The longest of any layout decides, of equals that of the file's.
        """
        components = tuple(name.split("."))
        best = None
        for other in (layout, *(each for each in self.layouts if each != layout)):
            match = _find(self._stored[other], components)
            if match is not None and (best is None or match.length > best.length):
                best = match
        return best

    def stored(self, part: str, layout: str) -> tuple[str, int]:
        """The tensor that holds ``part`` in ``layout``, and which piece of it the part is."""
        match = self._plain(part, layout)
        if match is None:
            return part, 0
        path, piece = match.spots[0].stored[layout]
        return match.name(path), piece or 0

    def _plain(self, part: str, layout: str) -> Match | None:
        """The row of a part; for a component behind a piece that is no weight or bias, the piece's row."""
        components = tuple(part.split("."))
        match = _find(self._canonical, components)
        while match is not None and match.spots[0].stored[layout][1] is not None and match.rest not in _LEAF:
            match = _find(self._canonical, components, shorter=match.length)
        return match

    def pieces(self, part: str, layout: str) -> tuple[str, ...]:
        """The parts, in row order, of the tensor that holds ``part`` in ``layout``."""
        match = self._plain(part, layout)
        if match is None or match.spots[0].stored[layout][1] is None:
            return (part,)
        return tuple(match.name(spot.path) for spot in self._fused[layout, match.spots[0].stored[layout][0]])

    def order(self, part: str) -> tuple[object, ...]:
        """A total order on names: that of the rows, by number inside a block.

        A name in no row comes behind its neighbours in the table.
        """
        module, _, leaf = part.rpartition(".")
        last = (natural_key(module), LEAVES.index(leaf) if leaf in LEAVES else len(LEAVES), part)
        match = self.find(part)
        if match is None:
            return ((2 * len(self.spots), (), *last),)
        spot = match.spots[0]
        own = 2 * spot.end + 1 if spot.named.inside else 2 * spot.place
        blocks = ((2 * place, natural_key(number)) for place, number in zip(spot.blocks, match.numbers, strict=True))
        return (*blocks, (own, (), *last))


_LEAF = {(leaf,) for leaf in LEAVES}


def _put(root: _Node, path: tuple[str, ...], spots: Sequence[Spot], *, shared: bool = False) -> None:
    node = root
    for component in path:
        node = node.after.setdefault(component, _Node())
    (node.pieces if shared else node.spots).extend(spots)


def _find(root: _Node, components: tuple[str, ...], shorter: int = 1 << 30) -> Match | None:
    best: tuple[int, _Node, tuple[str, ...]] | None = None
    for length, node, numbers in _walk(root, components, 0, ()):
        fits = length < shorter and (node.spots or (node.pieces and components[length:] in _LEAF))
        if fits and (best is None or length > best[0]):
            best = length, node, numbers
    if best is None:
        return None
    length, node, numbers = best
    pieces = tuple(node.pieces) if components[length:] in _LEAF else ()
    found = Match(tuple(node.spots), numbers, components[length:], length, shared=False, pieces=pieces)
    return found if node.spots else found.divided


def _walk(
    node: _Node, components: tuple[str, ...], at: int, numbers: tuple[str, ...]
) -> Iterator[tuple[int, _Node, tuple[str, ...]]]:
    yield at, node, numbers
    if at == len(components):
        return
    literal = node.after.get(components[at])
    if literal is not None and components[at] != BLOCK:
        yield from _walk(literal, components, at + 1, numbers)
    if BLOCK in node.after and is_number(components[at]):
        yield from _walk(node.after[BLOCK], components, at + 1, (*numbers, components[at]))


def size_of(size: Dimension, sizes: Mapping[str, int]) -> int | None:
    """Count rows or columns by the sizes of a model. None where the model has no such size."""
    if isinstance(size, int):
        return size
    count, _, name = size.rpartition("*")
    return int(count or 1) * sizes[name] if name in sizes else None
