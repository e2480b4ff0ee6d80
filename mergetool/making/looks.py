"""Verify the merges of a recipe as they are made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mergetool.checkpoint.stamp import display_names
from mergetool.making.places import Places
from mergetool.options.table import rows
from mergetool.options.verifying import LookOptions
from mergetool.recipe.file import RecipeOutput, look_of
from mergetool.recipe.plan import Plan


def places_of(plan: Plan) -> dict[str, str]:
    """The places of a merge's models, by the names that it records."""
    return {name: place for place, name in display_names([model.name for model in plan.inputs]).items()}


def asked_of(places: Places, output: RecipeOutput) -> LookOptions | None:
    """The look that an output asks for, or None.

    A page lies beside the output, other files beside the recipe.
    """
    look = look_of(output, places.names(output))
    if look is None:
        return None
    beside: dict[str, Any] = {}
    for name in rows(LookOptions):
        said = getattr(look, name)
        if isinstance(said, Path):
            beside[name] = (places.folder if name == "report" else places.recipe.folder) / said
    return replace(look, **beside)
