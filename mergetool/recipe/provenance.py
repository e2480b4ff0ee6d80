"""The record of a merge in its output: enough to repeat it, without paths, hosts or times."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergetool.checkpoint.names import quoted
from mergetool.checkpoint.stamp import display_names, stamp
from mergetool.errors import DataError, MergetoolError
from mergetool.options.merging import MergeOptions
from mergetool.options.table import recorded, rows
from mergetool.recipe.expression import Expression

if TYPE_CHECKING:
    from mergetool.recipe.steps import Input

NOT_FULL = "mergetool.not_full"
"""A key of a difference LoRA's metadata: no whole difference exists, so there is no second file."""

DERIVED = frozenset({"lora_adapter_metadata", NOT_FULL})
"""Metadata that follows from an output's tensors, and so says nothing of how it was made."""

_OPTIONS = rows(MergeOptions).values()
_KEYS = frozenset({"expression", "anchor", *(row.key for row in _OPTIONS)})
"""The keys of a recorded recipe. Nothing can be derived again from one that says more, be it damaged or of a later version."""

# A fingerprint has this length, so that a dry run can plan the header without reading a tensor.
FINGERPRINT_PLACEHOLDER = "sample-sha256:" + "0" * 64


def metadata(
    expression: Expression, inputs: Sequence[Input], options: MergeOptions, fingerprints: Mapping[str, str]
) -> dict[str, str]:
    """Make the ``__metadata__`` of a merge: recipe, version, and inputs with fingerprints.

    Names are written by `names_of`, so that no path is published; ``fingerprints`` are those of the files.
    """
    names = names_of(inputs)
    recipe: dict[str, object] = {"expression": expression.render(names)}
    if expression.records_anchor:
        recipe["anchor"] = names[expression.anchor]
    recipe |= recorded(options)
    if options.keep_from:
        recipe["from"] = names[options.keep_from]
    if options.rounding == "stochastic":
        recipe["seed"] = options.seed  # also where it is the default: it decides every byte
    return stamp("recipe", recipe, files_of(inputs, lambda leaf: fingerprints.get(leaf.name, FINGERPRINT_PLACEHOLDER)))


def names_of(inputs: Iterable[Input]) -> dict[str, str]:
    """Choose the name of each of ``inputs`` in a record.

    A file gets its `display_names`, an expression is written over those names.
    """
    leaves, computed = [], []
    waiting = list(inputs)
    for model in waiting:
        if model.plan is None:
            leaves.append(model.name)
        else:
            computed.append(model)
            waiting += model.plan.inputs
    names = display_names(list(dict.fromkeys(leaves)))
    for model in reversed(computed):  # inner ones first
        assert model.plan is not None
        names[model.name] = model.plan.expression.render(names)
    return names


def files_of(inputs: Iterable[Input], fingerprint: Callable[[Input], str]) -> list[tuple[str, str]]:
    """List the display name and fingerprint of every file behind ``inputs``, each once.

    Files of expressions come last, by name.
    """
    inputs = list(inputs)
    names = names_of(inputs)
    leaves = {model.name: model for model in inputs if model.plan is None}
    inner = {leaf.name: leaf for model in inputs for leaf in model.leaves() if leaf.name not in leaves}
    leaves |= {name: inner[name] for name in sorted(inner, key=lambda name: names[name])}
    return [(names[name], fingerprint(leaf)) for name, leaf in leaves.items()]


@dataclass(frozen=True, slots=True)
class Recorded:
    """The recipe that a merge wrote about itself.

    It has the expression, the options, and the fingerprint of each input by its recorded name.

    ``anchor`` is None in files that were made before it was recorded; see `Expression.as_written`.
    """

    expression: str
    anchor: str | None
    options: MergeOptions
    fingerprints: Mapping[str, str]


def is_recorded(stored: Mapping[str, str]) -> bool:
    """Whether a checkpoint's metadata holds the record of a merge."""
    return "mergetool.recipe" in stored and "mergetool.inputs" in stored


def read(stored: Mapping[str, str], source: str) -> Recorded:
    """The record in a checkpoint's metadata. Raises DataError where there is none, or a damaged one."""
    if not is_recorded(stored):
        raise DataError(f"{source} carries no recipe: it was not made by mergetool merge, or lost its metadata since.")
    try:
        recipe = json.loads(stored["mergetool.recipe"])
        recorded = {
            _name(entry["name"]): _text(entry["fingerprint"]) for entry in json.loads(stored["mergetool.inputs"])
        }
        _text(recipe["expression"])
        anchor = _text(recipe["anchor"]) if "anchor" in recipe else None
        unknown = sorted(recipe.keys() - _KEYS)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f"{source} carries a damaged recipe in its metadata; it cannot be verified.") from None
    if unknown:
        raise DataError(
            f"{source} carries a recipe with {quoted(unknown[0])}, which this mergetool does not know: it is damaged, or of a later "
            "version; it cannot be verified."
        )
    return Recorded(recipe["expression"], anchor, _options(recipe), recorded)


def _name(value: object) -> str:
    """A recorded name, as `display_names` gives it; a path or an ``hf://`` address would let a file choose the files to open or fetch."""
    name = _text(value)
    if "/" in name or "\\" in name:
        raise ValueError
    return name


def _text(value: object) -> str:
    """A recorded name or pattern; raises TypeError for anything else, which the planner would trip over."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is no text")
    return value


def changes(stored: Mapping[str, str], planned: Mapping[str, str]) -> list[str]:
    """Name the differences between an output's ``stored`` and ``planned`` metadata.

    Version, inputs and recipe are each put in words.

    Example: ``the input "tuned" has changed``. Empty where both are the same.
    """
    sentences = []
    for key in sorted({*stored, *planned} - DERIVED):
        old, new = stored.get(key), planned.get(key)
        if old == new:
            continue
        if key == "mergetool.version":
            sentences.append(f"it was made by mergetool {old or 'without a version'}, and this is {new}")
        elif key == "mergetool.inputs":
            sentences += _changed_inputs(_loaded(old), _loaded(new))
        elif key in ("mergetool.recipe", "mergetool.diff"):
            sentences.append(_changed_recipe(_loaded(old), _loaded(new)))
        else:
            sentences.append(
                f"its metadata has {'another' if old and new else 'no' if new else 'an additional'} {quoted(key)}"
            )
    return sentences


def _loaded(text: str | None) -> Any:
    try:
        return json.loads(text or "null")
    except (ValueError, RecursionError):
        return None


def _changed_inputs(old: Any, new: Any) -> list[str]:
    try:
        before, after = ({entry["name"]: entry["fingerprint"] for entry in inputs} for inputs in (old, new))
    except (TypeError, KeyError):
        return ["its record of inputs is damaged"]
    if before.keys() != after.keys():
        return [f"it was made of {', '.join(map(quoted, before))}, not of {', '.join(map(quoted, after))}"]
    changed = [name for name in after if before[name] != after[name]]
    return [f"the input {quoted(name)} has changed" for name in changed] or ["its inputs are written in another way"]


def _changed_recipe(old: Any, new: Any) -> str:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return "it carries no recipe" if old is None else "its recipe is damaged"
    differing = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    return f"its recipe is another ({', '.join(differing)})" if differing else "its recipe is written in another way"


def _options(recipe: Mapping[str, Any]) -> MergeOptions:
    try:
        return MergeOptions(**{row.name: recipe[row.key] for row in _OPTIONS if row.key in recipe})
    except (ValueError, TypeError, AttributeError, ZeroDivisionError, MergetoolError) as error:
        raise DataError(f"the recorded options are damaged ({error}); the file cannot be verified.") from None
