"""Parts that a merge keeps of one model, as ``include``, ``exclude`` and ``protect`` say."""

from __future__ import annotations

from collections.abc import Collection

from mergetool import arch
from mergetool.arch import Anatomy
from mergetool.errors import FamilyError, UsageError
from mergetool.options.merging import MergeOptions
from mergetool.recipe.steps import Input


def parts(options: MergeOptions, anatomy: Anatomy, keeper: Input, carried: Collection[str]) -> dict[str, str]:
    """The parts of ``anatomy`` to keep as ``keeper`` has them, with the reason.

    It need not have those that are only ``carried``, or of a text encoder. Raises PatternError for a pattern that selects nothing, FamilyError where the keeper lacks a part, UsageError where nothing would be left to merge.
    """
    kept: dict[str, str] = {}
    if options.include:
        chosen = frozenset[str]().union(*arch.select(options.include, anatomy).values())
        kept |= {name: "not in `include`" for name in anatomy.parts if name not in chosen}
    for label, patterns in (("excluded", options.exclude), ("protected", options.protect)):
        for pattern, names in (arch.select(patterns, anatomy) if patterns else {}).items():
            kept |= dict.fromkeys(names, f"{label}: {pattern}")
    missing = [name for name in kept if name not in keeper.anatomy.parts and name not in carried]
    if missing:
        raise FamilyError(
            f'{keeper.name} has no tensor "{missing[0]}" to keep ({len(missing)} in all); name another model with `keep_from`.'
        )
    if len(kept) == len(anatomy.parts):
        raise UsageError("`protect` and `exclude` leave no tensor to merge; select less with them.")
    return kept
