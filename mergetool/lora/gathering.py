"""Gather one or many LoRAs: every matrix's changes, their strengths, and the lost parts.

Those are parts that no LoRA can carry.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from math import prod

from mergetool import models
from mergetool.adapters import unmatched
from mergetool.adapters.adapter import Change
from mergetool.adapters.formats import FORMATS, bare, factors_of, format_for
from mergetool.adapters.keys import Spelled, take_apart
from mergetool.adapters.lora_file import LoraFile, open_lora
from mergetool.adapters.sources import source_of
from mergetool.adapters.values import dense_rows
from mergetool.arch import Anatomy, Family, Part, Slice
from mergetool.checkpoint import dtypes
from mergetool.checkpoint.dtypes import DType
from mergetool.checkpoint.inputs import InputFile
from mergetool.checkpoint.names import quoted
from mergetool.errors import DataError, FamilyError
from mergetool.lowrank.matrices import Matrix, total
from mergetool.options.multipliers import Setting
from mergetool.recipe import groups


@dataclass(frozen=True, slots=True)
class WeighedLora:
    """A LoRA and the strength it is added with."""

    file: LoraFile
    strength: Fraction = Fraction(1)


@dataclass(frozen=True, slots=True)
class Addend:
    """The change that one LoRA makes to a matrix. A strength of 0 never becomes one."""

    file: LoraFile
    change: Change
    strength: Fraction


@dataclass(frozen=True, slots=True)
class Keys:
    """The names of a module's tensors in the output.

    A spelling has an alpha everywhere with ``always_alpha``, nowhere with ``no_alpha``.
    """

    down: str
    up: str
    alpha: str
    always_alpha: bool = False
    no_alpha: bool = False


@dataclass(frozen=True, slots=True)
class GatheredModule:
    """One matrix, ``shape`` [out, in] or [out, in, kh, kw], and everything that is added to it. ``dtype`` holds every stored
    factor exactly, FP8 apart, whose LoRAs few programs load: BF16 holds that.
    """

    part: str
    groups: frozenset[str]
    shape: tuple[int, ...]
    dtype: DType
    keys: Keys
    addends: tuple[Addend, ...]

    @property
    def matrix(self) -> tuple[int, int]:
        """[m, n], a convolution's in * kh * kw as its columns."""
        return self.shape[0], prod(self.shape[1:])

    @property
    def width(self) -> int | None:
        """The sum of the ranks that are read; None where something other than a LoRA is among them."""
        ranks = [addend.change.adapter.rank for addend in self.addends if addend.change.adapter.kind == "lora"]
        return sum(rank or 0 for rank in ranks) if len(ranks) == len(self.addends) else None


@dataclass(frozen=True)
class Gathering:
    """The modules of all LoRAs: the first one's in its order, then those of later ones only.

    ``left_out`` are parts that do not come along, with the reason and the energy of what is lost: None where a strength of 0 loses
    it on purpose, for keys that mean nothing here, and for what an operation has no use for.
    """

    terms: tuple[WeighedLora, ...]
    family: Family
    modules: tuple[GatheredModule, ...]
    left_out: tuple[tuple[str, str, float | None], ...] = ()
    multipliers: tuple[Setting, ...] = field(default=())

    @property
    def files(self) -> list[InputFile]:
        """Every file that is read."""
        return [file for term in self.terms for file in term.file.checkpoint.files]

    @property
    def warnings(self) -> list[str]:
        """Everything that a user of the files should know."""
        found = []
        for term in self.terms:
            found += [f"{term.file.name}: {warning}" for warning in term.file.warnings]
            found += unmatched.remarks(term.file)
        return found


@contextmanager
def opened(loras: Iterable[tuple[str, Fraction]], *, anatomy: Anatomy | None = None) -> Iterator[list[WeighedLora]]:
    """Open LoRAs by name or path, with strengths; they close at the end of the ``with`` block.

    With an ``anatomy`` their modules are looked up among that model's parts.

    Raises InputMissing, and DataError for a file that is no LoRA.
    """
    with ExitStack() as stack:
        yield [
            WeighedLora(stack.enter_context(open_lora(models.resolve(name).path, name=name, anatomy=anatomy)), strength)
            for name, strength in loras
        ]


def gather(
    terms: Sequence[WeighedLora],
    *,
    multipliers: Sequence[Setting] = (),
    skip_unmatched: bool = False,
    names_known: bool = False,
) -> Gathering:
    """Add up ``terms``, matrix by matrix, with ``multipliers`` for groups.

    The last multiplier that matches a group counts; gradients run over the blocks that the LoRAs change.
    ``names_known`` says that the LoRAs were opened with the anatomy of their model, so that equal modules are told in
    different spellings.

    Raises FamilyError for LoRAs of different families or shapes, PatternError for a group that nothing is in, DataError for keys that
    change nothing (unless ``skip_unmatched``, which lists them as left out), for a part that one file changes twice, and where
    nothing is left.
    """
    family = _family(terms, names_known=names_known)
    shapes = _shapes(terms)
    settings = groups.expand(multipliers, family)
    scales = groups.resolve(settings, anatomy_of(family, shapes))
    addends: dict[str, list[Addend]] = {}
    left_out: list[tuple[str, str, float | None]] = []
    for term in terms:
        left_out += _unmatched(term.file, skip_unmatched)
        for part, changes in term.file.changes.items():
            change = _only(term.file, part, changes)
            strength = term.strength * scales.get(part, 1)
            reason = _unfit(part, change)
            if strength == 0:
                left_out.append((part, f"strength 0 in {term.file.name}", None))
            elif reason:
                energy = None if change.adapter.kind == "whole" else float(strength) ** 2 * _energy(term.file, change)
                left_out.append((part, reason, energy))
            else:
                addends.setdefault(part, []).append(Addend(term.file, change, strength))
    modules = tuple(_module(part, family, shapes[part], found) for part, found in addends.items())
    kept = {module.part for module in modules}
    left_out = [one for one in left_out if one[0] not in kept or one[2] is not None]
    if not modules:
        names = " and ".join(quoted(term.file.name) for term in terms)
        raise DataError(f"{names}: no matrix is changed at these strengths; there is nothing to write.")
    return Gathering(tuple(terms), family, modules, tuple(left_out), settings)


