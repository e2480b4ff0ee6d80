"""The node to use before a merge: the distance of two models, and a multiplier."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mergetool.api.comparisons import Compare as Asked
from mergetool.api.comparisons import run_compare
from mergetool.comfyui import host, links, widgets
from mergetool.comfyui.report import NodeEvents
from mergetool.comfyui.sources import CATEGORY

if TYPE_CHECKING:
    from mergetool.comparison.comparison import Report

FILES = {"plot": ".png", "report": ".html"}


class CompareNode:
    """``mergetool compare`` in one pass over the files."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Measure how far the variant lies from the base, by group, and advise a multiplier for their difference: it gets the size of reference - base, or, "
        "without a reference, the target change. Link the multiplier to Add Difference. Merges need not be saved."
    )
    RETURN_TYPES = ("FLOAT", "STRING")
    RETURN_NAMES = ("multiplier", "report")
    FUNCTION = "compare"
    OUTPUT_NODE = True
    LINKED = ("base", "variant", "reference", "reference_base", "onto")
    DAILY = ("target", "plot", "overwrite")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The models, the wanted change, and where to draw it."""
        return widgets.inputs(Asked, linked=cls.LINKED[2:], daily=cls.DAILY, own={})  # type: ignore[no-any-return]

    @classmethod
    def VALIDATE_INPUTS(cls, **held: Any) -> Literal[True] | str:
        """True, or the error in a value or a name, before anything runs."""
        return host.first_error(lambda: cls._files(held), lambda: widgets.check(Asked, held))

    @host.computing
    def compare(self, **held: Any) -> dict[str, Any]:
        """The advised multiplier, 0 where nothing differs, and the report. Raises MergetoolError."""
        named = {name: links.argument(held[name]) for name in self.LINKED if held.get(name)}
        files = self._files(held)
        for path in files.values():
            host.make_folder(path)
        result = run_compare(widgets.request(Asked, held | named | files), NodeEvents())
        report = _report(result)
        ui: dict[str, Any] = {"text": [report]}
        if "plot" in files:
            ui["images"] = [_shown(files["plot"])]
        return {"ui": ui, "result": (float(result.recommended or 0), report)}

    @classmethod
    def _files(cls, held: dict[str, Any]) -> dict[str, Any]:
        """The places of the chosen files. Raises UsageError."""
        chosen = {
            name: (host.inside(host.OUTPUT, held[name]), ending) for name, ending in FILES.items() if held.get(name)
        }
        return {
            name: path if path.suffix == ending else path.with_name(path.name + ending)
            for name, (path, ending) in chosen.items()
        }


def _report(comparison: Report) -> str:
    from mergetool.comparison.energies import percent

    size = "the reference's size" if comparison.reference else f"a change of {percent(comparison.target)}"
    lines = [f"{comparison.variant} - {comparison.base}, to be added to {comparison.onto}"]
    lines += [f"{finding.level}: {finding.text}" for finding in comparison.lineage]
    for name, energies in (*comparison.groups().items(), ("all", comparison.total)):
        wanted = energies.to_reference if comparison.reference else energies.to_change(comparison.target)
        cosine = f", cosine {energies.cosine:.3f}" if comparison.reference and energies.cosine is not None else ""
        advice = "" if wanted is None else f", x {wanted:.4g} for {size}"
        kept = " (not in the totals)" if name != "all" and comparison.is_excluded(name) else ""
        lines.append(f"{name}: distance {percent(energies.distance)}{cosine}{advice}{kept}")
    if comparison.lost.moved:
        untraced = percent(comparison.lost.eaten / comparison.lost.moved)
        lines.append(
            f"{comparison.expression} in {comparison.dtype}: {untraced} of the elements would show nothing of it"
        )
    return "\n".join(lines)


def _shown(path: Path) -> dict[str, str]:
    """The place of a picture, in the words of ComfyUI's page."""
    place = path.relative_to(host.inside(host.OUTPUT, path.name).parent)
    return {
        "filename": path.name,
        "subfolder": "" if place.parent == Path() else place.parent.as_posix(),
        "type": "output",
    }
