"""The list in docs/reference/methods.md, from the register of merge methods."""

from __future__ import annotations

from mergetool.methods import Method, methods


def lines() -> list[str]:
    """Every registered method: how it is called, what it does, its formula, source and parameters."""
    return [line for method in methods().values() for line in ("", *_method(method))]


def _method(method: Method) -> list[str]:
    lines = [f"### {method.name}", "", f"`{method.signature}`", "", method.summary, ""]
    lines += [f"- Formula: `{method.formula}`", f"- Source: {method.source}"]
    return [*lines, *(f"- `{p.name}`: {p.text}; {p.wanted()}, default {p.shown}" for p in method.parameters)]
