"""Pair the parameters of a checkpoint with those of another, or of LoRAs.

Pairs say which become factors, and why others do not.

Policy, for every part (a parameter under its canonical name) of base and variant:

* a matrix of at least ``min_dim`` rows and columns, in both, of equal shape: **decomposed**; a convolution's [out, in, kh, kw] as
  the matrix [out, in * kh * kw];
* left out by ``exclude`` or ``include``: named, and its share of the difference is measured;
* one-dimensional, smaller than ``min_dim``, of three or more than four dimensions: named, and its share of the difference is
  measured, since no factors can carry it; with ``full`` **stored whole** in a second file;
* neither a weight nor a bias (pad tokens, Wan's modulation): named and measured; no program applies such a key;
* not a float in both, or only in one of the two: named;
* the weight that embeds the input, where one model takes more (`arch.inputs`): left out, named and warned of;
* of different shape: an error, unless it is excluded.

A LoRA as the variant stands for base + LoRA: its parts are those that it changes, and the difference is its change. Of a second
variant only parts that both have are taken; what a LoRA does not change has a difference of zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from mergetool import arch
from mergetool.arch import Family, Part, meeting
from mergetool.arch.encoders import is_encoder, takes_factors
from mergetool.arch.inputs import wide_shapes
from mergetool.errors import FamilyError, UsageError
from mergetool.options.differences import DiffOptions
from mergetool.recipe.steps import Input

UNCHANGED = "not changed by the LoRA"
"""The reason of the base's parts that a LoRA leaves alone."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One parameter in both models. ``reason`` says why it is not decomposed; empty when it is.

    ``second`` is that of a second variant. A LoRA's part that it does not change is the base's own. ``whole`` parts are stored
    as they are.
    """

    base: Part
    variant: Part
    groups: frozenset[str]
    reason: str = ""
    second: Part | None = None
    whole: bool = False

    @property
    def name(self) -> str:
        """The canonical name."""
        return self.base.name

    @property
    def shape(self) -> tuple[int, int]:
        """The shape as a matrix. It is [out, in], [out, in * kh * kw] of a convolution, [1, n] of a vector."""
        shape = self.base.shape
        return (shape[0], prod(shape[1:])) if len(shape) > 1 else (1, prod(shape))

    @property
    def is_plain(self) -> bool:
        """Whether its difference is that of two tensors stored as plain floats."""
        return self.base.encoding is None and self.variant.encoding is None and self.second is None


@dataclass(frozen=True)
class Pairing:
    """The common parameters of two models, in the variant's file order, and the unmatched rest."""

    base: Input
    variant: Input
    pairs: tuple[Pair, ...]
    left_out: tuple[tuple[str, str], ...]  # name, reason
    second: Input | None = None
    warnings: tuple[str, ...] = ()

    @property
    def variants(self) -> tuple[Input, ...]:
        """The variant, and the second one where there is one."""
        return (self.variant,) if self.second is None else (self.variant, self.second)

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Every model and LoRA."""
        return (self.base, *self.variants)

    @property
    def decomposed(self) -> list[Pair]:
        """The matrices that become factors."""
        return [pair for pair in self.pairs if not pair.reason]

    @property
    def bytes_read(self) -> int:
        """Bytes of all models that will be read."""
        return sum(map(self.nbytes, self.pairs))

    def bytes_to_read(self, options: DiffOptions) -> int:
        """Bytes that a run moves. A budget reads the matrices once to find directions and once to use them."""
        return self.bytes_read + (sum(map(self.nbytes, self.decomposed)) if options.budget else 0)

    def nbytes(self, pair: Pair) -> int:
        """Bytes to read for ``pair``. For a LoRA they measure the work: those of its product in float32."""
        total = 0
        for model, part in zip(self.variants, (pair.variant, pair.second), strict=False):
            assert part is not None
            if model.is_lora:
                total += 0 if part is pair.base else 4 * part.numel
            else:
                total += pair.base.nbytes + part.nbytes
        return total


def pair_up(base: Input, variant: Input, options: DiffOptions, second: Input | None = None) -> Pairing:
    """Pair two models part by part, or three.

    Raises FamilyError for models of different families or shapes and for models that do not meet (`arch.meeting`), PatternError for a
    pattern that selects nothing, UsageError when nothing is left to decompose.
    """
    family = base.anatomy.family
    variants = [variant] if second is None else [variant, second]
    for model in variants:
        meeting.check_families(base, model)
    reasons = _Reasons.of(base, options)
    warnings = _check_meeting(base, variants, [name for name in base.anatomy.parts if not reasons.chosen(name)])
    wide = wide_shapes([base.anatomy, *(model.anatomy for model in variants if not model.is_lora)])
    pairs: list[Pair] = []
    left_out: list[tuple[str, str]] = []
    for name in dict.fromkeys(name for model in variants for name in model.anatomy.parts):
        other = base.anatomy.parts.get(name)
        if other is None:
            left_out.append((name, f"only in {variant.name}" if second is None else f"not in {base.name}"))
            continue
        parts = [model.anatomy.parts.get(name, other if model.is_lora else None) for model in variants]
        missing = [model.name for model, part in zip(variants, parts, strict=True) if part is None]
        found = [part for part in parts if part is not None]
        if missing:
            left_out.append((name, f"not in {missing[0]}"))
            continue
        reason = reasons.chosen(name)
        odd = next((i for i, part in enumerate(found) if part.shape != other.shape), None)
        if odd is not None:
            if name in base.anatomy.beside:
                left_out.append((name, "of another shape"))
                continue
            if not reason and name not in wide:
                raise _shape_clash(base, variants[odd], other, found[odd])
            left_out.append((name, f"{reason or 'takes other inputs'}, of another shape"))
            warnings += [] if reason else [_other_inputs(base, variants[odd], other, found[odd])]
        elif not all(part.dtype.blendable for part in (*found, other)):
            whose = next(part for part in (other, *found) if not part.dtype.blendable)
            left_out.append((name, f"{whose.dtype.name} is not a float"))
        elif len(found) > 1 and options.takes_common and any(part is other for part in found):
            left_out.append((name, "changed by one of the two only"))
        else:
            reason, whole = reasons.fate(other, reason)
            theirs = found[1] if len(found) > 1 else None
            pairs.append(Pair(other, found[0], family.groups(name, other.shape), reason, theirs, whole))
    left_out += _only_in_base(base, variants)
    left_out += [entry for model in variants for entry in model.unmatched]
    pairing = Pairing(base, variant, tuple(pairs), tuple(left_out), second, tuple(warnings))
    if not pairing.decomposed:
        raise UsageError("no matrix is left to decompose; relax `exclude`, `include` or `min_dim`.")
    return pairing


def _check_meeting(base: Input, variants: Sequence[Input], chosen: Sequence[str]) -> list[str]:
    """Parts of the variants without a counterpart among the ``chosen`` parts of the base, where they are many; a LoRA has to change one of them."""
    for model in variants:
        if model.is_lora:
            meeting.check_change(base, model, chosen, model.unmatched)
    return [text for model in variants if not model.is_lora for text in meeting.check(base, model, chosen)]


def _only_in_base(base: Input, variants: Sequence[Input]) -> list[tuple[str, str]]:
    """The base's parts that no variant has, with the reason."""
    names = frozenset[str]().union(*(model.anatomy.parts for model in variants))
    reason = UNCHANGED if all(model.is_lora for model in variants) else f"only in {base.name}"
    return [(name, reason) for name in base.anatomy.parts if name not in names]


