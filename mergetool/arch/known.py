"""The engine of families with data: it reads their tables and recognises their models."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from typing import Any, ClassVar

from mergetool.arch import encoders
from mergetool.arch.anatomy import Anatomy, Family, Part, Slice, is_number
from mergetool.arch.prefixes import Names
from mergetool.arch.rows import IndivisibleError, divide, label, listed, own_columns, sizes
from mergetool.arch.signs import Fp16, Like, Shapes, Signature, Variant
from mergetool.arch.table import BLOCK, Dimension, Match, Named, NameTable, size_of
from mergetool.checkpoint.header import TensorInfo
from mergetool.checkpoint.names import quoted
from mergetool.errors import FamilyError
from mergetool.quant.encoding import Encoding
from mergetool.quant.weights import side_tensors

__all__ = ["KnownFamily", "Like", "Shapes", "Signature", "Variant"]


class KnownFamily(Family):
    """A family that a table describes; a subclass is its data, and its few special cases.

    ``names`` are its modules in canonical order, ``signatures`` what shows it. ``measures`` are the model's sizes by the tensor and dimension that
    shows each, and `derived` are those that follow from them; with these the shapes of the table are a model's.
    """

    layouts = ("comfyui", "diffusers")
    names: tuple[Named, ...]
    signatures: tuple[Signature, ...]
    variants: tuple[Variant, ...] = ()  # the first that fits is a model's
    marked: ClassVar[Mapping[str, str]] = {}  # empty tensors by the key of diffusers' config.json that says the same
    measures: ClassVar[Mapping[str, tuple[str, int]]] = {}
    optional: frozenset[str] = frozenset()  # sizes that some models have not
    other_names: ClassVar[Mapping[str, tuple[str, ...]]] = {}  # of modules in LoRAs: the parts, in row order

    @cached_property
    def table(self) -> NameTable:
        """The table, ready for use."""
        return NameTable(self.names, self.layouts)

    # -- names ---------------------------------------------------------------------------------------------------------------

    def groups(self, part: str, shape: tuple[int, ...]) -> frozenset[str]:
        """The groups of a part, from its name alone."""
        match = self.table.find(part)
        return match.spots[0].groups if match else encoders.groups(part)

    def stored_name(self, part: str, layout: str) -> str:
        """The tensor that holds ``part``, alone or with others. Raises UsageError for a layout the family does not have."""
        self.check_layout(layout)
        return self.table.stored(part, layout)[0]

    def order(self, part: str) -> tuple[object, ...]:
        """The order of the table; inside a block as it reads there."""
        return self.table.order(part)

    def held(self, parts: Iterable[str], layout: str) -> dict[str, tuple[str, ...]]:
        """See `Family.held`: fused tensors have their pieces in the order of the layout."""
        self.check_layout(layout)
        stored: dict[str, list[tuple[int, str]]] = {}
        for part in sorted(set(parts), key=self.order):
            tensor, piece = self.table.stored(part, layout)
            stored.setdefault(tensor, []).append((piece, part))
        return {
            tensor: tuple(part for _, part in sorted(held, key=lambda one: one[0])) for tensor, held in stored.items()
        }

    def outputs(self, parts: Iterable[str], layout: str) -> list[tuple[str, tuple[str, ...]]]:
        """Stored tensors in canonical order with their parts. Raises FamilyError for a fused one of which some are not among ``parts``."""
        outputs = list(self.held(parts, layout).items())
        for tensor, held in outputs:
            wanted = self.table.pieces(held[0], layout)
            if held != wanted and len(wanted) > 1:
                missing = ", ".join(quoted(name) for name in wanted if name not in held)
                pieces = listed(
                    [label(spot) for name in wanted if (match := self.table.find(name)) for spot in match.spots]
                )
                raise FamilyError(
                    f"The {layout} layout stores {pieces} of a block as one tensor, but {missing} is missing "
                    f"for {quoted(tensor)}; take the missing tensors from another model, or use another layout."
                )
        return outputs

    def is_vector(self, part: str) -> bool:
        """See `Family.is_vector`; the part's row decides."""
        match = self.table.find(part)
        return match is not None and not match.rest and match.spots[0].named.tensor

    # -- reading a file ------------------------------------------------------------------------------------------------------

    def layout_of(self, shapes: Shapes, layout: str | None = None) -> str | None:
        """Name the layout of a file of the family; None for another file.

        Of several that it could be in it is ``layout``.
        """
        fitting = [signature.layout for signature in self.signatures if signature.fits(shapes)]
        return layout if layout in fitting else next(iter(fitting), None)

    def shows(self, tensors: Mapping[str, TensorInfo]) -> bool:
        """Whether ``tensors`` are of this family, by the `Signature` of one of its layouts.

        They go by the model's own names.
        """
        return self.layout_of({name: info.shape for name, info in tensors.items()}) is not None

    def read(
        self,
        names: Names,
        tensors: Mapping[str, TensorInfo],
        encodings: Mapping[str, Encoding],
        outside: Mapping[str, Part],
        *,
        source: str,
        layout: str | None = None,
    ) -> Anatomy:
        """Read the parts of a model that the family `shows`, in any of its layouts.

        ``tensors`` and ``encodings`` are under the model's own names; of two layouts with the same names it is ``layout``.

        Weights that their container pads to whole blocks have their true shapes, which the model's vectors tell. Missing and extra tensors are no error
        here: what to do about them is a merge's policy. Raises FamilyError where a tensor cannot be split, or two hold the same part.
        """
        shown = self.layout_of({name: info.shape for name, info in tensors.items()}, layout)
        layout = shown or self.layouts[0]
        encodings = self._unpadded(tensors, encodings, layout, source=source)
        tensors = {
            name: TensorInfo(info.dtype, encodings[name].shape, info.begin, info.end) if name in encodings else info
            for name, info in tensors.items()
        }
        codes = side_tensors(names.own, encodings)
        own = {stored: name for stored, name in names.own.items() if stored not in codes}
        matches = {name: self.table.read(name, layout) for name in own.values()}
        shapes = {
            _canonical(name, match): tensors[name].shape
            for name, match in matches.items()
            if not (match and match.shared)
        }
        parts: dict[str, Part] = {}
        for stored, name in own.items():
            for part in self._parts(stored, name, matches[name], tensors, shapes, encodings.get(name), source):
                if part.name in parts:
                    raise FamilyError(
                        f'"{source}": tensors {quoted(parts[part.name].stored.tensor)} and {quoted(stored)} both hold '
                        f"{quoted(part.name)}, where one is wanted; the file mixes two layouts, so save it again in one."
                    )
                parts[part.name] = part
        return Anatomy(
            self, layout, names.prefix, parts, outside, tuple(stored for stored in names.own if stored in codes)
        )

    def _parts(
        self,
        stored: str,
        name: str,
        match: Match | None,
        tensors: Mapping[str, TensorInfo],
        shapes: Shapes,
        encoding: Encoding | None,
        source: str,
    ) -> list[Part]:
        info = tensors[name]
        rows = info.shape[0] if info.shape else 1
        weight = tensors.get(f"{name.rpartition('.')[0]}.weight")
        columns = weight.shape[1] if weight is not None and len(weight.shape) > 1 else None
        if match is not None and match.pieces and _comes_out(match.divided, rows, columns):
            match = match.divided
        if match is None or not match.shared:
            part = _canonical(name, match)
            shape = (1, *info.shape) if len(info.shape) == 1 and self.is_vector(part) else info.shape
            return [Part(part, shape, info.dtype, Slice(stored, 0, rows), encoding)]
        try:
            counts = divide(match, info.shape[0] if info.shape else 0, columns, sizes(shapes))
        except IndivisibleError as wanted:
            raise FamilyError(
                f'"{source}": tensor {quoted(name)} has shape {list(info.shape)}, which cannot be split into '
                f"{listed(list(map(label, match.spots)))}: wanted {wanted}; the file is damaged or another architecture."
            ) from None
        parts, row = [], 0
        for spot, count in zip(match.spots, counts, strict=True):
            shape = (count, *info.shape[1:])
            parts.append(Part(match.name(spot.path), shape, info.dtype, Slice(stored, row, count), encoding))
            row += count
        return parts

    def markers(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """See `Family.markers`."""
        return tuple(name for key, name in self.marked.items() if config.get(key) is True)

    def variant(self, anatomy: Anatomy, config: Mapping[str, Any] | None = None) -> str | None:
        """See `Family.variant`: the first of ``variants`` that fits."""
        found = self._variant(anatomy, config)
        return None if found is None else found.name

    def in_fp16(self, anatomy: Anatomy) -> Fp16:
        """See `Family.in_fp16`."""
        found = self._variant(anatomy)
        return (found and found.fp16) or self.fp16

    def _variant(self, anatomy: Anatomy, config: Mapping[str, Any] | None = None) -> Variant | None:
        shapes = {name: part.shape for name, part in anatomy.parts.items()}
        shapes |= dict.fromkeys(self.markers(config or {}), (0,))
        return next((variant for variant in self.variants if variant.fits(shapes)), None)

    # -- shapes --------------------------------------------------------------------------------------------------------------

    def derived(self, sizes: dict[str, int]) -> dict[str, int]:
        """``sizes`` of a model with those that follow from them."""
        return sizes

    def shapes(self, sizes: Mapping[str, int], layout: str) -> dict[str, tuple[int, ...]]:
        """Every tensor of a model of ``sizes`` with its shape, in canonical order, without prefix.

        A stack of blocks has as many as ``sizes`` says under its name (``layers``). Raises UsageError for a layout the family does not have.
        """
        parts = self._part_shapes(sizes)
        return {
            tensor: (sum(parts[name][0] for name in held), *parts[held[0]][1:])
            for tensor, held in self.outputs(parts, layout)
        }

    def _part_shapes(self, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """The parts of a model of ``sizes``; a row of which one is missing is no part of it."""
        parts: dict[str, tuple[int, ...]] = {}
        for spot in self.table.spots:
            counted = [size_of(size, sizes) for size in spot.named.shape or ()]
            shape = tuple(size for size in counted if size is not None)
            if not shape or len(shape) < len(counted):
                continue
            for path in _numbered(spot.path, sizes):
                is_tensor = spot.named.tensor or path.endswith(".weight")
                parts[path if is_tensor else f"{path}.weight"] = shape
                if spot.named.bias:
                    parts[f"{path}.bias"] = shape[:1]
        return parts

    def measured(self, shapes: Shapes) -> dict[str, int] | None:
        """The sizes of a model by the ``shapes`` of its parts.

        None where a tensor that shows one is missing. What `optional` names may be.
        """
        found: dict[str, int] = {}
        for size, (name, axis) in self.measures.items():
            shape = shapes.get(name, ())
            if axis < len(shape):
                found[size] = shape[axis]
            elif size not in self.optional:
                return None
        stacks = {spot.path[: spot.path.index(BLOCK)] for spot in self.table.spots if BLOCK in spot.path}
        for stack in stacks:
            found[".".join(stack)] = _depth(shapes, stack)
        return self.derived(found)

    def config(self, anatomy: Anatomy) -> dict[str, Any] | None:
        """See `Family.config`; None when a tensor that shows a size is missing."""
        sizes = self.measured({name: part.shape for name, part in anatomy.parts.items()})
        return None if sizes is None else self.config_of(sizes, anatomy.parts)

    def config_of(self, sizes: Mapping[str, int], parts: Collection[str]) -> dict[str, Any] | None:
        """Make the config.json of a model that has such sizes and parts.

        It is None where they do not tell.
        """
        return None

    def parts_to_depth(self, depth: int, modules: Collection[str]) -> list[str]:
        """The parts of a model with ``depth`` blocks in every stack, optional ones included."""
        depths = {
            ".".join(spot.path[:i]): depth for spot in self.table.spots for i, c in enumerate(spot.path) if c == BLOCK
        }
        every = {str(size).rpartition("*")[2]: 1 for spot in self.table.spots for size in spot.named.shape or ()}
        return list(self._part_shapes({**every, **depths}))

    def pieces(self, part: str, layout: str) -> tuple[str, ...]:
        """See `Family.pieces`."""
        return self.table.pieces(part, layout)

    def rows_by_columns(self, part: str, columns: int | None) -> int | None:
        """See `Family.rows_by_columns`."""
        match = self.table.find(part)
        return None if match is None else own_columns(match.spots[0], columns)

    def rows_beside(self, part: str, rows: Mapping[str, int]) -> int | None:
        """See `Family.rows_beside`: as many as another of the same size in the table."""
        size = self._rows_in_table(part)
        return next((count for other, count in rows.items() if self._rows_in_table(other) == size), None)

    def _rows_in_table(self, part: str) -> Dimension | None:
        match = self.table.find(part)
        return match.spots[0].named.shape[0] if match and match.spots[0].named.shape else None

    def alternative(self, part: str, module: str, rows: int, columns: int) -> tuple[str, ...]:
        """See `Family.alternative`: the pieces of a row where its rows divide into them.

        Their order is that of the layout that calls it ``module``.
        """
        for layout in self.layouts:
            stored = self.stored_name(part, layout)
            match = self.table.read(stored, layout)
            named = module.replace(".", "_").endswith(stored.removesuffix(".weight").replace(".", "_"))
            if named and match is not None and match.pieces and _comes_out(match.divided, rows, columns):
                return tuple(match.name(spot.path) for spot in match.pieces)
        return (part,)

    def aliases(self, parts: Collection[str]) -> dict[str, tuple[str, ...]]:
        """See `Family.aliases`: ``other_names``, of the blocks that ``parts`` are of."""
        names: dict[str, tuple[str, ...]] = {}
        for block in dict.fromkeys(".".join(part.split(".")[:2]) for part in parts):
            stack, _, number = block.partition(".")
            for name, held in self.other_names.items():
                if held[0].startswith(f"{stack}.{BLOCK}."):
                    names[name.replace(BLOCK, number)] = tuple(part.replace(BLOCK, number) for part in held)
        return names

    def divided(self, parts: Collection[str], rows: int, columns: int | None) -> list[int]:
        """See `Family.divided`: as the table says, as far as that needs no other tensor."""
        layout = next(
            (layout for layout in self.layouts if tuple(parts) == self.table.pieces(next(iter(parts)), layout)), None
        )
        match = layout and self.table.read(self.stored_name(next(iter(parts)), layout), layout)
        if not match:
            return super().divided(parts, rows, columns)
        return divide(
            match.divided if match.pieces and len(parts) > 1 else match,
            rows,
            columns,
            lambda module, axis: None,
            equally=True,
        )

    def _unpadded(
        self, tensors: Mapping[str, TensorInfo], encodings: Mapping[str, Encoding], layout: str, *, source: str
    ) -> dict[str, Encoding]:
        """``encodings`` with the true shapes of weights that their container pads to whole blocks; both under the model's own names.

        The model's vectors, which are never quantised, show its sizes. Raises FamilyError for a padded weight that no matrix
        of such a model becomes.
        """
        found = dict(encodings)
        if not found:
            return found
        shapes = {_canonical(name, self.table.read(name, layout)): info.shape for name, info in tensors.items()}
        measured = self.measured(shapes)
        for name, shape in (self.shapes(measured, layout) if measured else {}).items():
            encoding = encodings.get(name)
            if encoding is None or encoding.shape == shape or len(shape) != 2:
                continue
            if encoding.fits(shape):
                found[name] = encoding.cropped(shape)
            elif encoding.pads:
                raise FamilyError(
                    f'"{source}": tensor {quoted(name)} holds {list(encoding.padded)} values as {encoding.label}, where a matrix '
                    f"of {list(shape)} is wanted by the model's other tensors; use the unquantised original."
                )
        return found


def _comes_out(match: Match, rows: int, columns: int | None) -> bool:
    """Whether so many rows are those of the pieces, as far as the columns of the weight tell."""
    try:
        divide(match, rows, columns, lambda module, axis: None)
    except IndivisibleError:
        return False
    return True


def _canonical(name: str, match: Match | None) -> str:
    return name if match is None else match.name(match.spots[0].path)


def _numbered(path: tuple[str, ...], sizes: Mapping[str, int]) -> list[str]:
    """A row's names, one for every block; none where the depth is not known."""
    names: list[tuple[str, ...]] = [()]
    for i, component in enumerate(path):
        count = sizes.get(".".join(path[:i]), 0)
        numbers = tuple(map(str, range(count))) if component == BLOCK else (component,)
        names = [(*start, number) for start in names for number in numbers]
    return [".".join(name) for name in names]


def _depth(names: Iterable[str], stack: tuple[str, ...]) -> int:
    """The number of numbered blocks in the stack."""
    paths = (name.split(".") for name in names)
    at = len(stack)
    return len({path[at] for path in paths if len(path) > at + 1 and tuple(path[:at]) == stack and is_number(path[at])})
