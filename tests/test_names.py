"""A public name has one meaning in the whole house."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import mergetool
import mergetool_kernels

PACKAGES = (Path(mergetool.__file__).parent, Path(mergetool_kernels.__file__).parent)


def definitions(source: str) -> Iterator[tuple[str, str]]:
    """The public classes and type aliases of a module, each with its definition; classes are told apart by where they stand."""
    for statement in ast.parse(source).body:
        match statement:
            case ast.ClassDef(name=name) if not name.startswith("_"):
                yield name, "class"
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if name[0].isupper() and not name.isupper():
                yield name, ast.unparse(value)


def clashes(sources: dict[str, str]) -> dict[str, list[str]]:
    """Name -> the modules that give it different meanings; aliases that are spelled alike are one."""
    meanings: dict[str, dict[str, str]] = defaultdict(dict)
    for module, source in sources.items():
        for name, definition in definitions(source):
            meanings[name][f"class {module}" if definition == "class" else definition] = module
    return {name: sorted(found.values()) for name, found in meanings.items() if len(found) > 1}


def test_no_public_class_or_alias_stands_for_two_things() -> None:
    sources = {str(path): path.read_text("utf-8") for package in PACKAGES for path in package.rglob("*.py")}
    assert clashes(sources) == {}


def test_two_classes_of_one_name_are_a_clash() -> None:
    assert clashes({"a": "class Part: ...", "b": "class Part: ..."}) == {"Part": ["a", "b"]}


def test_an_alias_and_a_class_of_one_name_are_a_clash() -> None:
    assert clashes({"a": "Method = int | str", "b": "class Method: ..."}) == {"Method": ["a", "b"]}


def test_an_alias_that_is_spelled_alike_is_the_same() -> None:
    assert clashes({"a": "Floats = list[float]", "b": "Floats = list[float]"}) == {}
