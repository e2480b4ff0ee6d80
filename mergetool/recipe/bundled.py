"""The option ``bundled``: keep, drop or merge the tensors beside the model in a file.

* ``keep``: those of the anchor are copied bit for bit, whatever dtype or container the model gets; GGUF blocks, which a safetensors file cannot hold,
  become BF16;
* ``drop``: left out, and named; flags that say how to sample the model (``v_pred``, ``ztsnr``) stay, as they are the model's;
* ``drop-ema``: EMA weights are left out and the rest is kept;
* ``merge``: VAE, text encoders and EMA weights are merged and cast as the model is, but never quantised: programs that rename a text encoder's
  tensors lose its scales. Schedules and flags are copied.

They stay under their names, so an output of another layout has none of them, and one without a prefix only the flags.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from math import prod

from mergetool import arch
from mergetool.arch import Part
from mergetool.checkpoint.dtypes import BF16, F32
from mergetool.checkpoint.header import TensorInfo
from mergetool.quant import weights
from mergetool.quant.encoding import Encoding
from mergetool.recipe.steps import COPY, MERGED, Input, OutputTensor, Step, window_of

COPIED = "bundled, copied"


def as_parts(model: Input) -> Input:
    """Make the bundled tensors of a model parts of it, under their stored names.

    Quantised ones count as what their codes mean. Raises DataError where they are quantised in a way that is not read.
    """
    kinds = arch.bundled(model.checkpoint.tensors)
    outside = {n: part for n, part in model.anatomy.outside.items() if kinds.get(n) not in ("flag", "schedule")}
    if model.is_lora or not outside:
        return model
    mine = [name for name in model.checkpoint.tensors if name not in outside]
    encodings = weights.quantised(model.checkpoint, model.name, mine).encodings
    sides = weights.side_tensors(outside, encodings)
    parts = {name: _read(part, encodings.get(name)) for name, part in outside.items() if name not in sides}
    anatomy = replace(
        model.anatomy,
        parts={**model.anatomy.parts, **parts},
        outside={name: part for name, part in model.anatomy.outside.items() if name not in outside},
        sides=(*model.anatomy.sides, *(name for name in outside if name in sides)),
    )
    return replace(model, anatomy=anatomy)


def _read(part: Part, encoding: Encoding | None) -> Part:
    if encoding is None:
        return part
    return Part.whole(part.name, TensorInfo(F32, encoding.shape, 0, 0), encoding)


def outputs(
    model: Input, mode: str, *, same_names: bool, same_layout: bool
) -> tuple[list[OutputTensor], list[tuple[str, str]]]:
    """The anchor's bundled tensors in the output, and those left out, with reasons.

    ``same_layout`` says whether the output has the model's layout, ``same_names`` whether a file of its names may bundle something.
    """
    kinds = arch.bundled(model.checkpoint.tensors)
    written: list[OutputTensor] = []
    left_out: list[tuple[str, str]] = []
    for name, part in model.anatomy.outside.items():
        kind = kinds.get(name, "other")
        if (kind == "flag" and same_layout) or (same_names and mode != "drop" and (mode, kind) != ("drop-ema", "EMA")):
            written.append(_copy(model, part))
        elif same_names:
            left_out.append((name, f"bundled {kind}: `bundled={mode}`"))
        else:
            left_out.append((name, f"bundled {kind}, and the model gets another layout or no prefix"))
    return written, left_out


def _copy(model: Input, part: Part) -> OutputTensor:
    window = window_of(0, model, part)
    if part.encoding is None:
        step = Step(part.name, 0, prod(part.shape), None, (window,), COPIED)
        return OutputTensor(part.name, part.dtype, part.shape, (step,))
    step = Step(part.name, 0, prod(part.shape), COPY, (window,), f"bundled, decoded to {BF16.name}")
    return OutputTensor(part.name, BF16, part.shape, (step,))


def markers(model: Input, prefix: str, names: Collection[str]) -> list[OutputTensor]:
    """Make the empty tensors that stand for entries of the config.json beside ``model``.

    Those among ``names`` are there already.
    """
    wanted = (f"{prefix}{name}" for name in model.anatomy.family.markers(model.checkpoint.config or {}))
    return [OutputTensor(name, F32, (0,), (), constant=b"") for name in wanted if name not in names]


def warnings(inputs: Sequence[Input], tensors: Iterable[OutputTensor], mode: str) -> list[str]:
    """Warn of bundled tensors that mislead.

    Those are EMA weights that are another model's, flags that disagree, and parts that are not used.
    """
    first, models = inputs[0], [model for model in inputs if not model.is_lora]
    written = {tensor.name: tensor for tensor in tensors}
    kinds = {model.name: arch.bundled(model.checkpoint.tensors) for model in models}
    sentences = []
    merged = any(step.reason == MERGED for tensor in written.values() for step in tensor.steps)
    stale = [name for name, kind in kinds[first.name].items() if kind == "EMA" and name in written]
    if merged and stale and all(step.reason == COPIED for name in stale for step in written[name].steps):
        sentences.append(
            f"{len(stale)} EMA weights are copied from {first.name} and are not those of the merged model: a program that loads EMA weights "
            f"would draw {first.name}; `bundled=drop-ema` leaves them out"
        )
    lost = [name for name, kind in kinds[first.name].items() if kind == "flag" and name not in written]
    if lost:
        sentences.append(
            f"the output lacks {first.name}'s {', '.join(lost)}, which says how to sample it: set that in the program"
        )
    for model in models[1:]:
        flags = [{name for name, kind in kinds[m.name].items() if kind == "flag"} for m in (first, model)]
        for name in sorted(flags[0] ^ flags[1]):
            has, lacks = (first, model) if name in flags[0] else (model, first)
            sentences.append(
                f"{has.name} has the flag {name!r}, which says how to sample it, and {lacks.name} has not: the output is sampled "
                f"as {first.name} is"
            )
        beside = Counter(kinds[model.name].get(name, "other") for name in model.anatomy.outside)
        unused = {kind: count for kind, count in sorted(beside.items()) if kind not in ("flag", "schedule")}
        if unused and mode != "drop":
            which = ", ".join(f"{count} {kind}" for kind, count in unused.items())
            way_out = (
                "`bundled=merge` merges it" if first.anatomy.outside else f"{first.name}'s file has the model alone"
            )
            sentences.append(
                f"what {model.name} bundles with its model ({which} tensors) is not in the output; {way_out}"
            )
    return sentences
