"""docs/reference/families.md, from the register of families."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping

from mergetool.adapters.formats import format_for
from mergetool.arch.anatomy import NATIVE
from mergetool.arch.families import FAMILIES, NAMED
from mergetool.arch.generic import Generic, NamedFamily
from mergetool.arch.known import KnownFamily
from mergetool.arch.sampling import SamplingDefaults
from mergetool.arch.signs import IN_FP16, Like, Variant
from mergetool.arch.table import BLOCK
from tests.oracles.supported import TRAINED

HEAD = """\
# Families

What mergetool knows of each kind of model. It looks at tensor names and shapes, never at a file's name. `mergetool inspect FILE` says which family a file is of.

| | known of it |
|---|---|
| [{proved} proved families](#proved-families) | names in both layouts, groups and presets for `--set`, LoRAs in every spelling of their trainers, what `--quant` may take: each held against ComfyUI and diffusers |
| [{named} named families](#named-families) | the name, variants, what `--quant` must leave alone; a merge keeps the names that its tensors have |
| [any other](#generic) | merges all the same, under its own names |

## Proved families"""

SUMMARY = "| family | variants told apart | stacks of blocks | LoRAs loaded by | `sample` |"

NAMED_HEAD = """\
## Named families

mergetool recognises these and knows no more. Every class of ComfyUI 0.30's list of models, and of diffusers 0.42.1 where it has one, ends in its own name
(`tests/arch/test_named.py`). They merge, compare, convert their dtype and quantise as [generic](#generic) models do:

- Two files must be in one layout, ComfyUI's or diffusers': no map between the two is known. Files of two families are refused.
- A LoRA is added by the names of its tensors, behind `diffusion_model.`, `transformer.` or `lora_unet_`. Names that only one trainer writes match nothing, and are listed.
- `mergetool diff` writes `diffusion_model.` and the model's own names, which ComfyUI loads for every model (tested for {tested}). Whether diffusers loads them is not proved.
- `--layout`, presets and `sample` need a proved family.
"""

SIGNED = ("both", "comfyui", "diffusers")
NAMED_TABLE = "| family | variants told apart | recognised by, in ComfyUI's names | in diffusers' |"


def lines() -> Iterator[str]:
    """The page."""
    yield from HEAD.format(proved=len(FAMILIES), named=len(NAMED)).splitlines()
    yield from ("", SUMMARY, "|" + "---|" * (SUMMARY.count("|") - 1))
    yield from map(_summary, FAMILIES)
    for family in FAMILIES:
        yield from _family(family)
    yield from (
        "",
        *NAMED_HEAD.format(tested=", ".join(TRAINED)).splitlines(),
        "",
        NAMED_TABLE,
        "|" + "---|" * (NAMED_TABLE.count("|") - 1),
    )
    yield from map(_named, sorted(NAMED, key=lambda family: family.name.casefold()))
    yield from ("", "## generic", "", *_docstring(Generic))


def _summary(family: KnownFamily) -> str:
    loaders = "ComfyUI and diffusers" if family.loader else "ComfyUI"
    cells = [
        f"[{family.name}](#{_anchor(family.name)})",
        _variants(family.variants) or "-",
        _words(_stacks(family)) or "-",
        "-" if family.copy_of else loaders,
        "yes" if family.transformer else "in a pipeline's folder" if family.sampling else "no",
    ]
    return f"| {' | '.join(cells)} |"


def _family(family: KnownFamily) -> Iterator[str]:
    yield from ("", f"### {family.name}", "", *_docstring(type(family)))
    rows = [*_recognised(family), *_stored(family), *_loras(family)]
    yield from ("", "| | |", "|---|---|", *(f"| {what} | {said} |" for what, said in rows if said))


def _recognised(family: KnownFamily) -> Iterator[tuple[str, str]]:
    for signature in family.signatures:
        has, lacks = _tensors(signature.has), _tensors(signature.lacks)
        yield f"shown in layout {signature.layout} by", has + (f"; and not {lacks}" if lacks else "")
    for why, names in _strangers(family).items():
        yield "not this", f"a file with {names} is {why}"
    stock = [
        f"{one.name} ({'distilled' if one.distilled else 'trained'} from {' and '.join(one.of)})"
        if one.of
        else one.name
        for one in family.stock
    ]
    if stock:
        yield "stock models", "; ".join(stock)
    yield "groups", _words(family.group_order)
    presets = [preset for preset in family.presets if not preset.kind]
    yield "presets", "; ".join(f"`preset:{preset.name}` is {_words(preset.settings)}" for preset in presets)
    for kind in dict.fromkeys(preset.kind for preset in family.presets if preset.kind):
        names = (f"preset:{preset.name}" for preset in family.presets if preset.kind == kind)
        yield "more presets", f"{_words(names)}: each is {kind}"


def _stored(family: KnownFamily) -> Iterator[tuple[str, str]]:
    for layout, held in _fused(family).items():
        yield f"fused in layout {layout}, in row order", held
    said = [f"the matrices of {_words(sorted(family.quantised))}, none of {_words(sorted(family.precise))}"]
    if family.unquantised:
        said.append(f"{_words(sorted(family.unquantised))} stays as it is: programs read a size off its stored shape")
    if family.quantised_layout:
        said.append(f"the file has the {family.quantised_layout} layout")
    yield (
        "`--quant` takes",
        "; ".join(said) if family.quantised else "nothing: no program reads their weights by scales",
    )
    if family.kept:
        yield "keep of one model", f"`--protect {family.kept}`; totals of `compare` leave it out"
    yield from (("`sample` draws", _sampling(settings)) for settings in family.sampling)
    if family.fp16 != "computed":
        yield "store as", f"bf16: activations are known to leave fp16's range, so that {IN_FP16[family.fp16]}"
    yield "never read", _words(sorted(family.unused))


def _sampling(settings: SamplingDefaults) -> str:
    scale = "" if settings.scale is None else f"{settings.scale:g}"
    said = {"cfg": f"CFG {scale}", "distilled": f"guidance {scale}, which the model reads,", "none": "no guidance"}
    which = f" ({settings.name})" if settings.name else ""
    return (
        f"in the folder of a `{settings.pipeline}Pipeline`{which} with {settings.steps} steps and {said[settings.guidance]} by default, as {settings.source} has it; "
        f"sides are multiples of {settings.unit}"
    )


def _loras(family: KnownFamily) -> Iterator[tuple[str, str]]:
    if family.copy_of:
        yield "LoRAs", "no program loads LoRAs of it"
        return
    form = format_for(family)
    alphas = "" if family.lora_alphas else "; no alphas, which diffusers misreads behind that prefix"
    by = (
        f"diffusers (`{family.loader}`) and ComfyUI load it whole"
        if family.loader
        else "ComfyUI; no loader of diffusers is tested"
    )
    yield "`diff` writes", f"names behind `{form.prefix}`{alphas}: {by}"
    theirs = sorted(prefix for prefix in family.in_comfyui if prefix)
    yield (
        "ComfyUI finds",
        f"its own names behind {_words(NATIVE)}"
        + (f", diffusers' behind {_words(theirs)}" if theirs else "")
        + (" or nothing" if "" in family.in_comfyui else ""),
    )
    yield "LoRAs name modules also", _words(sorted(family.other_names))
    if family.lookalike:
        yield (
            "LoRAs like its own",
            f"{family.lookalike.name} has the same names; widths and words of the header tell them apart",
        )


def _named(family: NamedFamily) -> str:
    signs = {
        layout: " *or* ".join(_tensors(sign.has) for sign in family.signs if sign.layout == layout) for layout in SIGNED
    }
    theirs = "the same" if signs["both"] else signs["diffusers"] or "-"
    return f"| {family.name} | {_variants(family.variants) or '-'} | {signs['both'] or signs['comfyui']} | {theirs} |"


def _variants(variants: Iterable[Variant]) -> str:
    return "; ".join(dict.fromkeys(variant.name for variant in variants))


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


def _fused(family: KnownFamily) -> dict[str, str]:
    """By layout the tensors that hold several modules, each with these in row order; in blocks from the block on."""
    found: dict[str, dict[str, dict[int, str]]] = {}
    for spot in family.table.spots:
        for layout, (path, piece) in spot.stored.items():
            if piece is not None:
                found.setdefault(layout, {}).setdefault(_inside(path), {})[piece] = _inside(spot.path)
    return {
        layout: "; ".join(
            f"`{tensor}`: {_words(held[piece] for piece in sorted(held))}" for tensor, held in tensors.items()
        )
        for layout, tensors in found.items()
    }


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
