"""Requests as functions: ``mergetool.merge(...)`` makes a `Merge` and runs it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING
from typing import Any, Concatenate, ParamSpec, TypeVar, get_type_hints

from mergetool import packages
from mergetool.api.events import Called, Events, Request
from mergetool.options.table import rows

P = ParamSpec("P")
Asked = TypeVar("Asked", bound=Request)
R = TypeVar("R")


def called(request: Callable[P, Asked], run: Callable[[Asked, Events], R], name: str) -> Callable[P, R]:
    """Make of ``run`` a function ``name`` with the parameters of ``request``.

    The request has them checked and typed.
    """

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with packages.told():
            asked = request(*args, **kwargs)
            return run(asked, Called(asked.progress))

    call.__name__ = call.__qualname__ = name
    call.__module__ = "mergetool"
    call.__doc__ = f"{inspect.cleandoc(run.__doc__ or '')}\n\n{explained(request)}"
    call.__signature__ = _signature(request, run)  # type: ignore[attr-defined]
    call.request = request  # type: ignore[attr-defined]
    return call


def method(
    request: Callable[P, Asked], run: Callable[[Any, Asked, Events], R], described: Callable[..., R]
) -> Callable[Concatenate[Any, P], R]:
    """Do as `called` for a method, whose object ``run`` takes first. The docstring is that of ``described``."""

    def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return called(request, lambda asked, events: run(self, asked, events), "make")(*args, **kwargs)

    call.__doc__ = f"{inspect.cleandoc(described.__doc__ or '')}\n\n{explained(request)}"
    return call


def explained(request: Any) -> str:
    """The options of a request, a line each, for a docstring."""
    lines = ["Options:"]
    for row in rows(request).values():
        option = row.option
        default = option.default or ("needed" if row.initial is MISSING else row.initial)
        lines.append(f"    {row.name}: {option.help} [{'' if row.is_needed else 'default: '}{default}]")
    return "\n".join(lines)


def _signature(request: Any, run: Callable[..., Any]) -> inspect.Signature:
    """The signature of a request with its types alone: the rows are in the docstring."""
    signature, types = inspect.signature(request), get_type_hints(request)
    parameters = [parameter.replace(annotation=types[name]) for name, parameter in signature.parameters.items()]
    return signature.replace(parameters=parameters, return_annotation=run.__annotations__.get("return"))
