"""Choose the weights of an output to quantise, and those to copy as they are quantised.

With ``quant`` these become quantised: where the anchor's file is in a container that can be written, the weights that it has
quantised; else the matrices of attention and feed-forward with both sides of at least 64, outside the refiners. Everything else stays in high precision:
norms, biases, pad tokens, embedders, modulations, the final layer, and refiners, whose change alters a merge's pictures most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod

from mergetool.arch import Anatomy, Family, Part
from mergetool.checkpoint.dtypes import BY_CODE, F32
from mergetool.errors import UsageError
from mergetool.quant.quantiser import Quantiser
from mergetool.quant.spellings import in_comfyui, leaf_of
from mergetool.recipe.steps import COPY, Input, OutputTensor, Step, Window

SMALLEST_SIDE = 64
_IN_WORDS = {"ffn": "feed-forward", "double": "double blocks", "single": "single blocks", "refiner": "refiners"}


def policy(family: Family) -> str:
    """Say in words which weights of ``family`` are quantised."""
    groups = " and ".join(_IN_WORDS.get(group, group) for group in sorted(family.quantised))
    apart = f", {_IN_WORDS.get(family.kept, family.kept)} apart" if family.kept else ""
    return f"matrices of {groups} with sides of at least {SMALLEST_SIDE}{apart}"


def is_quantised(anatomy: Anatomy, quantiser: Quantiser) -> Callable[[Sequence[Part]], bool]:
    """Make a function that tells whether a tensor of given parts becomes quantised.

    Nothing beside the model does.

    Raises UsageError when none of the model's would.
    """
    follows = any(part.encoding is not None and part.encoding.quant for part in anatomy.own.values())
    if not anatomy.family.quantised:
        raise UsageError(
            f"no program reads the weights of a {anatomy.family.name} by scales; leave out `quant={quantiser.quant}`, or give a smaller `dtype`."
        )

    def chosen(parts: Sequence[Part]) -> bool:
        if not all(part.name.endswith(".weight") and len(part.shape) == 2 and part.dtype.blendable for part in parts):
            return False
        if any(part.name in anatomy.beside or part.name in anatomy.family.unquantised for part in parts):
            return False
        if follows:
            return any(part.encoding is not None for part in parts)
        family = anatomy.family
        groups = frozenset[str]().union(*(family.groups(part.name, part.shape) for part in parts))
        sides = [size for part in parts for size in part.shape]
        return bool(groups & family.quantised) and not groups & family.precise and min(sides) >= SMALLEST_SIDE

    if not any(chosen([part]) for part in anatomy.parts.values()):
        raise UsageError(
            f"`quant={quantiser.quant}` would quantise no tensor: it takes {policy(anatomy.family)}; leave `quant` out, or choose an FP8 dtype with `dtype`."
        )
    return chosen


def layout_of(anatomy: Anatomy, wanted: str | None) -> str | None:
    """The layout of a quantised output, None for the anchor's own. Raises UsageError for an impossible one."""
    needed = anatomy.family.quantised_layout
    if needed is None:
        return wanted
    if wanted not in (None, needed):
        raise UsageError(
            f"quantised files are written in the {needed} layout only; leave out `layout={wanted}`, or `quant`."
        )
    return needed if wanted or anatomy.layout != needed else None


def rounded_to(stored: str) -> str:
    """The end of a step's reason where a kept part is stored anew."""
    return f", rounded to {stored}"


def copied(
    name: str, parts: Sequence[Part], steps: Sequence[Step], inputs: Sequence[Input], quantiser: Quantiser
) -> list[OutputTensor] | None:
    """The stored tensors of an untouched weight under its output name, scales included.

    None where the weight has to be written anew.

    It is untouched when every part of it is kept, from one model, whose file has exactly these parts in one weight of the output's container.
    """
    columns = {step.windows[0].input for step in steps if step.base is None}
    if len(columns) != 1 or any(step.base is not None for step in steps):
        return None
    model = inputs[columns.pop()]
    kept = [model.anatomy.parts[part.name] for part in parts]
    encoding = kept[0].encoding
    if encoding is None or encoding.quant != quantiser.quant or any(part.encoding is not encoding for part in kept):
        return None
    if kept[0].stored.row != 0 or sum(part.stored.rows for part in kept) != encoding.rows:
        return None
    layer = name.removesuffix(".weight")
    reason = steps[0].reason.removesuffix(rounded_to(quantiser.quant))
    tensors = []
    plain = {scale for scale, dtype, _ in encoding.float_scales if dtype is not F32}
    for stored in encoding.tensors:
        leaf = leaf_of(stored)
        known = in_comfyui(leaf)
        if stored != encoding.tensor and known is None:
            continue  # of an input, in a spelling that ComfyUI does not read
        info = model.checkpoint.tensors[stored]
        window = Window(steps[0].windows[0].input, stored, 0, info.dtype)
        dtype, program = (F32, COPY) if stored in plain else (info.dtype, None)  # ComfyUI's kernels take float32 scales
        step = Step(parts[0].name, 0, prod(info.shape), program, (window,), reason)
        tensors.append(OutputTensor(f"{layer}.{known or leaf}", dtype, info.shape, (step,)))
    if not any(tensor.name == f"{layer}.comfy_quant" for tensor in tensors):
        marker = quantiser.marker(encoding.padded)
        tensors.append(OutputTensor(f"{layer}.comfy_quant", BY_CODE["U8"], (len(marker),), (), constant=marker))
    return tensors


def warnings(inputs: Sequence[Input], noise: Mapping[str, float]) -> Iterator[str]:
    """Name the inputs of narrow floats or codes, whose rounding is part of every difference.

    ``noise`` is its share by input, where known.
    """
    for model in (model for model in inputs if not model.is_lora):
        narrow = Counter(
            p.encoding.label if p.encoding else p.dtype.name
            for p in model.anatomy.own.values()
            if p.encoding or (p.dtype.blendable and p.dtype.bits == 8)
        )
        if narrow:
            share = noise.get(model.name)
            told = "its rounding" if share is None else f"its rounding noise, {100 * share:.2g} % of those weights,"
            yield f"{model.name} is {', '.join(narrow)}: {told} is part of every difference with it"


def what(anatomy: Anatomy, name: str, quantiser: Quantiser, chosen: Callable[[Sequence[Part]], bool]) -> str:
    """Say which weights of a model ``name`` become quantised."""
    parts = [part for part in anatomy.own.values() if chosen([part])]
    share = sum(part.numel for part in parts) / sum(part.numel for part in anatomy.own.values())
    follows = any(part.encoding is not None and part.encoding.quant for part in parts)
    which = f"the weights that {name} has quantised" if follows else policy(anatomy.family)
    return f"{quantiser.quant}: {which}, {100 * share:.1f} % of the parameters; the rest keeps its dtype"
