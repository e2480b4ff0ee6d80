"""Findings about ``x - y``, and a LoRA on a model, by their stock models: headers alone."""

from __future__ import annotations

from collections.abc import Iterator

from mergetool.arch.stock import Ancestor, ancestor_of, kinship
from mergetool.comparison.finding import Finding, Level
from mergetool.recipe.steps import Input


def of_difference(x: Input, y: Input) -> Iterator[Finding]:
    """Tell where headers say that x was not trained from y.

    It is a warning where tensors or metadata say so, and a note where a name does.
    """
    one, other = _ancestor(x), _ancestor(y)
    family = x.anatomy.family
    if one is None or other is None or family is not y.anatomy.family:
        return
    pair = f"{x.name} - {y.name}"
    both = f"{x.name} is {one.told}, {y.name} {other.told}"
    level = _level(one, other)
    match kinship(family, one, other):
        case "strangers":
            yield Finding(
                level,
                f"{pair}: {both}, and neither is known to be trained from the other, so that the difference is no training's; "
                f"subtract the model that {x.name} was trained from",
            )
        case "parent":
            yield Finding(
                level,
                f"{pair} looks reversed: {both}, which was trained from it, so that this takes away what {y.name} learned; {y.name} - {x.name} adds it",
            )
        case "child":
            how = "distilled" if any(stock.distilled for stock in one.models) else "trained"
            yield Finding(
                "note",
                f"{pair}: {both}, from which {one.label} was {how}, so that the difference holds all of that; if "
                f"{x.name} is a fine-tune of {one.label}, subtract {one.label}",
            )


def of_lora(lora: Input, model: Input) -> Iterator[Finding]:
    """Tell where a LoRA was made for another stock model than the one it is added to."""
    family = model.anatomy.family
    file = lora.checkpoint
    one, other = ancestor_of(family, None, file.metadata, file.source), _ancestor(model)
    if one is not None and other is not None and kinship(family, one, other) == "strangers":
        yield Finding(
            "note",
            f"{lora.name} is for {one.told}, {model.name} is {other.told}, and neither is known to be trained from the other; look at pictures, or "
            "take a LoRA for this model",
        )


def _ancestor(model: Input) -> Ancestor | None:
    """That of a model in files; an expression is of several."""
    if model.plan is not None:
        return None
    checkpoint = model.checkpoint
    return ancestor_of(model.anatomy.family, model.anatomy, checkpoint.metadata, checkpoint.source, checkpoint.config)


def _level(one: Ancestor, other: Ancestor) -> Level:
    is_certain = one.listed and other.listed and "name" not in (one.by, other.by)
    return "warn" if is_certain else "note"
