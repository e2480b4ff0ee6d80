"""Parts that the models of a merge have in two shapes, or that only some of them have.

* Of the weight that embeds a model's input the narrower ones are **padded** with zeros behind, where the rules of `arch.inputs` allow it and the
  wider models' factors add up to more than 0: ``tune + (inpaint - base)`` and ``inpaint + (tune - base)`` are one sum.
* A part that the anchor lacks is **carried**: by what the expression says of the models that have it where that is a model (of degree 1:
  ``vace`` in ``tune + (vace - base)``); as it is where one model has it, in a difference alone, at another positive factor: there is nothing
  to blend it with, and a norm or an embedder at half its size makes no half of a model. In other cases it is left out, and named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import prod

from mergetool.arch import Anatomy, Part, Slice
from mergetool.arch.inputs import own_row, wide_shapes
from mergetool.arch.prefixes import spelled
from mergetool.checkpoint.dtypes import F32
from mergetool.checkpoint.names import quoted
from mergetool.errors import FamilyError
from mergetool.options.multipliers import number
from mergetool.quant.zeros_behind import ZerosBehind
from mergetool.recipe.expression import Expression
from mergetool.recipe.graph import Model, Sum, Term, normal, own_factors
from mergetool.recipe.steps import Input, Window


@dataclass(frozen=True, slots=True)
class Padding:
    """A weight that gets zeros behind it in ``models``, where it has the ``shape``.

    ``tensor`` is its name in the anchor, ``wider`` are the models that have the shape ``to``; their further channels are in the sum ``factor`` times, all together.
    """

    tensor: str
    models: tuple[str, ...]
    shape: tuple[int, ...]
    wider: tuple[str, ...]
    to: tuple[int, ...]
    factor: Fraction

    def __str__(self) -> str:
        further = "" if self.factor == 1 else f"; the further channels come in {number(self.factor)} times"
        return (
            f"{quoted(self.tensor)} of {_listed(self.models)} is padded with zeros from {list(self.shape)} to {list(self.to)}, "
            f"the shape in {_listed(self.wider)}{further}"
        )


@dataclass(frozen=True)
class Unequal:
    """The parts that are ``padded`` or ``carried``; ``anatomy`` is the anchor's with the latter.

    A carried part comes with the sum to compute for it.
    """

    anatomy: Anatomy
    padded: Mapping[str, Padding] = field(default_factory=dict)
    carried: Mapping[str, Sum] = field(default_factory=dict)

    @classmethod
    def of(cls, expression: Expression, inputs: Sequence[Input]) -> Unequal:
        """Look at the models of ``expression``; the anchor is in front of ``inputs``."""
        first, graph = inputs[0], expression.graph
        models = [model for model in inputs if model.name in graph.models()]
        carried = {} if any(graph.calls()) else _carried(expression, first, models)
        anatomy, found = _with(first, models, carried)
        return cls(anatomy, dict(_padded(graph, first, models)), {name: carried[name] for name in found})

    def shape(self, part: Part) -> tuple[int, ...]:
        """The shape that a part has in the merge."""
        return self.padded[part.name].to if part.name in self.padded else part.shape

    def window(self, window: Window, part: Part) -> Window:
        """The ``window`` of ``part``, one model's, with the zeros behind its rows that it needs."""
        width = prod(self.shape(part)[1:])
        if part.name not in self.padded or own_row(part) == width:
            return window
        rows = ZerosBehind.of(window.tensor, part.shape[0], own_row(part), width, window.dtype, window.encoding)
        return Window(window.input, window.tensor, 0, F32, rows, part.stored.row)

    def notes(self, parts: Mapping[str, str], expression: Expression) -> Iterator[str]:
        """Tell of the padded and carried ones among ``parts``, the output's with their reasons."""
        yield from (str(padding) for name, padding in self.padded.items() if name in parts)
        sources: dict[str, list[str]] = {}
        for name, reason in parts.items():
            if name in self.carried:
                sources.setdefault(reason, []).append(name)
        factors = expression.graph.coefficients()
        for reason, names in sources.items():
            models = self.carried[names[0]].models()
            factor = factors[models[0]]
            as_it_is = f", whole in spite of its factor of {number(factor)}" if len(models) == 1 and factor != 1 else ""
            yield f"{expression.anchor} lacks {len(names)} tensors that are {reason}{as_it_is} ({quoted(names[0])})"


