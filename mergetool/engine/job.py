"""One merge or several from beginning to end: open the models, plan, stage, run, commit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

from mergetool import __version__
from mergetool.arch import Anatomy
from mergetool.checkpoint import journal, shards
from mergetool.checkpoint.journal import RunDigest
from mergetool.checkpoint.outputs import Target, model_target
from mergetool.checkpoint.targets import require_folder, resolve_target
from mergetool.checkpoint.writer import CheckpointWriter
from mergetool.engine import merge
from mergetool.engine.bundles import bytes_read, passes
from mergetool.engine.device import CPU, Device
from mergetool.engine.feeding.values import Reader
from mergetool.engine.inputs import Inputs
from mergetool.engine.runs import Measure, NonFinite, Outcome
from mergetool.engine.threads import asked
from mergetool.errors import UsageError
from mergetool.options.kinds import sentence
from mergetool.options.merging import MergeOptions
from mergetool.packages import installed
from mergetool.quant import foreign
from mergetool.recipe.plan import Plan

# Anonymous memory of a process that has imported torch, which methods and LoRAs need, and opened three models, before it works.
BASE_MEMORY = 220_000_000


@contextmanager
def open_merge(
    text: str, options: MergeOptions | None = None, *, fingerprints: bool = True, skip_unmatched: bool = False
) -> Iterator[Plan]:
    """Plan the merge that ``text`` describes. Its inputs are closed at the end of the ``with`` block.

    A LoRA key without a tensor in the anchor is an error, or with ``skip_unmatched`` listed in the plan. Without ``fingerprints`` no tensor is
    read, which is enough for a dry run. Every failure that needs no tensor data happens here: ExpressionError, InputMissing, DataError and
    their kin.
    """
    items = [(text, options or MergeOptions())]
    with open_merges(items, fingerprints=fingerprints, skip_unmatched=skip_unmatched) as (plan,):
        yield plan


@contextmanager
def open_merges(
    items: Sequence[tuple[str, MergeOptions]], *, fingerprints: bool = True, skip_unmatched: bool = False
) -> Iterator[list[Plan]]:
    """Plan several merges for `run_merges`, one for each expression with its options, in order.

    A model that several of them name is opened, and its fingerprint taken, once, and is the same checkpoint in all plans. The rest is as
    for `open_merge`.
    """
    with ExitStack() as stack:
        opened = Inputs(stack, fingerprints=fingerprints, skip_unmatched=skip_unmatched)
        yield [opened.plan(text, options) for text, options in items]


def run_merge(
    plan: Plan,
    output: str | Path | Target,
    *,
    overwrite: bool = False,
    shard_size: int | None = None,
    threads: int | None = None,
    reader: Reader = "auto",
    non_finite: NonFinite = "refuse",
    device: Device = CPU,
    measure: Measure = "sample",
    compared: bool = False,
    resume: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> Outcome:
    """Run ``plan`` and publish its output: complete, or not at all.

    `outputs.model_target` decides between file and folder. A folder gets shards (of at most ``shard_size`` bytes), an index and, where one is
    known, a config.json. ``compared`` asks for the error of every tensor, on the CPU. Raises OutputError, BusyError, StorageError, DeviceError,
    NonFiniteError or DataError; ``output`` is then as before.

    With ``resume`` an interrupted run leaves its finished tensors beside ``output``. The next one finds that stage, if recipe, inputs and
    versions are the same, reads it again, checks its digests, and goes on. An exception then tells in a note how much is kept.
    """
    (outcome,) = run_merges(
        [plan],
        [output],
        overwrite=overwrite,
        shard_size=shard_size,
        threads=threads,
        reader=reader,
        non_finite=non_finite,
        device=device,
        measure=measure,
        compared=compared,
        resume=resume,
        progress=progress,
    )
    return outcome


def run_merges(
    plans: Sequence[Plan],
    outputs: Sequence[str | Path | Target],
    *,
    overwrite: bool = False,
    shard_size: int | None = None,
    threads: int | None = None,
    reader: Reader = "auto",
    non_finite: NonFinite = "refuse",
    device: Device = CPU,
    measure: Measure = "sample",
    compared: bool = False,
    resume: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Outcome]:
    """Run ``plans`` of one `open_merges` and publish all ``outputs``, each complete, or none.

    ``outputs[i]`` belongs to ``plans[i]``.

    Every output is the same, byte for byte, as `run_merge` of its plan alone makes it. When a plan fails none is published. Each is as
    for `run_merge`, and raises what that does, and UsageError for outputs of one path, or for several that are to be resumed.
    """
    asked(threads)
    for option, word, known in (
        ("reader", reader, Reader),
        ("non_finite", non_finite, NonFinite),
        ("measure", measure, Measure),
    ):
        if word not in get_args(known):
            raise sentence(option, word, f"one of {', '.join(get_args(known))}")
    targets = [
        model_target(output, layout=plan.options.layout, shard_size=shard_size, overwrite=overwrite)
        for plan, output in zip(plans, outputs, strict=True)
    ]
    _require_places([target.path for target in targets])
    if resume and len(plans) > 1:
        raise UsageError(
            "only a merge with one output can be resumed; leave out `resume`, or merge them one at a time."
        )
    files = list(dict.fromkeys(file for plan in plans for model in plan.inputs for file in model.checkpoint.files))
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                CheckpointWriter.stage(
                    target,
                    plan.header,
                    overwrite=overwrite,
                    shard_size=shard_size,
                    inputs=files,
                    extra_files=config_files(plan),
                    stem=stem_of(plan),
                    resume=_work(plan, non_finite) if resume else None,
                )
            )
            for plan, target in zip(plans, targets, strict=True)
        ]
        if resume:
            stack.push(partial(_say_what_is_kept, writers[0]))
        device = CPU if compared else device
        outcomes: dict[int, Outcome] = {}
        plans = [_remaining(plan, writer, progress) for plan, writer in zip(plans, writers, strict=True)]
        for together in passes(plans, device):
            items = [(plans[i], writers[i], str(targets[i].path) if len(plans) > 1 else "") for i in together]
            results = merge.run_together(
                items,
                threads=threads,
                reader=reader,
                non_finite=non_finite,
                device=device,
                measure=measure,
                compared=compared,
                progress=progress,
            )
            outcomes |= zip(together, results, strict=True)
        for i, writer in enumerate(writers):
            outcomes[i].resumed, outcomes[i].begun_anew = writer.resumed, writer.not_resumed
        for writer in writers:
            writer.prepare()
        for writer in writers:
            writer.commit()
    return [outcomes[i] for i in range(len(plans))]


def bytes_moved(plans: Sequence[Plan], device: Device = CPU) -> int:
    """Count the bytes that `run_merges` reads and writes, for a progress bar.

    Bytes that plans of a pass share count once.
    """
    read = sum(bytes_read([plans[i] for i in together]) for together in passes(plans, device))
    return read + sum(plan.header.data_size for plan in plans)


def _require_places(outputs: Sequence[Path]) -> None:
    """Raises OutputError where the folder of an output is missing, UsageError where two outputs are one."""
    places: dict[Path, Path] = {}
    for output in outputs:
        require_folder(output.parent)
        place = resolve_target(output)
        if place in places:
            raise UsageError(f'two outputs, "{places[place]}" and "{output}", are one file; give each its own name.')
        places[place] = output


def _work(plan: Plan, non_finite: NonFinite) -> RunDigest:
    """The things that decide a merge's bytes beyond its planned header, which holds the recipe and the inputs' fingerprints."""
    # Without the device number, which a restart can change.
    files = [file.identity[1:] for model in plan.inputs for file in model.checkpoint.files]
    return {
        "other inputs": journal.digest_of(json.dumps(files).encode()),
        "other versions": journal.digest_of(f"{__version__} {installed('torch')} {installed('numpy')}".encode()),
        "another `non_finite`": non_finite,
    }


def _remaining(plan: Plan, writer: CheckpointWriter, progress: Callable[[int], None]) -> Plan:
    """``plan`` without the tensors that an interrupted run had finished; ``progress`` counts their bytes."""
    if not writer.kept:
        return plan
    # Of a quantised weight all tensors are written together, or none.
    stored = {tensor.name: [name for name, _, _ in tensor.entries()] for tensor in plan.tensors}
    done = {tensor for tensor, names in stored.items() if writer.kept.issuperset(names)}
    kept = [name for tensor in done for name in stored[tensor]]
    writer.keep(kept)
    remaining = replace(plan, tensors=tuple(tensor for tensor in plan.tensors if tensor.name not in done))
    written = sum(plan.header.tensors[name].nbytes for name in kept)
    progress(plan.bytes_read - remaining.bytes_read + written)
    return remaining


def _say_what_is_kept(
    writer: CheckpointWriter, kind: type[BaseException] | None, error: BaseException | None, trace: object
) -> None:
    if error is not None:
        writer.discard()
        if writer.left:
            error.add_note(
                f"{writer.left:,} bytes of finished tensors are kept, and the same command goes on from them"
            )


def config_files(plan: Plan) -> Mapping[str, bytes]:
    """Find the config.json that a folder output needs. It is an input's own, else derived from the shapes.

    There is none where the tensors have ComfyUI's names: diffusers would take it for a promise, and load random weights in their place. An input's
    ``quantization_config`` does not go along: it would have diffusers look for the codes that the output no longer has.
    """
    anatomy, own = plan.anatomy, _shapes(plan.inputs[0].anatomy)
    others = {name: shape for name, shape in _shapes(anatomy).items() if own.get(name) != shape}
    if plan.layout == "comfyui" or plan.prefix:
        return {}
    for model in plan.inputs:
        named_alike = (model.anatomy.layout, model.anatomy.prefix) == (plan.layout, plan.prefix)
        if model.checkpoint.config is not None and named_alike and others.items() <= _shapes(model.anatomy).items():
            kept = {key: value for key, value in model.checkpoint.config.items() if key != foreign.CONFIG}
            return {"config.json": _json_file(kept)}
    derived = anatomy.family.config(anatomy)
    return {} if derived is None else {"config.json": _json_file(derived)}


def _shapes(anatomy: Anatomy) -> dict[str, tuple[int, ...]]:
    return {name: part.shape for name, part in anatomy.parts.items()}


def stem_of(plan: Plan) -> str:
    """The stem of a folder output's file names.

    It is the anchor's, where the folder is one of a library that looks for that name.

    transformers looks for ``model.safetensors``, diffusers for ``diffusion_pytorch_model.safetensors``.
    """
    if plan.layout in ("comfyui", "diffusers"):
        return shards.STEM
    return shards.stem_of(plan.inputs[0].checkpoint.files[0].path.name)


def _json_file(value: Mapping[str, object]) -> bytes:
    return (json.dumps(dict(value), indent=2, sort_keys=True) + "\n").encode()
