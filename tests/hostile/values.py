"""Rows 18 and 19: NaN and infinity in any input of any method are refused by name, and what is no float is never blended."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from mergetool.checkpoint import dtypes
from mergetool.checkpoint.reader import Checkpoint
from mergetool.engine import job
from mergetool.errors import MergetoolError, NonFiniteError
from mergetool.methods import Method, methods
from mergetool.options.merging import MergeOptions
from tests.hostile.models import LAYERS, tensors
from tests.hostile.tally import Tally

MODELS = "abcd"
VALUES = (math.nan, math.inf, -math.inf)
PLACES = ((0, 0), (13, 29), (63, 95))
PLANTED = LAYERS[1]
EXPRESSIONS = {
    "sum": "'a.safetensors' + 20 * ('b.safetensors' - 'c.safetensors')",
    "convert": "'a.safetensors'",
    "average": "0.5 * 'a.safetensors' + 0.5 * 'b.safetensors'",
}
OPTIONS = {
    "fp16": MergeOptions(dtype=dtypes.F16),
    "fp8, stochastic": MergeOptions(dtype=dtypes.F8_E4M3, rounding="stochastic", seed=1),
    "error feedback": MergeOptions(rounding="error-feedback"),
    "int8": MergeOptions(quant="int8"),
    "fp8-scaled": MergeOptions(quant="fp8-scaled", scale_search=True),
    "nvfp4": MergeOptions(quant="nvfp4"),
}
NOT_BLENDED = {
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "<i1",
    "U8": "<u1",
    "U16": "<u2",
    "U32": "<u4",
    "U64": "<u8",
    "BOOL": "<u1",
}


def call(method: Method) -> str:
    """A merge by a method of files ``a`` to ``d``."""
    most = 3 if method.most is None else method.most
    files = [f"'{name}.safetensors'" for name in MODELS]
    if method.takes == "deltas":
        return f"'a.safetensors' + {method.name}({', '.join(f'{one} - {files[0]}' for one in files[1 : 1 + most])})"
    return f"{method.name}({', '.join(files[:most])})"


def runs() -> Iterator[tuple[str, str, MergeOptions]]:
    """Every method, and every expression and kind of output without one."""
    for name, method in methods().items():
        yield name, call(method), MergeOptions()
    for name, text in EXPRESSIONS.items():
        yield name, text, MergeOptions()
    for name, options in OPTIONS.items():
        yield name, EXPRESSIONS["sum"], options


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def merge(text: str, options: MergeOptions) -> None:
    """Do it; raises what planning and running raise."""
    with job.open_merge(text, options) as plan:
        job.run_merge(plan, Path("out.safetensors"), overwrite=True, threads=1)


def plant(folder: Path, most: int | None = None) -> Tally:
    """NaN and both infinities in each input of each run (or of the first ``most``), at the first, a middle or the last element."""
    tally = Tally("18", "NaN and infinity planted in an input of every method and kind of output")
    with working_in(folder):
        for seed, name in enumerate(MODELS):
            save_file(tensors(seed, large=False), f"{name}.safetensors")
        for what, text, options in list(runs())[:most]:
            merge(text, options)
            for number, (model, value) in enumerate((m, v) for m in MODELS if f"'{m}." in text for v in VALUES):
                planted = tensors(MODELS.index(model), large=False)
                good = Path(f"{model}.safetensors").read_bytes()
                planted[PLANTED][PLACES[number % len(PLACES)]] = value
                save_file(planted, f"{model}.safetensors")
                before = Path("out.safetensors").read_bytes()
                tally.injected += 1
                fault = _silence(text, options)
                if fault is None and Path("out.safetensors").read_bytes() != before:
                    fault = "changed the output"
                tally.judge(None if fault is None else f"{value} in {model} of {what}: {fault}")
                Path(f"{model}.safetensors").write_bytes(good)
    return tally


def _silence(text: str, options: MergeOptions) -> str | None:
    """What is wrong with how planted values are told of."""
    try:
        merge(text, options)
    except NonFiniteError as error:
        return None if PLANTED in str(error) else f"names no tensor: {error}"
    except MergetoolError as error:
        return f"is told as {error}"
    return "passes in silence"


def mixed(path: Path, seed: int) -> None:
    """A model that also holds a tensor of every dtype that is not blended, other values for every seed."""
    dice = np.random.default_rng(seed)
    table, data = {}, b""
    for name, tensor in tensors(seed, large=False).items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        table[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    for code, kind in NOT_BLENDED.items():
        raw = dice.integers(0, 2 if code == "BOOL" else 100, 16).astype(kind).tobytes()
        table[f"ids.{code}"] = {"dtype": code, "shape": [16], "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def blend(folder: Path, only: Collection[str] = ()) -> Tally:
    """Every dtype that is no float through every run (or those in ``only``): the anchor's bytes, and a reason in the plan that says so."""
    tally = Tally("19", "integers and booleans through every method and kind of output")
    with working_in(folder):
        for seed, name in enumerate(MODELS):
            mixed(Path(f"{name}.safetensors"), seed)
        first = _integers("a.safetensors")
        for what, text, options in (run for run in runs() if not only or run[0] in only):
            options = replace(options, keep_from="a.safetensors")
            with job.open_merge(text, options) as plan:
                merged = set(plan.reasons().get("merged", ()))
                kept = {name for names in plan.reasons().values() for name in names} - merged
            merge(text, options)
            found = _integers("out.safetensors")
            for name, raw in first.items():
                tally.injected += 1
                fault = None if found.get(name) == raw else "is not the anchor's"
                fault = fault or (None if name in kept else "is not named as kept")
                tally.judge(None if fault is None else f"{name} by {what} {fault}")
    return tally


def _integers(path: str) -> dict[str, bytes]:
    with Checkpoint.open(path) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors if name.startswith("ids.")}
