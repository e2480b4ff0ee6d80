"""Selection patterns, by which ``protect``, ``exclude`` and other options name parts."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches

import re2

from mergetool.arch import encoders
from mergetool.arch.anatomy import Anatomy, is_number
from mergetool.checkpoint.names import quoted
from mergetool.errors import PatternError

MAX_PATTERN = 500  # characters; the longest tensor name of Z-Image has 51
_MAX_NAMES_SUGGESTED_FROM = 5_000
_RANGE_WITHIN = re.compile(r"(?P<stack>[^*?\[]+?)\.(?P<range>[0-9]{1,9}-[0-9]{1,9})\.(?P<rest>.+)")
_BLOCKS = re.compile(r"(?P<stack>.+)\.(?P<first>[0-9]{1,9})(?:-(?P<last>[0-9]{1,9}))?")


def select(patterns: Iterable[str], anatomy: Anatomy) -> dict[str, frozenset[str]]:
    """Pattern -> canonical names of its parts. No set is empty, and patterns keep their order.

    A pattern is the first of these that it can be:

    - ``re:REGEX``, which must match a whole tensor name;
    - a group of the family (``refiner``), or a block as block-weight tools name it (``IN04``, ``M00``, ``OUT11``, ``BASE``);
    - ``layers.N`` or ``layers.A-B``: everything under those numbered components, B included. Components are
      compared whole, so ``layers.1`` is not ``layers.10``; any numbered stack works (``noise_refiner.0``);
    - a glob (``*``, ``?``, ``[...]``) over whole tensor names, case-sensitive; ``*`` also crosses dots;
    - a glob over modules, when it is no tensor's whole name: everything beneath (``layers.*.attention``);
    - a range inside a path: ``layers.0-9.attention`` is each of ``layers.0.attention`` to ``layers.9.attention``;
    - ``PATTERN.GROUP``: what of a group PATTERN selects (``layers.q``, ``layers.*.attention.q``, ``layers.0-9.ffn``).

    Names are the canonical one, the one of each layout, and the stored one with its prefix. A name that stands
    for several parts selects all of them: ``layers.0.attention.qkv.weight`` means q, k and v.

    Raises PatternError for a pattern that is empty, longer than 500 characters or malformed, that leaves the
    range of blocks, or that matches nothing; that last message lists the groups.
    """
    return {pattern: _select_one(pattern, anatomy) for pattern in patterns}


def _select_one(pattern: str, anatomy: Anatomy) -> frozenset[str]:
    if not pattern:
        raise PatternError(f"A selection pattern is empty; give {_forms(anatomy)}.")
    if len(pattern) > MAX_PATTERN:
        raise PatternError(
            f"The pattern {quoted(pattern[:40])}... has {len(pattern)} characters where at most {MAX_PATTERN} are "
            "allowed; split it into several patterns."
        )
    selected = _by_name(_expression(pattern), anatomy) if pattern.startswith("re:") else _by_path(pattern, anatomy)
    if not selected:
        raise PatternError(_nothing_matched(pattern, anatomy))
    return selected


def _expression(pattern: str) -> Callable[[str], bool]:
    """Whether a whole name matches ``re:REGEX``: by RE2, whose time is linear in the name's length, since patterns come from recipes and files' metadata."""
    options = re2.Options()
    options.log_errors = False
    try:
        matches = re2.compile(pattern.removeprefix("re:"), options).fullmatch  # type: ignore[no-untyped-call]
    except re2.error as error:
        problem = error.args[0].decode("utf-8", "replace") if error.args else "unknown"
        raise PatternError(
            f"{quoted(pattern)} is not a regular expression of RE2: {problem}; it has no look-around and no back-references "
            "(see github.com/google/re2/wiki/Syntax)."
        ) from None
    except UnicodeEncodeError:
        raise PatternError(f"{quoted(pattern)} holds a character that is no text; write it without.") from None
    return lambda name: matches(name) is not None


def _by_path(pattern: str, anatomy: Anatomy) -> frozenset[str]:
    return (
        _by_group(pattern, anatomy)
        or _by_block(pattern, anatomy)
        or _by_glob(pattern, anatomy)
        or _by_glob(f"{pattern}.*", anatomy)
        or _by_inner_range(pattern, anatomy)
        or _by_group_within(pattern, anatomy)
    )


def _by_group(group: str, anatomy: Anatomy) -> frozenset[str]:
    family = anatomy.family
    return frozenset(
        part.name
        for part in anatomy.parts.values()
        if group in family.groups(part.name, part.shape) or group == family.block_name(part.name)
    )


def _by_block(pattern: str, anatomy: Anatomy) -> frozenset[str]:
    match = _BLOCKS.fullmatch(pattern.removeprefix(anatomy.prefix))
    if match is None:
        return frozenset()
    stack = match["stack"]
    blocks = _blocks(stack, anatomy)
    if not blocks:
        return frozenset()
    first, last = int(match["first"]), int(match["last"] or match["first"])
    if first > last:
        raise PatternError(f'"{pattern}" runs backwards; write "{stack}.{last}-{first}".')
    if last > max(blocks):
        raise PatternError(
            f'"{pattern}" goes past the end of "{stack}": found {_count(blocks)}, wanted at most '
            f'"{stack}.{min(blocks)}-{max(blocks)}".'
        )
    return frozenset(name for block, names in blocks.items() if first <= block <= last for name in names)


def _by_inner_range(pattern: str, anatomy: Anatomy) -> frozenset[str]:
    """``STACK.A-B.REST``: a range that is not the end of the path."""
    match = _RANGE_WITHIN.fullmatch(pattern.removeprefix(anatomy.prefix))
    if match is None or not _by_block(f"{match['stack']}.{match['range']}", anatomy):
        return frozenset()
    first, last = map(int, match["range"].split("-"))
    numbers = (number for number in _blocks(match["stack"], anatomy) if first <= number <= last)
    return frozenset[str]().union(*(_by_path(f"{match['stack']}.{n}.{match['rest']}", anatomy) for n in numbers))


def _by_group_within(pattern: str, anatomy: Anatomy) -> frozenset[str]:
    """``PATTERN.GROUP``."""
    outer, dot, group = pattern.rpartition(".")
    members = _by_group(group, anatomy) if dot and outer else frozenset()
    return members & _by_path(outer, anatomy) if members else members


def _blocks(stack: str, anatomy: Anatomy) -> dict[int, list[str]]:
    """The numbered components right under the path ``stack`` of any layout, each with the parts beneath it."""
    blocks: dict[int, list[str]] = {}
    for part in anatomy.parts:
        for name in {part, *_layouts(part, anatomy)}:
            if name.startswith(f"{stack}."):
                number = name[len(stack) + 1 :].split(".", 1)[0]
                if is_number(number) and len(number) <= 9:
                    blocks.setdefault(int(number), []).append(part)
    return blocks


def _by_glob(glob: str, anatomy: Anatomy) -> frozenset[str]:
    # fnmatch.translate wraps each "*" in an atomic group, so a glob never backtracks over an earlier star.
    matches = re.compile(fnmatch.translate(glob)).match
    return _by_name(lambda name: matches(name) is not None, anatomy)


def _by_name(matches: Callable[[str], bool], anatomy: Anatomy) -> frozenset[str]:
    return frozenset(name for name in anatomy.parts if any(map(matches, _spellings(name, anatomy))))


def _spellings(part: str, anatomy: Anatomy) -> set[str]:
    return {part, anatomy.parts[part].stored.tensor, *_layouts(part, anatomy)}


def _layouts(part: str, anatomy: Anatomy) -> set[str]:
    """The tensor that holds a part in each layout."""
    return {anatomy.family.stored_name(part, layout) for layout in anatomy.family.layouts}


def _nothing_matched(pattern: str, anatomy: Anatomy) -> str:
    family = anatomy.family
    if any(
        name == pattern
        or name.startswith(f"{pattern}.")
        or fnmatch.fnmatchcase(name, pattern)
        or pattern in {encoders.encoder_of(name), *encoders.groups(name)}
        for name in anatomy.outside
    ):
        return (
            f"The pattern {quoted(pattern)} matches only what is bundled with the model, which is not of it and is copied as it is; leave "
            "the pattern out, or see `bundled`."
        )
    empty_group = " (a group it has nothing in)" if pattern in family.group_order else ""
    nearest = _nearest(pattern, anatomy)
    suggestion = f" (did you mean {quoted(nearest)}?)" if nearest is not None else ""
    return (
        f"The pattern {quoted(pattern)} matches no tensor of this {family.name} model{empty_group}{suggestion}; "
        f"give {_forms(anatomy)}."
    )


def _nearest(pattern: str, anatomy: Anatomy) -> str | None:
    if pattern.startswith("re:"):
        return None
    candidates = list(anatomy.family.group_names(anatomy))
    if len(anatomy.parts) <= _MAX_NAMES_SUGGESTED_FROM:
        candidates += sorted({spelling for part in anatomy.parts for spelling in _spellings(part, anatomy)})
    return next(iter(get_close_matches(pattern, candidates, n=1, cutoff=0.75)), None)


def _forms(anatomy: Anatomy) -> str:
    groups = ", ".join(anatomy.family.group_names(anatomy))
    layers = _blocks("layers", anatomy)
    blocks = f"blocks such as layers.{min(layers)}-{max(layers)}, " if layers else "blocks such as layers.0-3, "
    return f"a group ({groups}), {blocks}a glob over tensor or module names, or re:REGEX"


def _count(blocks: dict[int, list[str]]) -> str:
    return "1 block" if len(blocks) == 1 else f"{len(blocks)} blocks"
