"""docs/reference/families.md, from the register of families."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping

from mergetool.adapters.formats import format_for
from mergetool.arch.anatomy import NATIVE
from mergetool.arch.families import FAMILIES
from mergetool.arch.generic import Generic
from mergetool.arch.known import KnownFamily, Like
from mergetool.arch.sampling import SamplingDefaults
from mergetool.arch.signs import IN_FP16
from mergetool.arch.table import BLOCK

HEAD = """\
# Families

What mergetool knows of each kind of model. It looks at tensor names and shapes, never at a file's name. `mergetool inspect FILE` says which family a file is of.

A family that is known by name can be converted between its layouts, has groups and presets for `--set`, and takes LoRAs in every spelling of its trainers. Any other model is
[generic](#generic): it merges all the same, under its own names."""

SUMMARY = "| family | layouts | stacks of blocks | names in its table | LoRAs loaded by | `sample` |"


def lines() -> Iterator[str]:
    """The page."""
    yield from HEAD.splitlines()
    yield from ("", SUMMARY, "|" + "---|" * (SUMMARY.count("|") - 1))
    yield from map(_summary, FAMILIES)
    for family in FAMILIES:
        yield from _family(family)
    yield from ("", "## generic", "", *_docstring(Generic))


def _summary(family: KnownFamily) -> str:
    loaders = ["-"] if family.copy_of else ["ComfyUI", *(["diffusers"] if family.loader else [])]
    cells = [
        f"[{family.name}](#{_anchor(family.name)})",
        " and ".join(family.layouts),
        _words(_stacks(family)) or "-",
        str(len(family.table.spots)),
        " and ".join(loaders),
        "yes" if family.transformer else "in a pipeline's folder" if family.sampling else "no",
    ]
    return f"| {' | '.join(cells)} |"


def _family(family: KnownFamily) -> Iterator[str]:
    yield from ("", f"## {family.name}", "", *_docstring(type(family)))
    yield from ("", "**Recognised by**", "")
    for signature in family.signatures:
        has, lacks = _tensors(signature.has), _tensors(signature.lacks)
        yield f"- layout {signature.layout}: {has}" + (f"; and not {lacks}" if lacks else "")
    for why, names in _strangers(family).items():
        yield f"- A file with {names} is {why}."
    if family.variants:
        told = dict.fromkeys(variant.name for variant in family.variants)
        yield from ("", "**Variants told apart**", "", f"{', '.join(told)}.")
    yield from ("", "**Groups**", "", f"{_words(family.group_order)}.")
    if family.presets:
        yield from ("", "**Presets**", "", "| preset | stands for |", "|---|---|")
        for preset in family.presets:
            if not preset.kind:
                yield f"| `preset:{preset.name}` | {_words(preset.settings)} |"
        for kind in dict.fromkeys(preset.kind for preset in family.presets if preset.kind):
            names = (f"preset:{preset.name}" for preset in family.presets if preset.kind == kind)
            yield from ("", f"Each of these is {kind}: {_words(names)}.")
    yield from ("", "**Stored**", "", *_stored(family))
    yield from ("", "**LoRAs**", "", *_loras(family))


def _stored(family: KnownFamily) -> Iterator[str]:
    for tensor, held in _fused(family).items():
        yield f"- {tensor} holds {_words(held)}, in this order of rows."
    if family.quantised:
        yield f"- `--quant` takes the matrices of {_words(sorted(family.quantised))}, and none of {_words(sorted(family.precise))}."
    else:
        yield "- `--quant` is refused: no program reads their weights by scales."
    if family.unquantised:
        yield f"- It leaves {_words(sorted(family.unquantised))} as they are: programs read a size off their stored shape."
    if family.quantised_layout:
        yield f"- A quantised file has the {family.quantised_layout} layout."
    if family.kept:
        yield f"- Keep the group `{family.kept}` of one model (`--protect {family.kept}`); totals of `compare` leave it out."
    yield from map(_sampling, family.sampling)
    if family.fp16 != "computed":
        yield f"- Activations are known to leave fp16's range, so that {IN_FP16[family.fp16]}: store bf16, not fp16."
    if family.unused:
        yield f"- {_words(sorted(family.unused))} may be in a file and is never read by the model."


def _sampling(settings: SamplingDefaults) -> str:
    scale = "" if settings.scale is None else f"{settings.scale:g}"
    said = {"cfg": f"CFG {scale}", "distilled": f"guidance {scale}, which the model reads,", "none": "no guidance"}
    which = f" ({settings.name})" if settings.name else ""
    return (
        f"- `sample` draws in the folder of a `{settings.pipeline}Pipeline`{which} with {settings.steps} steps and {said[settings.guidance]} by default, as {settings.source} has it; "
        f"sides are multiples of {settings.unit}."
    )


def _loras(family: KnownFamily) -> Iterator[str]:
    if family.copy_of:
        yield "- No program loads LoRAs of it."
        return
    form = format_for(family)
    whole = ", which diffusers and ComfyUI both load whole" if family.loader else ""
    yield f"- `mergetool diff` writes names with `{form.prefix}` before them{whole}."
    theirs = sorted(prefix for prefix in family.in_comfyui if prefix)
    yield (
        f"- ComfyUI finds its own names behind {_words(NATIVE)}"
        + (f", and diffusers' names behind {_words(theirs)}" if theirs else "")
        + (" or nothing" if "" in family.in_comfyui else "")
        + "."
    )
    if family.loader:
        yield f"- diffusers loads them by `{family.loader}`."
    else:
        yield "- No loader of diffusers is tested for them."
    if not family.lora_alphas:
        yield "- Such files hold no alphas: diffusers misreads them behind that prefix."
    if family.other_names:
        yield f"- Modules under other names are read too: {_words(sorted(family.other_names))}."
    if family.lookalike:
        yield f"- A LoRA of {family.lookalike.name} has the same names; widths and words of the header tell it apart."


def _docstring(one: type) -> list[str]:
    return inspect.cleandoc(one.__doc__ or "").replace("``", "`").splitlines()


def _strangers(family: KnownFamily) -> dict[str, str]:
    """What other files are, by the tensors that show them."""
    found: dict[str, list[str]] = {}
    for name, why in family.strangers.items():
        found.setdefault(why.replace(" (tensor {tensor})", ""), []).append(name)
    return {why: " or ".join(f"`{name}`" for name in names) for why, names in found.items()}


def _stacks(family: KnownFamily) -> list[str]:
    """Every stack once; those that differ in numbers are one."""
    paths = (spot.path for spot in family.table.spots if BLOCK in spot.path)
    return list(dict.fromkeys(re.sub(r"\b\d+\b", "*", ".".join(path[: path.index(BLOCK)])) for path in paths))


def _fused(family: KnownFamily) -> dict[str, list[str]]:
    """Tensors of a layout that hold several modules, each with these in row order; in blocks from the block on."""
    found: dict[str, dict[int, str]] = {}
    for spot in family.table.spots:
        for layout, (path, piece) in spot.stored.items():
            if piece is not None:
                found.setdefault(f"`{_inside(path)}` of the {layout} layout", {})[piece] = _inside(spot.path)
    return {tensor: [held[piece] for piece in sorted(held)] for tensor, held in found.items()}


def _inside(path: tuple[str, ...]) -> str:
    return ".".join(path[path.index(BLOCK) + 1 :] if BLOCK in path else path)


def _tensors(signs: Mapping[str, Like]) -> str:
    return ", ".join(f"`{name}`" + (f" of {_shape(like)}" if like else "") for name, like in signs.items())


def _shape(like: tuple[int | None, ...]) -> str:
    return f"[{', '.join('any' if size is None else str(size) for size in like)}]"


def _words(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _anchor(title: str) -> str:
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c == "-")
