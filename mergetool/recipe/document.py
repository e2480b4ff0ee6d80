"""The text of a recipe file as a tree of values with places. It is YAML of which only data is accepted.

PyYAML reads the characters and gives the events; nothing else of it is used, so no tag can make an object and no number is read by
YAML 1.1's rules. A plain ``yes``, ``on``, ``1:30`` or ``0x10`` is text here; ``true``, ``false``, ``null`` and decimal numbers are what they
look like. Numbers are exact: integers, or decimals with the digits that were typed.

Refused, each with its line and column: bytes that are not UTF-8, control and other characters that cannot be seen, tags, directives, a
second document, keys that are no text or stand twice, anchors that are not defined before, and more than ``MAX_BYTES``, ``MAX_NODES``,
``MAX_DEPTH`` or ``MAX_ALIASES``. ruamel.yaml 0.19, which knows places too, takes most of these: a tag (as data), aliases that stand for 10^9 values, characters that
cannot be seen, 0.1000000000000000055 as 0.1; 3,000 open brackets take it 9 s to a RecursionError. Nor does it know the places inside a folded text, to which errors of an expression point.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal

import yaml

from mergetool.checkpoint.names import quoted
from mergetool.errors import RecipeError

MAX_BYTES = 256 * 1024
MAX_NODES = 10_000
MAX_DEPTH = 20
MAX_ALIASES = 64
MAX_DIGITS = 40

Scalar = str | int | Decimal | bool | None

_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,4})?")
_WORDS: dict[str, Scalar] = {"": None, "~": None, "null": None, "true": True, "false": False}


@dataclass(frozen=True, slots=True)
class Place:
    """A character of a recipe file, counted from 1 as editors do. It prints as ``FILE:LINE:COLUMN``."""

    source: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}"

    def error(self, sentence: str) -> RecipeError:
        """The error that says ``sentence`` of this place."""
        return RecipeError(f"{self}: {sentence}")


@dataclass(frozen=True, slots=True)
class Node:
    """A value and its place: a scalar, a list of nodes, or a mapping of texts to nodes. Keys have places too.

    ``typed`` is a number as it was typed. ``places`` are those of a text's characters, for as many as are known.
    """

    value: Scalar | list[Node] | dict[str, Node]
    at: Place
    keys: dict[str, Place] = field(default_factory=dict)
    typed: str = ""
    places: tuple[Place, ...] = ()

    def place_of(self, index: int) -> Place:
        """The place in the file of character ``index`` of a text.

        It is where the text begins if that is not known.
        """
        if 0 <= index < len(self.places):
            return self.places[index]
        if self.places and len(self.places) == len(self.typed):  # the end of a text whose places are all known
            last = self.places[-1]
            return Place(last.source, last.line, last.column + 1)
        return self.at

    def data(self) -> object:
        """The plain value, without places."""
        if isinstance(self.value, dict):
            return {key: node.data() for key, node in self.value.items()}
        return [node.data() for node in self.value] if isinstance(self.value, list) else self.value


def parse(raw: bytes, source: str) -> Node:
    """The mapping that ``raw`` spells; ``source`` is the file's name in errors. Raises RecipeError as the module says."""
    text = _decoded(raw, source)
    try:
        return _Reader(text, source).read()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(source, mark.line + 1, mark.column + 1) if mark else Place(source, 1, 1)
        told = ", ".join(part for part in (error.context, error.problem) if part)
        raise place.error(f"this is not YAML: {told}; look for a missing quote, colon or indent.") from None


def plain(text: str, at: Place) -> Scalar:
    """Read a scalar without quotes. Raises RecipeError for a number of more digits than any merge can use."""
    if text in _WORDS:
        return _WORDS[text]
    if not _NUMBER.fullmatch(text):
        return text
    number = Decimal(text) if sum(map(str.isdigit, text)) <= MAX_DIGITS else None
    if number is None or abs(number.adjusted()) > 99:
        raise at.error(f"{quoted(text)} has too many digits for a number that a merge can use.")
    return int(number) if text.lstrip("+-").isdigit() else number


