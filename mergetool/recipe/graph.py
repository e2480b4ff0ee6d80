"""The typed graph of a merge: exact factors over models, in a normal form.

The normal form fixes the float32 operations that an engine performs, in order:

* numbers that meet are multiplied exactly, and rounded to float32 once, where they meet a tensor;
* in a sum, the same model named twice is one term;
* in a sum, a term ``-k*y`` is paired with the nearest unpaired earlier term ``k*x`` (else the nearest later one)
  as ``k*(x - y)``: differences are taken first and scaled afterwards, never ``k*x - k*y``.

`canonical` orders and pairs by what the models hold instead of by where they were written, so that one algebra has one list of
operations: terms may be exchanged, ``k*(x - y)`` written out or turned round, and parentheses around what is only added left out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TypeAlias

from mergetool.ops.program import ParameterValue
from mergetool.options.multipliers import number
from mergetool.recipe.quotes import in_quotes, quote

Operand: TypeAlias = "Model | Lora | Call | Sum"


@dataclass(frozen=True, slots=True)
class Model:
    """One model of the expression, by the name or path it was given."""

    name: str


@dataclass(frozen=True, slots=True)
class Lora:
    """The change that a LoRA makes, by its name or path. Its degree is 0, like a difference of models."""

    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """A merge method with its arguments.

    It makes a model where ``degree`` is 1, a difference of models where it is 0. ``parameters`` are those that were given, in the method's
    order.
    """

    method: str
    arguments: tuple[Sum, ...]
    parameters: tuple[tuple[str, ParameterValue], ...]
    degree: Fraction


@dataclass(frozen=True, slots=True)
class Term:
    """``factor * operand``."""

    factor: Fraction
    operand: Operand


@dataclass(frozen=True, slots=True)
class Sum:
    """Terms added from left to right. A single-term Sum is that term.

    ``is_paired`` marks a difference that `normal` found, where the user wrote no parentheses.
    """

    terms: tuple[Term, ...]
    is_paired: bool = field(default=False, compare=False)

    def models(self) -> tuple[str, ...]:
        """The model names in order of first appearance in the normal form."""
        return tuple(dict.fromkeys(leaf.name for leaf in self.leaves() if isinstance(leaf, Model)))

    def loras(self) -> tuple[str, ...]:
        """The LoRA names in order of first appearance in the normal form."""
        return tuple(dict.fromkeys(leaf.name for leaf in self.leaves() if isinstance(leaf, Lora)))

    def leaves(self) -> Iterator[Model | Lora]:
        """Every model and LoRA in the normal form, repeated where it stands several times."""
        for term in self.terms:
            yield from _leaves(term.operand)

    def calls(self) -> Iterator[Call]:
        """Every method call in the normal form, outer ones first."""
        for term in self.terms:
            if isinstance(term.operand, Sum):
                yield from term.operand.calls()
            elif isinstance(term.operand, Call):
                yield term.operand
                for argument in term.operand.arguments:
                    yield from argument.calls()

    def without(self, names: Collection[str]) -> Sum:
        """The sum with these LoRAs or models taken for zero. A method call of which nothing else is left is zero too."""
        kept = []
        for term in self.terms:
            operand = term.operand
            if isinstance(operand, Lora | Model) and operand.name in names:
                continue
            if isinstance(operand, Sum):
                operand = operand.without(names)
                left = len(operand.terms)
            elif isinstance(operand, Call):
                operand = replace(operand, arguments=tuple(normal(a.without(names)) for a in operand.arguments))
                left = sum(len(argument.terms) for argument in operand.arguments)
            else:
                left = 1
            if left:
                kept.append(Term(term.factor, operand))
        return Sum(tuple(kept))

    def degree(self) -> Fraction:
        """1 for a model, 0 for a difference of models."""
        return sum((_degree(term) for term in self.terms), Fraction(0))

    def coefficients(self) -> dict[str, Fraction]:
        """The exact total factor of every model, zeros included; of no LoRA. A method call counts as its arguments' mean."""
        total: dict[str, Fraction] = {}
        for term in self.terms:
            for name, factor in _coefficients(term.operand).items():
                total[name] = total.get(name, Fraction(0)) + term.factor * factor
        return total

    def __str__(self) -> str:
        return render(self, {})


