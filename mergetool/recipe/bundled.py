"""The option ``bundled``: keep, drop or merge the tensors beside the model in a file.

* ``encoders``: text encoders that the models have in common are merged as the model is, and LoRAs added to them; the rest of the anchor's is copied;
* ``keep``: everything of the anchor's is copied;
* ``drop``: left out, and named; flags that say how to sample the model (``v_pred``, ``ztsnr``) stay, as they are the model's;
* ``drop-ema``: ``encoders`` without EMA weights;
* ``merge``: VAE and EMA weights are merged too, and all of it is cast as the model is. Schedules and flags are copied.

People who merge all-in-one files expect text encoders in the merge: AUTOMATIC1111, supermerger (whose weight ``BASE`` they have) and sd-mecha do that. A VAE
they keep. What is copied is the same bit for bit, whatever dtype or container the model gets; GGUF blocks, which a safetensors file cannot hold, become
BF16. A merged text encoder keeps its dtype, a quantised one becomes BF16: programs that rename its tensors lose its scales. What the anchor's file has
nothing of, a text encoder or a VAE, comes from the first other model that has it.

They stay under their names, so an output of another layout has none of them, and one without a prefix only the flags.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod

from mergetool import arch
from mergetool.arch import Part, encoders
from mergetool.arch.bundled import BundledKind
from mergetool.checkpoint.dtypes import BF16, F32
from mergetool.recipe.steps import COPY, MERGED, Input, OutputTensor, Step, window_of

COPIED = "bundled, copied"
_COPIES = ("keep", "drop")
_MERGED_ON_WISH: tuple[BundledKind, ...] = ("text encoder", "VAE", "EMA", "other")
_UNCHANGED = ("copied", "not changed by a LoRA")
"""Reasons of parts that the expression leaves as they are."""


def as_parts(model: Input, mode: str) -> Input:
    """``model`` with those parts beside it that ``mode`` merges, and no others.

    Raises DataError where they are quantised in a way that is not read, and ``mode`` asks for them.
    """
    anatomy = model.anatomy
    if not model.is_lora and mode in _COPIES:
        return replace(model, anatomy=anatomy.alone())
    if not model.is_lora and mode == "merge":
        missing = [kind for kind in _MERGED_ON_WISH if kind != "text encoder" or not anatomy.beside]
        return replace(model, anatomy=encoders.with_parts(anatomy, model.checkpoint, model.name, missing))
    return model


def outputs(
    model: Input, mode: str, made: Mapping[str, list[OutputTensor]], *, same_names: bool, same_layout: bool
) -> tuple[list[OutputTensor], list[tuple[str, str]]]:
    """The anchor's bundled tensors in the output, and those left out, with reasons.

    ``made`` are those that the expression makes, by stored name; what of it is not changed is copied as it is stored. ``same_layout`` says whether the
    output has the model's layout, ``same_names`` whether a file of its names may bundle something.
    """
    kinds = arch.bundled(model.checkpoint.tensors)
    merged = {name: tensors for name, tensors in made.items() if mode == "merge" or _is_merged(tensors)}
    encodings = {
        part.encoding for part in model.anatomy.parts.values() if part.stored.tensor in merged and part.encoding
    }
    scales = {name for encoding in encodings for name in encoding.tensors}
    written: list[OutputTensor] = []
    left_out: list[tuple[str, str]] = []
    for name, part in model.anatomy.outside.items():
        kind = kinds.get(name, "other")
        kept = mode != "drop" and (mode, kind) != ("drop-ema", "EMA")
        if same_names and kept and name in merged:
            written += merged[name]
        elif same_names and kept and name in scales:
            left_out.append((name, "scale or marker of codes"))
        elif (kind == "flag" and same_layout) or (same_names and kept):
            written.append(_copy(0, model, part, _why(made.get(name, ()))))
        elif same_names:
            left_out.append((name, f"bundled {kind}: `bundled={mode}`"))
        else:
            left_out.append((name, f"bundled {kind}, and the model gets another layout or no prefix"))
    return written, left_out


def from_others(inputs: Sequence[Input], needed: Sequence[int], mode: str) -> list[OutputTensor]:
    """Copies of the text encoders and the VAE of which the anchor has nothing.

    They come from the first other model that has some.
    """
    there = {_what(name, kind) for name, kind in arch.bundled(inputs[0].checkpoint.tensors).items()}
    written: list[OutputTensor] = []
    for column in (column for column in needed if column and mode not in _COPIES):
        model = inputs[column]
        kinds = arch.bundled(model.checkpoint.tensors)
        found = {
            name: _what(name, kinds[name])
            for name in model.anatomy.outside
            if kinds.get(name) in ("text encoder", "VAE")
        }
        for name, what in found.items():
            if what not in there:
                written.append(_copy(column, model, model.anatomy.outside[name], f"bundled, copied from {model.name}"))
        there |= set(found.values())
    return written


def _what(name: str, kind: str) -> str:
    """What a bundled tensor belongs to: its encoder by name, or all of its kind."""
    return encoders.encoder_of(name) or kind


def _is_merged(tensors: Iterable[OutputTensor]) -> bool:
    """Whether the expression changes any of it, or takes it from another model than the anchor."""
    steps = [step for tensor in tensors for step in tensor.steps]
    return any(step.reason == MERGED or any(window.input for window in step.windows) for step in steps)


def _why(tensors: Iterable[OutputTensor]) -> str:
    """The reason why a tensor that could be merged is copied."""
    reasons = dict.fromkeys(step.reason for tensor in tensors for step in tensor.steps)
    return next((reason for reason in reasons if not reason.startswith(_UNCHANGED)), COPIED)


def _copy(column: int, model: Input, part: Part, reason: str) -> OutputTensor:
    window = window_of(column, model, part)
    if part.encoding is None:
        step = Step(part.name, 0, prod(part.shape), None, (window,), reason)
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
        used = _used(model, inputs, written.values())
        floats = (name for name, part in model.anatomy.outside.items() if part.dtype.blendable and name not in used)
        beside = Counter(kinds[model.name].get(name, "other") for name in floats)
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


def _used(model: Input, inputs: Sequence[Input], tensors: Iterable[OutputTensor]) -> set[str]:
    """The stored tensors of ``model`` that the output is made of, scales included."""
    windows = [window for tensor in tensors for step in tensor.steps for window in step.windows]
    mine = [window for window in windows if inputs[window.input] is model]
    return {name for window in mine for name in (window.tensor, *(window.encoding.tensors if window.encoding else ()))}
