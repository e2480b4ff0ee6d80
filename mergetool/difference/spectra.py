"""The file of spectra and directions of a difference, which spares the next run its search.

A safetensors file with, for each matrix by its canonical name, ``NAME.values`` [j] float32 (singular values, falling) and
``NAME.rows`` [k, min(m, n)] bf16 (directions of the shorter side, strongest first); see ``directions.Directions``. Its metadata names
the two models by their content fingerprints: for any others it is refused.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergetool import __version__
from mergetool.adapters import output as lora_output
from mergetool.checkpoint.inputs import InputFile
from mergetool.checkpoint.names import quoted
from mergetool.checkpoint.outputs import lora_target
from mergetool.checkpoint.reader import Checkpoint
from mergetool.difference.directions import Directions
from mergetool.difference.pairs import Pairing
from mergetool.errors import DataError, MergetoolError, UsageError
from mergetool.ops.tensors import TORCH

FORMAT = 1


@dataclass
class SideFile:
    """Directions ``known`` by canonical name. With ``kept`` additions are written to ``path``."""

    path: Path | None = None
    known: dict[str, Directions] = field(default_factory=dict)
    added: set[str] = field(default_factory=set)
    inputs: Sequence[str] = ()
    seed: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def kept(self) -> bool:
        """True where the directions are to be written."""
        return self.path is not None

    def add(self, name: str, found: Directions) -> Directions:
        """Replace the known directions of ``name`` by ``found``, and return them."""
        with self._lock:
            self.known[name] = found
            self.added.add(name)
        return found

    @classmethod
    def open(cls, path: Path, pairing: Pairing, seed: int) -> SideFile:
        """The side file at ``path``, empty when there is none yet.

        Raises UsageError for one of other models or another seed, DataError for one that is damaged.
        """
        inputs = [model.checkpoint.fingerprint() for model in (pairing.base, pairing.variant)]
        if not path.exists():
            return cls(path, inputs=inputs, seed=seed)
        shapes = {pair.name: pair.shape for pair in pairing.pairs}
        with Checkpoint.open(path) as file:
            described = _described(file)
            if described["inputs"] != inputs:
                raise UsageError(
                    f'"{path}" holds the spectra of other models than {pairing.base.name} and {pairing.variant.name}, '
                    "or they have changed; name another file with `spectra`."
                )
            if described["seed"] != seed:
                raise UsageError(f'"{path}" was made with `seed={described["seed"]}`; use that, or another `spectra`.')
            known = {
                name: _directions(file, name, facts, shapes.get(name)) for name, facts in described["matrices"].items()
            }
        return cls(path, known, inputs=inputs, seed=seed)

    def save(self, files: Sequence[InputFile], threads: int = 1) -> None:
        """Write everything that is known to ``path``, if something was added. Raises what `output.write` raises."""
        if self.path is None or not self.added:
            return
        names = sorted(self.known)
        tensors = {f"{name}.values": self.known[name].values for name in names}
        tensors |= {f"{name}.rows": self.known[name].rows for name in names}
        described = {
            "format": FORMAT,
            "inputs": list(self.inputs),
            "seed": self.seed,
            "matrices": {n: {"total": self.known[n].total, "complete": self.known[n].complete} for n in names},
        }
        metadata = {"mergetool.version": __version__, "mergetool.spectra": json.dumps(described, sort_keys=True)}
        lora_output.write(lora_target(self.path), tensors, metadata, files, overwrite=True, threads=threads)


def _described(file: Checkpoint) -> dict[str, Any]:
    """The metadata of a side file, checked. Raises DataError."""
    try:
        found = json.loads(file.metadata["mergetool.spectra"])
        matrices = found["matrices"]
        sound = found["format"] == FORMAT and isinstance(found["seed"], int)
        sound = sound and all(
            isinstance(facts["complete"], bool) and isinstance(facts["total"], float) and 0 < facts["total"] < math.inf
            for facts in matrices.values()
        )
        described = {key: found[key] for key in ("inputs", "seed", "matrices")}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        sound, described = False, {}
    if not sound:
        raise DataError(
            f'"{file.source}" is no file of spectra that this version writes; name another one with `spectra`.'
        )
    return described


def _directions(file: Checkpoint, name: str, facts: Mapping[str, Any], shape: tuple[int, ...] | None) -> Directions:
    """One matrix of a side file. Raises DataError where its tensors cannot be what they are called."""
    try:
        values, rows = _tensor(file, f"{name}.values"), _tensor(file, f"{name}.rows")
        short = rows.shape[1]
        falling = bool(torch.isfinite(values).all()) and bool((values.diff() <= 0).all()) and bool((values >= 0).all())
        sound = (values.dtype, values.ndim, rows.dtype, rows.ndim) == (torch.float32, 1, torch.bfloat16, 2) and falling
        sound = sound and len(values) in (len(rows), short) and len(rows) <= short
        sound = sound and bool(torch.isfinite(rows).all()) and (shape is None or short == min(shape))
    except (KeyError, IndexError, MergetoolError):
        sound = False
    if not sound:
        raise DataError(f'"{file.source}": the spectrum of {quoted(name)} is damaged; delete the file and run again.')
    return Directions(rows, values, facts["total"], facts["complete"])


def _tensor(file: Checkpoint, name: str) -> Tensor:
    info = file.tensors[name]
    raw = bytearray(file.read(name))
    return torch.frombuffer(raw, dtype=TORCH[info.dtype]).reshape(info.shape) if raw else torch.empty(info.shape)
