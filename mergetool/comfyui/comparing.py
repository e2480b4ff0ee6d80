"""The node that looks before a merge: how far apart two models are, and which multiplier their difference wants."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mergetool.comfyui import host, links
from mergetool.comfyui.sources import CATEGORY

if TYPE_CHECKING:
    from mergetool.comparison.comparison import Report


class Compare:
    """``mergetool compare`` in one pass over the files."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "How far the variant lies from the base, by group, and the multiplier to add the difference with: what gives it the size of reference - base, or, "
        "without a reference, the wanted change. Link the multiplier to Add Difference. All are files."
    )
    RETURN_TYPES = ("FLOAT", "STRING")
    RETURN_NAMES = ("multiplier", "report")
    FUNCTION = "compare"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The models, the wanted change, and where to draw it."""
        change = "Wanted size of the change, as a share of the norm of what is changed."
        picture = "Name of a heat map in the output folder; empty for none."
        return {
            "required": {
                "base": (links.MODEL, {}),
                "variant": (links.MODEL, {}),
                "wanted_change": (
                    "FLOAT",
                    {"default": 0.01, "min": 1e-6, "max": 100.0, "step": 0.001, "round": False, "tooltip": change},
                ),
                "picture": ("STRING", {"default": "", "tooltip": picture}),
            },
            "optional": {
                "reference": (links.MODEL, {"tooltip": "A fine-tune of the base whose difference has the right size."}),
                "onto": (links.MODEL, {"tooltip": "What the difference will be added to; the base without it."}),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, picture: str | None) -> Literal[True] | str:
        """True, or what is wrong with the picture's name, before anything runs; None is a linked one, not known yet."""
        return host.first_error(lambda: host.target(host.OUTPUT, picture, ".png") if picture else None)

    @host.computing
    def compare(
        self,
        base: str,
        variant: str,
        wanted_change: float,
        picture: str,
        reference: str | None = None,
        onto: str | None = None,
    ) -> dict[str, Any]:
        """The advised multiplier, 0 where nothing differs, and the report. Raises MergetoolError."""
        import mergetool

        asked = "a comparison"
        found = mergetool.compare(
            links.one_model(base, asked),
            links.one_model(variant, asked),
            reference=links.one_model(reference, asked) if reference else None,
            onto=links.one_model(onto, asked) if onto else None,
            target=wanted_change,
            progress=host.progress(),
        )
        report = _report(found)
        ui: dict[str, Any] = {"text": [report]}
        if picture:
            ui["images"] = [_draw(found, picture)]
        return {"ui": ui, "result": (float(found.recommended or 0), report)}


def _report(found: Report) -> str:
    from mergetool.comparison.energies import percent

    size = "the reference's size" if found.reference else f"a change of {percent(found.target)}"
    lines = [f"{found.variant} - {found.base}, to be added to {found.onto}"]
    lines += [f"{finding.level}: {finding.text}" for finding in found.lineage]
    for name, energies in (*found.groups().items(), ("all", found.total)):
        wanted = energies.to_reference if found.reference else energies.to_change(found.target)
        cosine = f", cosine {energies.cosine:.3f}" if found.reference and energies.cosine is not None else ""
        advice = "" if wanted is None else f", x {wanted:.4g} for {size}"
        kept = " (not in the totals)" if name != "all" and found.is_excluded(name) else ""
        lines.append(f"{name}: distance {percent(energies.distance)}{cosine}{advice}{kept}")
    if found.lost.moved:
        untraced = percent(found.lost.eaten / found.lost.moved)
        lines.append(f"{found.expression} in {found.dtype}: {untraced} of the elements would show nothing of it")
    return "\n".join(lines)


def _draw(found: Report, picture: str) -> dict[str, str]:
    """Write the heat map, over an older one of that name, and say where in the words of ComfyUI's page."""
    from mergetool.comparison import heatmap, plots

    path = host.target(host.OUTPUT, picture, ".png")
    host.make_folder(path)
    heat = heatmap.of_distances(found.distances)
    plots.write_png(path, heat, label="relative distance", title=f"{found.variant} - {found.base}", overwrite=True)
    place = path.relative_to(host.target(host.OUTPUT, path.name, ".png").parent)
    return {
        "filename": path.name,
        "subfolder": "" if place.parent == Path() else place.parent.as_posix(),
        "type": "output",
    }