def total_of(addends: Sequence[Addend]) -> Matrix:
    """The sum of some addends of a module. Raises DataError for a DoRA, and NonFiniteError."""
    return total([(float(addend.strength), source_of(addend.file, addend.change)) for addend in addends])


def anatomy_of(family: Family, shapes: dict[str, tuple[int, ...]]) -> Anatomy:
    """Parts of these shapes as a model, for patterns to choose from."""
    parts = {
        name: Part(name, shape, dtypes.F32, Slice(name, 0, shape[0] if shape else 1)) for name, shape in shapes.items()
    }
    return Anatomy(family, family.layouts[0], "", parts)


def _family(terms: Sequence[WeighedLora], *, names_known: bool) -> Family:
    first = terms[0].file
    for term in terms[1:]:
        if term.file.family is not first.family:
            raise FamilyError(
                f'"{first.name}" is a LoRA for a {first.family.name} model and "{term.file.name}" for a {term.file.family.name} '
                "one; a sum needs LoRAs of one family."
            )
        if first.family.keeps_names and not names_known and _prefixes(term.file) != _prefixes(first):
            raise FamilyError(
                f'"{first.name}" spells its keys {first.dialect}, "{term.file.name}" {term.file.dialect}, and mergetool does not '
                "know the names of their model, so it cannot match their modules; name the model with `model`, or give LoRAs of one spelling."
            )
    return first.family


def _prefixes(file: LoraFile) -> set[str]:
    found = (take_apart(next(iter(adapter.tensors.values()))) for adapter in file.adapters)
    return {one.prefix for one in found if isinstance(one, Spelled)}


def _shapes(terms: Sequence[WeighedLora]) -> dict[str, tuple[int, ...]]:
    """The shape of every part; raises FamilyError where two LoRAs differ in one."""
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for term in terms:
        for part, changes in term.file.changes.items():
            shape = (changes[0].rows, *changes[0].adapter.shape[1:])
            known, name = found.setdefault(part, (shape, term.file.name))
            if known != shape:
                raise FamilyError(
                    f'the change of {quoted(part)} has shape {list(known)} in "{name}" but {list(shape)} in "{term.file.name}"; '
                    "a sum needs LoRAs for one model."
                )
    return {part: shape for part, (shape, _) in found.items()}


def _unmatched(file: LoraFile, skip: bool) -> list[tuple[str, str, float | None]]:
    unmatched.require_match(file, "a sum of LoRAs", skip_unmatched=skip)
    return [(key, f"{reason}, in {file.name}", None) for key, reason in unmatched.left_aside(file)]


def _only(file: LoraFile, part: str, changes: Sequence[Change]) -> Change:
    if len(changes) > 1:
        modules = " and ".join(quoted(change.adapter.module) for change in changes)
        raise DataError(
            f'"{file.name}" changes {quoted(part)} {len(changes)} times, by {modules}; programs differ in which they take, '
            "so get the LoRA without the others in it."
        )
    return changes[0]


def _unfit(part: str, change: Change) -> str:
    """The reason why no LoRA can carry this change; empty where one can."""
    if change.adapter.kind == "whole":
        return "a whole weight in place of the model's"
    if len(change.adapter.shape) < 2:
        return "one-dimensional"
    return "" if part.endswith(".weight") else "not a module's weight"


def _energy(file: LoraFile, change: Change) -> float:
    values = dense_rows(file, change, 0, change.rows).astype("f8")
    return math.fsum((values * values).reshape(-1).tolist())


def _module(part: str, family: Family, shape: tuple[int, ...], addends: Sequence[Addend]) -> GatheredModule:
    stored = {
        addend.file.checkpoint.tensors[key].dtype
        for addend in addends
        for role, key in addend.change.adapter.tensors.items()
        if role != "alpha"
    }
    return GatheredModule(
        part, family.groups(part, shape), shape, holding(stored), _keys(part, family, addends), tuple(addends)
    )


def holding(stored: Iterable[DType]) -> DType:
    """The dtype that holds factors of all of these: BF16, FP16 or FP32. It is FP32 where both halves are among them."""
    wanted = {dtypes.BF16 if dtype.bits == 8 else dtypes.F32 if dtype.bits > 16 else dtype for dtype in stored}
    return wanted.pop() if len(wanted) == 1 else dtypes.F32


def _keys(part: str, family: Family, addends: Sequence[Addend]) -> Keys:
    """The default spelling, or for a model whose names are not known that of the first file that has the module."""
    if not family.keeps_names:
        alpha = format_for(family).key(bare(family.lora_module(part)), "lora", "alpha")
        return Keys(*factors_of(family, part), alpha, no_alpha=not family.lora_alphas)
    adapter = addends[0].change.adapter
    ends = [FORMATS["kohya"].down, FORMATS["kohya"].up]
    if adapter.kind == "lora":
        found = [take_apart(adapter.tensors[role]) for role in ("down", "up")]
        ends = [one.suffix for one in found if isinstance(one, Spelled)]
    # Kohya-type files state an alpha for every module, and their programs look for it.
    return Keys(adapter.module + ends[0], adapter.module + ends[1], f"{adapter.module}.alpha", "lora_down" in ends[0])
