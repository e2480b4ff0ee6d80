"""``mergetool methods``: the merge methods that an expression can call."""

from __future__ import annotations

import sys
import textwrap
from typing import TYPE_CHECKING, Any

from mergetool.api.catalogue import FindMethods, find_methods
from mergetool.cli import console
from mergetool.cli.parameters import Typed, command

if TYPE_CHECKING:
    from mergetool.methods import Method

EXAMPLES = """\b
Examples:
  mergetool methods
  mergetool methods ties
  mergetool methods --json
  mergetool merge "ties(alkahest, artshoot, base='z-image', density=0.2)" --protect refiner -o out.safetensors

A method takes models, or deltas (differences such as a - b, or models with base=); x stands for either, but all of one kind. Other Python \
packages can add methods by the entry point "mergetool.methods"; the list marks them with the package's name.
"""


@command(FindMethods, prints=("as_json",))
def methods(typed: Typed) -> None:
    """List the merge methods, or explain one.

    The page of a method has its formula, source, parameters and an example.
    """
    asked = typed.request(FindMethods)
    chosen, errors = find_methods(asked)
    for error in errors:
        print(f"mergetool: {console.printable(error)}", file=sys.stderr)
    if typed.as_json:
        console.print_json({"methods": [_facts(method) for method in chosen], "errors": list(errors)})
    elif asked.name:
        _show(chosen[0])
    else:
        for method in chosen:
            console.say(method.signature + (f"   [{method.package}]" if method.package else ""))
            console.say(f"        {method.summary}")


def _show(method: Method) -> None:
    console.say(method.signature)
    facts = [("", method.summary), ("formula", method.formula), ("source", method.source)]
    facts += [("package", method.package)] if method.package else []
    for word, text in facts:
        first, *others = textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)
        console.heading(word, first)
        for line in others:
            console.heading("", line)
    if method.parameters:
        rows = [(p.name, p.shown, p.wanted(), p.text) for p in method.parameters]
        console.table(["parameter", "default", "values", ""], rows, left=4)
    console.heading("example", f'mergetool merge "{method.example}" --protect refiner -o out.safetensors')


def _facts(method: Method) -> dict[str, Any]:
    return {
        "name": method.name,
        "signature": method.signature,
        "summary": method.summary,
        "formula": method.formula,
        "source": method.source,
        "package": method.package or "mergetool",
        "takes": method.takes,
        "least": method.least,
        "most": method.most,
        "parameters": [
            {"name": p.name, "default": p.shown, "values": p.wanted(), "text": p.text} for p in method.parameters
        ],
        "example": method.example,
    }
