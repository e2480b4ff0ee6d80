"""How the merges of a recipe are verified when they are made."""

from __future__ import annotations

from mergetool.making.places import Places
from mergetool.recipe.file import Output
from mergetool.recipe.plan import Plan
from mergetool.recipe.provenance import display_names
from mergetool.recipe.schema import Pictures
from mergetool.sampler.settings import PartsOptions, StageOptions
from mergetool.verification.looking import Wish


def places_of(plan: Plan) -> dict[str, str]:
    """Where the models of a merge are, by the names that it records."""
    return {name: place for place, name in display_names([model.name for model in plan.inputs]).items()}


def wish_of(places: Places, output: Output, asked: bool | str | Pictures) -> tuple[Wish, bool]:
    """How an output wants to be looked at, and whether pictures are made."""
    if isinstance(asked, bool | str):
        return Wish(), asked == "pictures"
    names, folder, default = places.names(output), places.recipe.folder, Wish()
    said = {name: getattr(asked, name) for name in asked.model_fields_set}
    guidance, shift, strength = (said.get(name) for name in ("guidance", "shift", "strength"))
    wish = Wish(
        first=StageOptions(
            steps=said.get("steps"),
            guidance=None if guidance is None else float(guidance),
            shift=None if shift is None else float(shift),
        ),
        second=StageOptions(
            model=names[asked.refiner] if asked.refiner else None,
            steps=said.get("refine_steps"),
            strength=None if strength is None else str(strength),
            strength_as=said.get("strength_as"),
        ),
        prompts=folder / asked.prompts if asked.prompts else None,
        seeds=default.seeds if asked.seeds is None else str(asked.seeds),
        size=asked.size,
        parts=PartsOptions(
            pipeline=names[asked.pipeline] if asked.pipeline else None,
            text_encoder=folder / asked.text_encoder if asked.text_encoder else None,
            tokenizer=folder / asked.tokenizer if asked.tokenizer else None,
            vae=folder / asked.vae if asked.vae else None,
        ),
    )
    return wish, asked.pictures
