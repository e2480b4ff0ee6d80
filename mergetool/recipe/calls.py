"""Read method calls in expressions, and check them. An example is ``ties(a - base, b - base, density=0.2)``.

The register of methods says which calls are right.

A method of differences also takes models and the one that they are compared with: ``ties(a, b, base=c, density=0.2)`` means
``c + ties(a - c, b - c, density=0.2)``.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from mergetool.errors import ExpressionError, UsageError
from mergetool.ops.program import ParameterValue
from mergetool.options.multipliers import number
from mergetool.recipe.graph import Call, Sum, Term, add, normal, scale

if TYPE_CHECKING:
    from mergetool.methods import Method

MAX_ARGUMENTS = 64
Read = Callable[[ast.expr], "Fraction | Sum"]


def read_call(node: ast.Call, name: str, read: Read) -> Sum:
    """The value of a method call, whose arguments ``read`` reads.

    Raises ExpressionError, with the column, for a method or parameter that does not exist, a value that it does not take, and
    arguments that are too few, too many or of the wrong degree.
    """
    from mergetool import methods  # only calls need all its modules

    try:
        method = methods.find(name)
    except UsageError as error:
        raise _error(node, str(error)) from None
    arguments = [_argument(argument, read, method) for argument in node.args]
    base, parameters = _keywords(node, method, read)
    _check_count(node, method, arguments)
    if base is not None:
        arguments = _differences(node, method, arguments, base)
    degree = _check_degrees(node, method, arguments)
    given = {key: _value(value, read, method, key, len(arguments)) for key, value in parameters.items()}
    if method.factors is not None:
        try:
            return _weighted(method, arguments, given, base)
        except ValueError as error:
            raise _error(node, f"{name}: {error}.") from None
    ordered = tuple((p.name, given[p.name]) for p in method.parameters if p.name in given)
    called = Sum((Term(Fraction(1), Call(name, tuple(arguments), ordered, degree)),))
    return called if base is None else add(base, called)


def _argument(node: ast.expr, read: Read, method: Method) -> Sum:
    if isinstance(node, ast.Starred):
        raise _error(node, "an expression has no * arguments.")
    value = read(node)
    if isinstance(value, Fraction):
        raise _error(
            node, f"{method.name} takes models, not the number {number(value)}; parameters are given by name, as in "
            f"{method.signature}."
        )  # fmt: skip
    value = normal(value)
    if not value.terms:
        raise _error(node, f"an argument of {method.name} cancels to nothing.")
    return value


def _keywords(node: ast.Call, method: Method, read: Read) -> tuple[Sum | None, dict[str, ast.expr]]:
    base: Sum | None = None
    parameters: dict[str, ast.expr] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise _error(keyword, "an expression has no ** arguments.")
        if keyword.arg in parameters or (keyword.arg == "base" and base is not None):
            raise _error(keyword, f"{method.name} is given {keyword.arg} twice.")
        if keyword.arg == "base" and method.takes == "deltas":
            base = _argument(keyword.value, read, method)
            if base.degree() != 1:
                raise _error(keyword.value, f"the base of {method.name} must be a model, not a difference of models.")
            continue
        if keyword.arg not in (parameter.name for parameter in method.parameters):
            known = ", ".join(parameter.name for parameter in method.parameters) or "none"
            raise _error(keyword, f'{method.name} has no parameter "{keyword.arg}"; it has: {known}.')
        parameters[keyword.arg] = keyword.value
    return base, parameters


def _check_count(node: ast.Call, method: Method, arguments: Sequence[Sum]) -> None:
    most = MAX_ARGUMENTS if method.most is None else method.most
    if method.least <= len(arguments) <= most:
        return
    wanted = str(method.least) if most == method.least else f"{method.least} to {most}"
    raise _error(node, f"{method.name} takes {wanted} arguments, not {len(arguments)}: {method.signature}.")


def _differences(node: ast.Call, method: Method, arguments: Sequence[Sum], base: Sum) -> list[Sum]:
    """The arguments, which must be models, minus the base."""
    for written, argument in zip(node.args, arguments, strict=True):
        if argument.degree() != 1:
            raise _error(
                written, f"with base= the arguments of {method.name} are models, and {argument} has degree "
                f"{number(argument.degree())}; leave out base= or the subtraction."
            )  # fmt: skip
        if argument == base:
            raise _error(written, f"{argument} is both an argument and the base of {method.name}; leave it out.")
    return [normal(add(argument, _negative(base))) for argument in arguments]


def _check_degrees(node: ast.Call, method: Method, arguments: Sequence[Sum]) -> Fraction:
    """Check the degree of all arguments, which must be equal and suit the method."""
    wanted = {"models": (1,), "deltas": (0,), "any": (0, 1)}[method.takes]
    first = arguments[0].degree()
    for written, argument in zip(node.args, arguments, strict=True):
        degree = argument.degree()
        shown = f"{argument} has degree {number(degree)}"
        if degree not in wanted:
            kinds = {"models": "models", "deltas": "differences of models", "any": "models or differences of models"}
            advice = "; write x - y, or give base=y" if method.takes == "deltas" and degree == 1 else ""
            raise _error(written, f"{method.name} takes {kinds[method.takes]}, and {shown}{advice}.")
        if degree != first:
            raise _error(
                written, f"{method.name} takes models or differences of models, not some of each: {arguments[0]} has "
                f"degree {number(first)}, and {shown}."
            )  # fmt: skip
    return first


def _value(node: ast.expr, read: Read, method: Method, name: str, arguments: int) -> ParameterValue:
    parameter = method[name]
    value = _literal(node, read)
    if value is None or not parameter.accepts(value, arguments):
        raise _error(node, f"{name} of {method.name} must be {parameter.wanted()}, not {ast.unparse(node)[:60]}.")
    return value


def _literal(node: ast.expr, read: Read) -> ParameterValue | None:
    """True, False, a string, a number exactly as written, or a list of numbers; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | str):
        return node.value
    if isinstance(node, ast.List | ast.Tuple):
        values = [_literal(item, read) for item in node.elts[: MAX_ARGUMENTS + 1]]
        numbers = tuple(item for item in values if isinstance(item, Fraction))
        return numbers if len(numbers) == len(node.elts) else None
    value = read(node)
    return value if isinstance(value, Fraction) else None


def _weighted(method: Method, arguments: Sequence[Sum], given: dict[str, ParameterValue], base: Sum | None) -> Sum:
    assert method.factors is not None
    total = base or Sum(())
    for factor, argument in zip(method.factors(len(arguments), **given), arguments, strict=True):
        scaled = scale(factor, argument)
        assert isinstance(scaled, Sum)
        total = add(total, scaled)
    return normal(total)


def _negative(value: Sum) -> Sum:
    scaled = scale(Fraction(-1), value)
    assert isinstance(scaled, Sum)
    return scaled


def _error(node: ast.expr | ast.keyword, text: str) -> ExpressionError:
    return ExpressionError(f"column {node.col_offset + 1}: {text}")