def scale(factor: Fraction, value: Fraction | Sum) -> Fraction | Sum:
    """``factor * value``; a sum of several terms becomes one operand in normal form."""
    if isinstance(value, Fraction):
        return factor * value
    if factor == 0:
        return Sum(())
    if factor == 1:
        return value
    operand = normal(value)
    if not operand.terms:
        return operand
    if len(operand.terms) == 1:
        term = operand.terms[0]
        return Sum((Term(factor * term.factor, term.operand),))
    return Sum((Term(factor, operand),))


def add(left: Sum, right: Sum) -> Sum:
    """``left + right``; a sum on the right was written in parentheses and stays one operand."""
    operand = normal(right)
    added = operand.terms if len(operand.terms) < 2 else (Term(Fraction(1), operand),)
    return Sum(left.terms + added)


def normal(value: Sum) -> Sum:
    """Add up repeated operands of ``value`` and pair opposite ones.

    A model in parentheses at its beginning is no operand of its own.
    """
    terms = _collect(value.terms)
    while terms and terms[0].factor == 1 and isinstance(terms[0].operand, Sum) and terms[0].operand.degree() != 0:
        terms = _collect(terms[0].operand.terms + terms[1:])
    paired = Sum(_pair(terms))
    if len(paired.terms) == 1:
        only = paired.terms[0]
        if only.factor == 1 and isinstance(only.operand, Sum):
            return only.operand
    return paired