def shape_clash(part: str, first: Input, other: Input) -> FamilyError:
    """The error for a part of two shapes that nothing can be done about."""
    mine, theirs = (list(model.anatomy.parts[part].shape) for model in (first, other))
    return FamilyError(
        f'tensor "{part}" has shape {mine} in {first.name} but {theirs} in {other.name}; a merge needs equal shapes: leave it '
        f'out with `exclude="{part}"`, which keeps {first.name}\'s (with `keep_from="{other.name}"` the one of {other.name}), or pick models of one architecture.'
    )


def reason_of(graph: Sum) -> str:
    """The reason of a carried part's step."""
    names = graph.models()
    return f"taken from {_listed(names)}"


def _padded(graph: Sum, first: Input, models: Sequence[Input]) -> Iterator[tuple[str, Padding]]:
    factors = graph.coefficients()
    for name, wide in wide_shapes([model.anatomy for model in models]).items():
        having = [model for model in models if name in model.anatomy.parts]
        narrow = [model for model in having if model.anatomy.parts[name].shape != wide]
        wider = tuple(model.name for model in having if model not in narrow)
        factor = sum((factors[model] for model in wider), Fraction(0))
        if factor > 0 and name in first.anatomy.parts:
            tensor, shape = first.anatomy.parts[name].stored.tensor, narrow[0].anatomy.parts[name].shape
            yield name, Padding(tensor, tuple(model.name for model in narrow), shape, wider, wide, factor)


def _carried(expression: Expression, first: Input, models: Sequence[Input]) -> dict[str, Sum]:
    """The sums of the parts that the anchor lacks, where they are to be carried."""
    own, factors = own_factors(expression.graph), expression.graph.coefficients()
    sums: dict[tuple[str, ...], Sum | None] = {}
    found = {}
    for name in dict.fromkeys(name for model in models for name in model.anatomy.own):
        if name in first.anatomy.parts:
            continue
        having = tuple(model.name for model in models if name in model.anatomy.parts)
        if having not in sums:
            lacking = [*(model.name for model in models if model.name not in having), *expression.loras]
            rest = normal(expression.arithmetic.without(lacking))
            alone = Sum((Term(Fraction(1), Model(having[0])),))
            in_a_difference = len(having) == 1 and not own.get(having[0]) and factors[having[0]] > 0
            sums[having] = rest if rest.degree() == 1 else alone if in_a_difference else None
        parts = [model.anatomy.parts[name] for model in models if model.name in having]
        if (rest_of := sums[having]) is not None and _are_alike(parts, rest_of):
            found[name] = rest_of
    return found


def _are_alike(parts: Sequence[Part], graph: Sum) -> bool:
    one_shape = len({part.shape for part in parts}) == 1
    return len(graph.terms) == 1 or (one_shape and all(part.dtype.blendable and part.numel for part in parts))


def _with(first: Input, models: Sequence[Input], carried: Mapping[str, Sum]) -> tuple[Anatomy, list[str]]:
    """The anchor's anatomy with carried parts under the names that they get beside its own, and which those are.

    A part stays out that the anchor's file has no room for: a piece of a tensor of which it has the rest, or a name that is taken.
    """
    by_name = {model.name: model.anatomy for model in models}
    holders = {name: by_name[graph.models()[0]] for name, graph in carried.items()}
    own, taken = first.anatomy, set(first.checkpoint.tensors)
    tensors: dict[str, tuple[str, ...]] = {}
    for tensor, names in own.family.held(holders, own.layout).items():
        holder = holders[names[0]]
        name = spelled(holder.parts[names[0]].stored.tensor, holder.prefix) if own.family.keeps_names else tensor
        if set(own.family.pieces(names[0], own.layout)) <= holders.keys() and f"{own.prefix}{name}" not in taken:
            tensors[f"{own.prefix}{name}"] = names
    parts = dict(own.parts)
    for tensor, names in tensors.items():
        row = 0
        for name in names:
            part = holders[name].parts[name]
            parts[name] = replace(part, stored=Slice(tensor, row, part.stored.rows))
            row += part.stored.rows
    return replace(own, parts=parts), [name for names in tensors.values() for name in names]


def _listed(names: Sequence[str]) -> str:
    return " and ".join(names)
