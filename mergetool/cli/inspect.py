"""``mergetool inspect``: describe a file."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from mergetool.api.catalogue import Inspect, run_inspect
from mergetool.cli import console
from mergetool.cli.parameters import Typed, command
from mergetool.cli.report import CommandEvents

if TYPE_CHECKING:
    from mergetool.models import OpenedModel

EXAMPLES = """\b
Examples:
  mergetool inspect lab.base
  mergetool inspect alkahest
  mergetool inspect out.safetensors --hash
  mergetool inspect ./Z-Image --json

MODEL may also be an address, hf://Tongyi-MAI/Z-Image/transformer; mergetool downloads it if it is not in the cache.
"""


@command(Inspect)
def inspect(typed: Typed) -> None:
    """Show what a model file holds.

    The page has its family, layout, dtypes, groups with their sizes, presets and metadata.
    """
    with _InspectReport.shown(typed) as report:
        run_inspect(typed.request(Inspect), report)


class _InspectReport(CommandEvents):
    """The description of a model."""

    def done(self, plan: OpenedModel, result: dict[str, str]) -> None:
        """All of it."""
        if self.prints:
            _print(plan.name, plan, result, verbose=self.typed.verbose)
        else:
            self.json |= _as_json(plan.name, plan, result, verbose=self.typed.verbose)


@dataclass
class _Coded:
    """The weights in one container: their number, bytes and elements, and how many lie in each group that is quantised."""

    weights: int = 0
    nbytes: int = 0
    elements: int = 0
    groups: Counter[str] = field(default_factory=Counter)

    @property
    def bits(self) -> float:
        """Bits an element, scales and padding included."""
        return round(8 * self.nbytes / self.elements, 2)


def _quantised(opened: OpenedModel) -> dict[str, _Coded]:
    """Container -> what of the model's stored weights is in it, the most frequent first."""
    parts = {part.stored.tensor: part for part in opened.anatomy.parts.values() if part.encoding}
    found: dict[str, _Coded] = {}
    family, tensors = opened.anatomy.family, opened.checkpoint.tensors
    for part in parts.values():
        if part.encoding is None:
            continue
        one = found.setdefault(part.encoding.label, _Coded())
        one.weights += 1
        one.nbytes += sum(tensors[stored].nbytes for stored in part.encoding.tensors)
        one.elements += prod(part.encoding.shape)
        one.groups.update(sorted(family.groups(part.name, part.shape) & family.quantised))
    return dict(sorted(found.items(), key=lambda item: -item[1].weights))


def _dtypes(opened: OpenedModel) -> dict[str, int]:
    return dict(Counter(info.dtype.name for info in opened.checkpoint.tensors.values()).most_common())


def _print(model: str, opened: OpenedModel, hashes: dict[str, str], *, verbose: bool) -> None:
    from mergetool.arch import describe

    checkpoint, anatomy = opened.checkpoint, opened.anatomy
    description = describe(anatomy)
    total = description.total
    console.heading("model", f"{model}  {console.size(sum(file.size for file in checkpoint.files))}")
    console.heading(
        "",
        f"{_kind(opened)}, {anatomy.layout} layout, {console.plural(len(checkpoint.tensors), 'tensor')}, "
        f"{console.parameters(total.parameters)} parameters, {checkpoint.container}",
    )
    if anatomy.family.caveat:
        console.heading("family", anatomy.family.caveat)
    if opened.refused:
        console.heading("refused", opened.refused)
    for note in opened.notes:
        console.heading("note", f"{model} {note}")
    for label, coded in _quantised(opened).items():
        where = "".join(f", {count} in {group}" for group, count in sorted(coded.groups.items()))
        console.heading(
            "", f"{console.plural(coded.weights, 'weight')} quantised: {label}, {coded.bits:g} bits an element{where}"
        )
    if anatomy.prefix:
        console.heading("", f'prefix "{anatomy.prefix}"')
    console.heading("", "dtypes: " + ", ".join(f"{count} {name}" for name, count in _dtypes(opened).items()))
    if anatomy.outside:
        console.heading("", f"{len(anatomy.outside)} outside the model: {console.listed(list(anatomy.outside))}")
    beside = {group for name in anatomy.beside for group in anatomy.family.groups(name, anatomy.parts[name].shape)}
    console.table(
        ["group", "tensors", "parameters", "bytes", "share"],
        (
            [
                group.name,
                str(group.tensors),
                console.parameters(group.parameters),
                console.size(group.nbytes),
                "" if group.name in beside else f"{100 * group.parameters / max(1, total.parameters):.1f} %",
            ]
            for group in description.groups
        ),
    )
    kinds: dict[str, list[str]] = {}
    for i, preset in enumerate(anatomy.family.presets):
        if preset.kind:
            kinds.setdefault(preset.kind, []).append(preset.name)
        else:
            console.heading("" if i else "preset", f"--set preset:{preset.name}  {', '.join(preset.settings)}")
    for kind, names in kinds.items():
        console.heading("", f"--set preset:NAME, {kind}: {', '.join(names)}")
    for key, value in checkpoint.metadata.items():
        console.heading("meta", f"{key}: {value if verbose or len(value) <= 300 else value[:300] + '...'}")
    for name, digest in hashes.items():
        console.heading("sha256", f"{digest}  {digest[:10].upper()}  {name}")
    if verbose:
        for name, info in checkpoint.tensors.items():
            console.heading("", f"{name}  {list(info.shape)}  {info.dtype.name}")


def _kind(opened: OpenedModel) -> str:
    family = opened.anatomy.family
    variant = family.variant(opened.anatomy, opened.checkpoint.config)
    return f"{family.name} ({variant})" if variant else family.name


def _as_json(model: str, opened: OpenedModel, hashes: dict[str, str], *, verbose: bool) -> dict[str, Any]:
    from mergetool.arch import describe

    checkpoint, anatomy = opened.checkpoint, opened.anatomy
    description = describe(anatomy)
    result: dict[str, Any] = {
        "model": model,
        "bytes": sum(file.size for file in checkpoint.files),
        "files": [file.path.name for file in checkpoint.files],
        "container": checkpoint.container,
        "quantised": {label: coded.weights for label, coded in _quantised(opened).items()},
        "quantised_bits": {label: coded.bits for label, coded in _quantised(opened).items()},
        "quantised_groups": {label: dict(coded.groups) for label, coded in _quantised(opened).items()},
        "notes": list(opened.notes),
        "refused": opened.refused,
        "family": anatomy.family.name,
        "variant": anatomy.family.variant(anatomy, checkpoint.config),
        "proved": not anatomy.family.caveat,
        "layout": anatomy.layout,
        "prefix": anatomy.prefix,
        "tensors": len(checkpoint.tensors),
        "parameters": description.total.parameters,
        "dtypes": _dtypes(opened),
        "groups": {
            g.name: {"tensors": g.tensors, "parameters": g.parameters, "bytes": g.nbytes} for g in description.groups
        },
        "presets": {preset.name: list(preset.settings) for preset in anatomy.family.presets},
        "outside": list(anatomy.outside),
        "metadata": dict(checkpoint.metadata),
    }
    if hashes:
        result["sha256"] = hashes
        result["autov2"] = {name: digest[:10].upper() for name, digest in hashes.items()}
    if verbose:
        result["tensor_list"] = [
            {"name": name, "shape": list(info.shape), "dtype": info.dtype.name}
            for name, info in checkpoint.tensors.items()
        ]
    return result