def _collect(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    """Add up repeated operands, exactly; one whose factors cancel disappears."""
    totals: dict[Operand, Fraction] = {}
    for term in terms:
        totals[term.operand] = totals.get(term.operand, Fraction(0)) + term.factor
    return tuple(Term(factor, operand) for operand, factor in totals.items() if factor != 0)


def _pair(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    """Turn ``k*x ... - k*y`` into ``k*(x - y)``, each negative term taking its nearest partner."""
    if len(terms) == 2 and terms[0].factor == 1 and terms[1].factor == -1:
        return terms
    partner: dict[int, int] = {}
    for i, term in enumerate(terms):
        if term.factor > 0 or not isinstance(term.operand, Model):
            continue
        nearest = sorted(range(len(terms)), key=lambda j, i=i: (j > i, abs(j - i)))  # type: ignore[misc]
        for j in nearest:
            other = terms[j]
            if isinstance(other.operand, Model) and other.factor == -term.factor and j not in partner:
                partner[i], partner[j] = j, i
                break
    done: list[Term] = []
    for i, term in enumerate(terms):
        mate = partner.get(i)
        if mate is None:
            done.append(term)
        elif i < mate:
            x, y = (term, terms[mate]) if term.factor > 0 else (terms[mate], term)
            difference = (Term(Fraction(1), x.operand), Term(Fraction(-1), y.operand))
            done.append(Term(x.factor, Sum(difference, is_paired=True)))
    return tuple(done)


def own_factors(value: Sum, factor: Fraction = Fraction(1)) -> dict[str, Fraction]:
    """The factor of every model outside differences, in the order of the terms. A method counts as its first argument.

    Example: 1 of ``a`` alone in ``a + 20*(b - c)``; 1 of ``a``, 1 of ``b`` and -1 of ``c`` in ``a + b - c``.
    """
    total: dict[str, Fraction] = {}
    for term in value.terms:
        by = factor * term.factor
        match term.operand:
            case Model(name):
                factors = {name: by}
            case Sum(is_paired=is_paired) as inner if is_paired or inner.degree() != 0:
                factors = own_factors(inner, by)
            case Call(degree=degree) as call if degree != 0:
                factors = own_factors(call.arguments[0], by)
            case _:
                factors = {}
        for name, more in factors.items():
            total[name] = total.get(name, Fraction(0)) + more
    return total


def canonical(value: Sum, contents: Mapping[str, str]) -> Sum:
    """Order the terms of ``value``, and pair them, by the fingerprints in ``contents``.

    They are those of every model and LoRA.

    Where two fingerprints are equal, so are the values, and the order decides nothing.
    """
    opened: list[Term] = []
    for term in _unpaired(value):
        operand, factor = term.operand, term.factor
        if isinstance(operand, Call):
            operand = replace(operand, arguments=tuple(canonical(a, contents) for a in operand.arguments))
        if not isinstance(operand, Sum):
            opened.append(Term(factor, operand))
            continue
        inner = canonical(operand, contents).terms
        if len(inner) == 1 or (abs(factor) == 1 and not _is_difference(inner)):
            opened += (Term(factor * each.factor, each.operand) for each in inner)
        elif factor < 0 and _is_difference(inner):
            opened.append(
                Term(-factor, Sum((Term(Fraction(1), inner[1].operand), Term(Fraction(-1), inner[0].operand))))
            )
        elif inner:
            opened.append(Term(factor, Sum(inner)))

    def place(term: Term) -> tuple[str, bool, str, Fraction]:
        content = _content(term.operand, contents)
        return content[0], term.factor < 0, content, term.factor

    paired = _pair(tuple(sorted(_collect(tuple(opened)), key=place)))
    return Sum(tuple(sorted(paired, key=place)))


def _unpaired(value: Sum) -> Iterator[Term]:
    """The terms of a sum, with the pairs that `normal` found taken apart, and models in mere parentheses among them."""
    for term in value.terms:
        inner = term.operand
        if isinstance(inner, Sum) and (inner.is_paired or (abs(term.factor) == 1 and inner.degree() != 0)):
            yield from (Term(term.factor * each.factor, each.operand) for each in _unpaired(inner))
        else:
            yield term


def _is_difference(terms: Sequence[Term]) -> bool:
    return [term.factor for term in terms] == [1, -1]


def _content(operand: Operand, contents: Mapping[str, str]) -> str:
    """A text that orders operands by their contents: models first, then LoRAs, methods and sums."""
    match operand:
        case Model(name):
            return f"1 {contents[name]}"
        case Lora(name):
            return f"2 {contents[name]}"
        case Call(method, arguments, parameters):
            return f"3 {method} {[_content(argument, contents) for argument in arguments]} {parameters}"
        case Sum(terms):
            return f"4 {[(_content(term.operand, contents), term.factor) for term in terms]}"


def _degree(term: Term) -> Fraction:
    match term.operand:
        case Sum() as inner:
            return term.factor * inner.degree()
        case Call() as call:
            return term.factor * call.degree
        case Model():
            return term.factor
        case _:
            return Fraction(0)


def _leaves(operand: Operand) -> Iterator[Model | Lora]:
    if isinstance(operand, Sum):
        yield from operand.leaves()
    elif isinstance(operand, Call):
        for argument in operand.arguments:
            yield from argument.leaves()
    else:
        yield operand


def _coefficients(operand: Operand) -> dict[str, Fraction]:
    match operand:
        case Model():
            return {operand.name: Fraction(1)}
        case Sum():
            return operand.coefficients()
        case Call():
            share = Fraction(1, len(operand.arguments))
            return Sum(tuple(Term(share, argument) for argument in operand.arguments)).coefficients()
        case _:
            return {}


def render(value: Sum, names: Mapping[str, str]) -> str:
    """Write ``value`` as text that reads back to it, with ``names`` for models.

    A LoRA or a model that has none there goes by its own.
    """
    text = ""
    for term in value.terms:
        size = abs(term.factor)
        if isinstance(term.operand, Model):
            body = quote(names.get(term.operand.name, term.operand.name))
        elif isinstance(term.operand, Lora):
            body = f"lora({in_quotes(names.get(term.operand.name, term.operand.name))})"
        elif isinstance(term.operand, Call):
            body = _render_call(term.operand, names)
        else:
            body = f"({render(term.operand, names)})"
        body = body if size == 1 else f"{number(size)}*{body}"
        sign = "-" if term.factor < 0 else "+"
        text += f" {sign} {body}" if text else body if sign == "+" else f"-{body}"
    return text


def _render_call(call: Call, names: Mapping[str, str]) -> str:
    arguments = [render(argument, names) for argument in call.arguments]
    arguments += [f"{name}={_render_value(value)}" for name, value in call.parameters]
    return f"{call.method}({', '.join(arguments)})"


def _render_value(value: ParameterValue) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(number, value))}]"
    if isinstance(value, str):
        return in_quotes(value)
    return number(value) if isinstance(value, Fraction) else repr(value)
