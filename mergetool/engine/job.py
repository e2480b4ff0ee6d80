"""A merge from beginning to end: open the models, plan, stage, run, commit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mergetool import models
from mergetool.adapters.reading import open_lora
from mergetool.adapters.rows import anatomy_of
from mergetool.checkpoint import dtypes
from mergetool.checkpoint.dtypes import DType
from mergetool.checkpoint.names import quoted
from mergetool.checkpoint.writer import CheckpointWriter
from mergetool.engine import merge, noise
from mergetool.engine.device import CPU, Device
from mergetool.engine.reading import Method
from mergetool.engine.worker import Measure, NonFinite, Outcome
from mergetool.errors import DataError, OutputError
from mergetool.recipe.expression import parse
from mergetool.recipe.options import Options
from mergetool.recipe.plan import Plan, plan_merge
from mergetool.recipe.steps import Input

# Anonymous memory of a process that has imported torch and opened three models, before it works.
BASE_MEMORY = 220_000_000


def output_dtype(name: str | None) -> DType | None:
    """The dtype that ``--dtype`` names, None for the first model's; raises UsageError."""
    return None if name is None else dtypes.output_dtype(name)


@contextmanager
def open_merge(
    text: str, options: Options | None = None, *, fingerprints: bool = True, skip_unmatched: bool = False
) -> Iterator[Plan]:
    """The plan of the merge that ``text`` describes; its inputs are closed at the end of the ``with`` block.

    What a LoRA has for no tensor of the first model is an error, or with ``skip_unmatched`` named in the plan. Without ``fingerprints`` no tensor is read, which is enough for a dry run. Raises ExpressionError, InputMissing,
    DataError and their kin: every failure that needs no tensor data happens here.
    """
    options = options or Options()
    expression = parse(text, known=[entry.name for entry in models.listing()])
    names = list(expression.models)
    if options.keep_from and options.keep_from not in names:
        names.append(options.keep_from)
    with ExitStack() as stack:
        inputs = []
        for name in names:
            opened = models.open_model(name)
            stack.enter_context(opened.checkpoint)
            inputs.append(Input(name, opened.checkpoint, opened.anatomy))
        inputs += [open_change(name, inputs[0], stack, skip_unmatched=skip_unmatched) for name in expression.loras]
        prints = {model.name: model.checkpoint.fingerprint() for model in inputs} if fingerprints else None
        found = {model.name: noise.measure(model) for model in inputs if not model.is_lora} if fingerprints else {}
        shares = {name: share for name, share in found.items() if share is not None}
        yield plan_merge(expression, inputs, options, fingerprints=prints, noise=shares)


def open_change(name: str, model: Input, stack: ExitStack, *, place: str | None = None, skip_unmatched: bool) -> Input:
    """A LoRA as what it adds to ``model``, from ``place`` if that is not its name; ``stack`` closes it.

    Raises InputMissing, DataError for a file that is no LoRA or does not fit, and for what matches nothing in the model unless
    it is to be skipped.
    """
    file = stack.enter_context(open_lora(models.resolve(place or name).path, name=name, anatomy=model.anatomy))
    if file.unmatched and not skip_unmatched:
        key, reason = file.unmatched[0]
        raise DataError(
            f'"{name}": {quoted(key)} changes nothing in {model.name} ({reason}; {len(file.unmatched)} such keys in all); '
            "it may be for another model: --skip-unmatched leaves them out."
        )
    return Input(
        name, file.checkpoint, anatomy_of(file, model.anatomy, model.checkpoint), is_lora=True, unmatched=file.unmatched
    )


def run_merge(
    plan: Plan,
    output: Path,
    *,
    overwrite: bool = False,
    shard_size: int | None = None,
    threads: int | None = None,
    method: Method = "auto",
    non_finite: NonFinite = "refuse",
    device: Device = CPU,
    measure: Measure = "sample",
    compared: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> Outcome:
    """Run ``plan`` and publish its output: complete, or not at all.

    ``output`` is a ``.safetensors`` file, or a folder, which gets shards (of at most ``shard_size`` bytes), an index
    and, where one is known, a config.json. ``compared`` asks for the error of every tensor, on the CPU. Raises OutputError,
    BusyError, StorageError, DeviceError, NonFiniteError or DataError; ``output`` is then what it was before.
    """
    if not output.parent.exists():
        raise OutputError(f'the folder "{output.parent}" does not exist; make it first.')
    files = [file for model in plan.inputs for file in model.checkpoint.files]
    with CheckpointWriter.stage(
        output,
        plan.header,
        overwrite=overwrite,
        shard_size=shard_size,
        inputs=files,
        extra_files=_config_files(plan),
    ) as writer:
        outcome = merge.run(
            plan,
            writer,
            threads=threads,
            method=method,
            non_finite=non_finite,
            device=device,
            measure=measure,
            compared=compared,
            progress=progress,
        )
        writer.commit()
    return outcome


def _config_files(plan: Plan) -> Mapping[str, bytes]:
    """The config.json that a folder output needs to be loaded: an input's own, else one derived from the shapes."""
    anatomy = plan.inputs[0].anatomy
    for model in plan.inputs:
        if model.checkpoint.config is not None:
            return {"config.json": _json_file(model.checkpoint.config)}
    derived = anatomy.family.config(anatomy)
    return {} if derived is None else {"config.json": _json_file(derived)}


def _json_file(value: Mapping[str, object]) -> bytes:
    return (json.dumps(dict(value), indent=2, sort_keys=True) + "\n").encode()