@dataclass(frozen=True)
class _Reasons:
    """The reasons not to decompose a part, by the user's options and by its shape."""

    options: DiffOptions
    family: Family
    included: frozenset[str] | None
    excluded: dict[str, str]
    whole: frozenset[str]

    @classmethod
    def of(cls, base: Input, options: DiffOptions) -> _Reasons:
        excluded = {
            name: f"excluded: {pattern}"
            for pattern, names in (arch.select(options.exclude, base.anatomy) if options.exclude else {}).items()
            for name in names
        }
        whole = _selected(options.full_layer, base) or frozenset()
        return cls(options, base.anatomy.family, _selected(options.include, base), excluded, whole)

    def chosen(self, name: str) -> str:
        """The reason why the user's patterns leave a part out; empty where they do not."""
        if name in self.excluded:
            return self.excluded[name]
        return "" if self.included is None or name in self.included else "not in `include`"

    def fate(self, part: Part, reason: str) -> tuple[str, bool]:
        """The reason of a part that patterns leave out for ``reason``, and whether it is stored whole."""
        if reason:
            return reason, False
        reason = "`full_layer`" if part.name in self.whole else _unfit(part, self.options.min_dim, self.family)
        # Programs apply what is called .diff to a module's weight and .diff_b to its bias; nothing else.
        return reason, bool(reason) and self.options.full is not None and part.name.endswith((".weight", ".bias"))


def _selected(include: Iterable[str], base: Input) -> frozenset[str] | None:
    patterns = tuple(include)
    if not patterns:
        return None
    return frozenset[str]().union(*arch.select(patterns, base.anatomy).values())


def _unfit(part: Part, min_dim: int, family: Family) -> str:
    if len(part.shape) < 2:
        return "one-dimensional"
    if is_encoder(part.name) and not takes_factors(part.name):
        return "of a text encoder, where programs add no factors to it"
    if family.is_vector(part.name):
        return "neither a weight nor a bias, which no program applies"
    if not part.name.endswith(".weight"):
        return "not a module's weight"
    if len(part.shape) not in (2, 4):
        return f"of {len(part.shape)} dimensions"
    if min(part.shape[0], prod(part.shape[1:])) < min_dim:
        return f"smaller than {min_dim}"
    return ""


def _other_inputs(base: Input, variant: Input, mine: Part, theirs: Part) -> str:
    return (
        f'tensor "{mine.name}" has shape {list(mine.shape)} in {base.name} but {list(theirs.shape)} in {variant.name}, which takes other inputs, '
        "and is left out: no LoRA adds channels to a model's input; to make such a model of a fine-tune, merge the difference"
    )


def _shape_clash(base: Input, variant: Input, mine: Part, theirs: Part) -> FamilyError:
    return FamilyError(
        f'tensor "{mine.name}" has shape {list(mine.shape)} in {base.name} but {list(theirs.shape)} in {variant.name}; '
        f"a difference needs equal shapes: leave it out with `exclude={mine.name}`, or pick the matching base."
    )