def _decoded(raw: bytes, source: str) -> str:
    if len(raw) > MAX_BYTES:
        raise Place(source, 1, 1).error(f"the file has {len(raw)} bytes, but the limit for a recipe is {MAX_BYTES}.")
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8")
        raise _place(before, len(before), source).error(
            f"the byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8."
        ) from None
    for index, character in enumerate(text):
        if not character.isprintable() and character not in "\n\r\t":
            raise _place(text, index, source).error(
                f"the character U+{ord(character):04X} cannot be seen; delete it, or write what is meant."
            )
    return text


def _place(text: str, index: int, source: str) -> Place:
    lines = re.split(r"\r\n|\r|\n", text[:index])
    return Place(source, len(lines), len(lines[-1]) + 1)


@dataclass(slots=True)
class _Open:
    """A list or mapping that is not closed yet."""

    node: Node
    anchor: str | None
    key: str | None = None
    size: int = 1


class _Reader:
    """Builds the tree from the events, one after the other: nesting in the file is never nesting of calls."""

    def __init__(self, text: str, source: str) -> None:
        self.text = text
        self.source = source
        self.stack: list[_Open] = []
        self.anchors: dict[str, tuple[Node, int] | None] = {}
        self.root: Node | None = None
        self.documents = 0
        self.nodes = 0
        self.aliases = 0

    def read(self) -> Node:
        for event in yaml.parse(self.text, Loader=yaml.SafeLoader):
            self._take(event, self._begin(event))
        if self.root is None or self.root.value is None:
            raise Place(self.source, 1, 1).error('the recipe is empty; write for example "merge: a + 20 * (b - c)".')
        if not isinstance(self.root.value, dict):
            raise self.root.at.error('a recipe is a mapping; begin with a line such as "merge: a + 20 * (b - c)".')
        return self.root

    def _begin(self, event: yaml.Event) -> Place:
        assert event.start_mark is not None  # events of a text have their place in it
        return Place(self.source, event.start_mark.line + 1, event.start_mark.column + 1)

    def _take(self, event: yaml.Event, at: Place) -> None:
        match event:
            case yaml.DocumentStartEvent():
                self.documents += 1
                if self.documents > 1:
                    raise at.error("a second document begins; a recipe is one, so leave out the line ---.")
                if event.version or event.tags:
                    raise at.error("a recipe has no directives; leave out the line that begins with %.")
            case yaml.AliasEvent():
                self._alias(event, at)
            case yaml.ScalarEvent():
                self._refuse_tag(event, at)
                self._count(1, at)
                node = self._scalar(event, at)
                self._define(event.anchor, node, 1, at)
                self._put(node, 1)
            case yaml.MappingStartEvent() | yaml.SequenceStartEvent():
                self._refuse_tag(event, at)
                self._count(1, at)
                if len(self.stack) >= MAX_DEPTH:
                    raise at.error(f"this is nested more than {MAX_DEPTH} levels deep, which no recipe needs.")
                if event.anchor is not None:
                    self.anchors[event.anchor] = None
                empty: list[Node] | dict[str, Node] = {} if isinstance(event, yaml.MappingStartEvent) else []
                self._refuse_as_key(at)
                self.stack.append(_Open(Node(empty, at), event.anchor))
            case yaml.MappingEndEvent() | yaml.SequenceEndEvent():
                done = self.stack.pop()
                self._define(done.anchor, done.node, done.size, done.node.at)
                self._put(done.node, done.size)

    def _count(self, nodes: int, at: Place) -> None:
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            raise at.error(f"the recipe has more than {MAX_NODES} values, counting what aliases repeat.")

    def _refuse_tag(self, event: yaml.NodeEvent, at: Place) -> None:
        tag = getattr(event, "tag", None)
        if tag is not None:
            shown = tag.replace("tag:yaml.org,2002:", "!!")
            raise at.error(f"{quoted(shown)} is a tag, and a recipe has none: it is data; leave it out.")

    def _alias(self, event: yaml.AliasEvent, at: Place) -> None:
        self.aliases += 1
        if self.aliases > MAX_ALIASES:
            raise at.error(f"the recipe has more than {MAX_ALIASES} aliases; write some of them out.")
        name = event.anchor or ""
        anchored = self.anchors.get(name)
        if anchored is None:
            inside = name in self.anchors
            raise at.error(
                f"the alias {quoted('*' + name)} "
                + ("stands inside what it stands for." if inside else "has no anchor before it; define it first.")
            )
        node, size = anchored
        self._count(size, at)
        self._put(node, size, at)

    def _define(self, anchor: str | None, node: Node, size: int, at: Place) -> None:
        if anchor is None:
            return
        if self.anchors.get(anchor) is not None:
            raise at.error(f"the anchor {quoted('&' + anchor)} is defined a second time; give it another name.")
        self.anchors[anchor] = node, size

    def _put(self, node: Node, size: int, at: Place | None = None) -> None:
        """Add a finished node to the list or mapping around it, as the next key or value."""
        if not self.stack:
            self.root = node
            return
        around = self.stack[-1]
        around.size += size
        if isinstance(around.node.value, list):
            around.node.value.append(node)
        elif isinstance(around.node.value, dict):
            if around.key is None:
                around.key = self._key(around, node, at or node.at)
            else:
                around.node.value[around.key] = node
                around.key = None

    def _refuse_as_key(self, at: Place) -> None:
        around = self.stack[-1] if self.stack else None
        if around is not None and isinstance(around.node.value, dict) and around.key is None:
            raise at.error("a list or mapping cannot be a key; a key is a text.")

    def _key(self, around: _Open, node: Node, at: Place) -> str:
        key = node.value
        if not isinstance(key, str):
            shown = node.typed or "an empty key"
            raise at.error(f"the key {shown} is not a text; put it in quotes.")
        if key in around.node.keys:
            first = around.node.keys[key]
            raise at.error(f"{quoted(key)} stands here a second time, after line {first.line}; leave one out.")
        around.node.keys[key] = at
        return key

    def _scalar(self, event: yaml.ScalarEvent, at: Place) -> Node:
        text: str = event.value
        hidden = next(
            (character for character in text if not character.isprintable() and character not in "\n\t"), None
        )
        if hidden is not None:  # as an escape: "\x1b", or "\ud800", which no file system and no other program takes
            raise at.error(f"this text has the character U+{ord(hidden):04X}, which cannot be seen; leave it out.")
        value = plain(text, at) if event.style is None else text
        return Node(value, at, typed=text, places=tuple(self._aligned(event, text)) if isinstance(value, str) else ())

    def _aligned(self, event: yaml.ScalarEvent, text: str) -> Iterator[Place]:
        """The places of ``text``'s characters, as long as the file says the same one after the other."""
        begin, end = event.start_mark, event.end_mark
        assert begin is not None
        assert end is not None
        raw = self.text[begin.index : end.index]
        line, column, i = begin.line + 1, begin.column + 1, 0
        if event.style in ("|", ">"):
            i = len(raw.split("\n", 1)[0]) + 1
            line, column = line + 1, 1
        elif event.style is not None:
            i, column = 1, column + 1
        for character in text:
            while i < len(raw) and raw[i].isspace() and not (raw[i] == character == " "):
                line, column, i = (line + 1, 1, i + 1) if raw[i] == "\n" else (line, column + 1, i + 1)
            if i >= len(raw) or (raw[i] != character and not character.isspace()):
                return
            yield Place(self.source, line, column)
            if raw[i] == character:
                step = 2 if event.style == "'" and character == "'" else 1
                column, i = column + step, i + step
