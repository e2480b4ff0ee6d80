"""Variables of a recipe: values, sweeps, and ``{NAME}`` in texts of an output."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mergetool.checkpoint.names import quoted
from mergetool.errors import UsageError
from mergetool.recipe.document import Node, Place, plain
from mergetool.recipe.names import Variable
from mergetool.recipe.schema import VARIABLE
from mergetool.recipe.validation import nearest

_BRACES = re.compile(rf"\{{({VARIABLE})\}}")


def variable(node: Node) -> Variable:
    """A scalar's value as a variable has it."""
    return Variable(node.typed, not isinstance(node.value, str))


def from_option(text: str) -> tuple[str, Variable]:
    """Read a variable's name and value from ``NAME=VALUE``, as a file would. Raises UsageError."""
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(VARIABLE, name.strip()) or not value.strip():
        raise UsageError(f"the variable {quoted(text)} is not NAME=VALUE, as in m=20.")
    at = Place("variable", 1, len(name) + 2)
    node = Node(plain(value.strip(), at), at, typed=value.strip())
    if node.value is None or isinstance(node.value, bool) or not value.isprintable():
        raise UsageError(f"the variable {quoted(text)} gives neither a number nor a text.")
    return name.strip(), variable(node)


@dataclass(frozen=True, slots=True)
class Variables:
    """The variables with one value, and those with several values in a sweep."""

    single: Mapping[str, Variable]
    swept: Mapping[str, Sequence[Variable]]

    @property
    def names(self) -> set[str]:
        """Every name."""
        return {*self.single, *self.swept}

    def values(self, name: str) -> Sequence[Variable]:
        """The values that a variable may take."""
        return self.swept.get(name) or [self.single[name]]

    def combinations(self, used: Sequence[str]) -> Iterator[dict[str, Variable]]:
        """Every combination of the swept variables among ``used``, the last one changing fastest."""
        for values in itertools.product(*(self.swept[name] for name in used)):
            yield dict(zip(used, values, strict=True))


def names_in_braces(node: Node) -> Iterator[str]:
    """Every ``{NAME}`` in the texts of a node."""
    if isinstance(node.value, dict | list):
        for inner in node.value.values() if isinstance(node.value, dict) else node.value:
            yield from names_in_braces(inner)
    elif isinstance(node.value, str):
        yield from _BRACES.findall(node.value)


def filled(node: Node, variables: Mapping[str, Variable]) -> Node:
    """Fill the variables in the texts of ``node``. A text that is ``{NAME}`` alone becomes the value itself.

    Raises RecipeError at the first name that is no variable.
    """
    if isinstance(node.value, dict):
        return replace(node, value={key: filled(inner, variables) for key, inner in node.value.items()})
    if isinstance(node.value, list):
        return replace(node, value=[filled(inner, variables) for inner in node.value])
    if not isinstance(node.value, str) or not _BRACES.search(node.value):
        return node
    for match in _BRACES.finditer(node.value):
        if match[1] not in variables:
            at = node.place_of(match.start(1))
            raise at.error(f"{quoted(match[1])} is no variable of this recipe{nearest(match[1], variables)}")
    alone = _BRACES.fullmatch(node.value)
    if alone and variables[alone[1]].is_number:
        typed = variables[alone[1]].text
        return replace(node, value=plain(typed, node.at), typed=typed, places=())
    text = _BRACES.sub(lambda match: variables[match[1]].text, node.value)
    return replace(node, value=text, typed=text, places=())
