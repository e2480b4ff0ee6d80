"""Every spelling that is read and every format that is written, loaded once by each release of diffusers and by ComfyUI.

A release takes about ten seconds to import, so that all files are loaded by one process of each; what it found lies in a folder that the
workers of pytest share.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from mergetool.adapters.convert import convert
from mergetool.adapters.formats import KEY_FORMATS, KeyFormat
from mergetool.adapters.in_diffusers import RELEASES
from mergetool.adapters.lora_file import open_lora
from mergetool.arch.families.z_image import REFERENCE_CONFIG, reference_shapes
from tests.adapters.files import DORAS, FILES
from tests.adapters.spellings import SPELLINGS, Written
from tests.families import TINY
from tests.oracles import ComfyUI, RefusedError
from tests.oracles.diffusers import Diffusers

COMFYUI = "ComfyUI 0.30"
FAULT = "fault: "
PROGRAMS = (*(f"diffusers {release}" for release in RELEASES), COMFYUI)
LAB = json.loads(Path("mergetool/lab/data/base/transformer/config.json").read_text())
CONFIGS: dict[str, dict[str, Any]] = {"tiny": {**REFERENCE_CONFIG, **TINY}, "lab": LAB}

Changes = dict[str, np.ndarray]
SOURCES: dict[str, tuple[tuple[int, ...], float | None, torch.dtype]] = {
    "one rank": ((4,), None, torch.float32),
    "one rank, alpha": ((4,), 2.0, torch.float32),
    "mixed ranks": ((4, 2, 8, 3), None, torch.float32),
    "mixed ranks, alpha": ((4, 2, 8, 3), 5.0, torch.float32),
    "mixed ranks, bf16": ((2, 4, 4, 16), None, torch.bfloat16),
}
"""Ranks by turns, the alpha of all modules and the dtype of a LoRA on every linear layer of the embedded family."""


@dataclass(frozen=True)
class Case:
    """A file and what it means: ``changes`` by part. ``source`` and ``key_format`` are of those that were written by mergetool."""

    name: str
    path: Path
    changes: Changes
    size: str = "tiny"
    source: str = ""
    key_format: KeyFormat | None = None

    @property
    def place(self) -> tuple[Path, str]:
        """The folder and the name of the file."""
        return (self.path, "adapter_model.safetensors") if self.path.is_dir() else (self.path.parent, self.path.name)


@dataclass(frozen=True)
class Found:
    """What a program made of a file: the change of each part, of diffusers only of those that got a layer; or its error."""

    changes: Changes = field(default_factory=dict)
    magnitudes: tuple[str, ...] = ()
    error: str | None = None


LIMITS = dict.fromkeys(PROGRAMS, 2.0**-6) | {COMFYUI: 2.0**-19}
"""Of a change's largest value: diffusers multiplies an alpha into bf16 factors, ComfyUI adds products of float32."""


def agrees(found: Changes, wanted: Changes, *, limit: float) -> set[str]:
    """The parts whose change is the wanted one, and is one, but for ``limit`` of its largest value."""
    return {
        part
        for part, change in wanted.items()
        if part in found and found[part].any() and np.abs(found[part] - change).max() <= limit * np.abs(change).max()
    }


class Matrix:
    """The cases, and what each program found, in the folder that the workers share."""

    def __init__(self, folder: Path, comfyui: ComfyUI) -> None:
        self._folder, self._comfyui = folder, comfyui
        folder.mkdir(exist_ok=True)

    @cached_property
    def cases(self) -> dict[str, Case]:
        """All files by name, written by the first who asks."""
        index = self._folder / "cases.json"
        with FileLock(self._folder / "cases.lock"):
            if not index.exists():
                index.write_text(json.dumps([self._kept(i, case) for i, case in enumerate(self._made())]))
        found = [
            Case(**{**one, "path": Path(one["path"]), "changes": load_file(one["changes"])})
            for one in json.loads(index.read_text())
        ]
        return {case.name: case for case in found}

    @property
    def zeros(self) -> Path:
        """A tiny model of zeros in ComfyUI's layout, to which it adds a LoRA's changes."""
        return self._model("tiny")

    def _model(self, size: str) -> Path:
        path = self._folder / f"{size}.model.safetensors"
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                shapes = reference_shapes(CONFIGS[size], "comfyui")
                save_torch({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
        return path

    def found(self, program: str) -> dict[str, Found]:
        """What ``program``, one of `PROGRAMS`, made of every case."""
        folder = self._folder / program.replace(" ", "-")
        cases = self.cases
        with FileLock(f"{folder}.lock"):
            if not (folder / "answers.json").exists():
                folder.mkdir(exist_ok=True)
                answers = self._comfyui_answers(folder) if program == COMFYUI else self._answers(program, folder)
                (folder / "answers.json").write_text(json.dumps(answers))
        answers = json.loads((folder / "answers.json").read_text())
        return {
            name: Found(error=answers[name]["error"])
            if "error" in answers[name]
            else Found(load_file(folder / f"{i}.safetensors"), tuple(answers[name].get("magnitudes", ())))
            for i, name in enumerate(cases)
        }

    def _answers(self, program: str, folder: Path) -> dict[str, Any]:
        release = program.removeprefix("diffusers ")
        with Diffusers(release) as diffusers:
            found = {}
            for i, case in enumerate(self.cases.values()):
                lora, name = case.place
                found[case.name] = answer(
                    partial(
                        diffusers.ask,
                        "load",
                        lora=lora,
                        name=name,
                        out=folder / f"{i}.safetensors",
                        pipeline="ZImagePipeline",
                        model="ZImageTransformer2DModel",
                        config=CONFIGS[case.size],
                    )
                )
                assert found[case.name].get("version", release).startswith(release)
        return found

    def _comfyui_answers(self, folder: Path) -> dict[str, Any]:
        """ComfyUI adds LoRAs to a model of zeros, whose fused tensors are taken apart."""
        found = {}
        for i, case in enumerate(self.cases.values()):
            out, lora = folder / f"{i}.safetensors", case.place[0] / case.place[1]
            model = self._model(case.size)
            found[case.name] = answer(partial(self._comfyui.ask, "patch", model=model, lora=lora, out=out))
            if "error" not in found[case.name]:
                save_file(dict(apart(load_file(out))), out)
        return found

    def _kept(self, i: int, case: Case) -> dict[str, Any]:
        changes = self._folder / f"{i}.changes.safetensors"
        save_file({part: np.ascontiguousarray(change) for part, change in case.changes.items()}, changes)
        return {**vars(case), "path": str(case.path), "changes": str(changes)}

    def _made(self) -> Iterator[Case]:
        for i, (name, make) in enumerate({**FILES, **DORAS}.items()):
            folder = self._folder / f"spelling-{i}"
            folder.mkdir()
            written = make()
            yield Case(name, written.save(folder), written.changes)
        yield from written_formats(self._folder)


def answer(ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return ask()
    except RefusedError as error:
        return {"error": str(error)}


def apart(native: Changes) -> Iterator[tuple[str, np.ndarray]]:
    """Parameters under ComfyUI's names as parts: q, k and v by themselves, diffusers' names."""
    tops = {"x_embedder.": "all_x_embedder.2-1.", "final_layer.": "all_final_layer.2-1."}
    for name, value in native.items():
        top = next((top for top in tops if name.startswith(top)), "")
        part = tops[top] + name.removeprefix(top) if top else name
        for ours, theirs in (
            (".attention.out.", ".attention.to_out.0."),
            (".q_norm.", ".norm_q."),
            (".k_norm.", ".norm_k."),
        ):
            part = part.replace(ours, theirs)
        if ".qkv." in part:
            for letter, rows in zip("qkv", np.split(value, 3), strict=True):
                yield part.replace("qkv", f"to_{letter}"), rows
        else:
            yield part, value


def linear_layers() -> dict[str, tuple[int, int]]:
    """Every linear layer of the embedded family with its shape."""
    shapes = reference_shapes(LAB, "diffusers")
    return {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if len(shape) == 2 and name.endswith(".weight")
    }  # type: ignore[misc]


def lora(ranks: tuple[int, ...], alpha: float | None, dtype: torch.dtype) -> Written:
    """A LoRA on all of them, in kohya's underscored names; its changes in float64 of the stored factors."""
    found = Written()
    for i, (module, (rows, columns)) in enumerate(linear_layers().items()):
        random, rank = np.random.default_rng(i), ranks[i % len(ranks)]
        down = torch.from_numpy(random.standard_normal((rank, columns)) / 4).to(dtype)
        up = torch.from_numpy(random.standard_normal((rows, rank)) / 4).to(dtype)
        name = f"lora_unet_{module.replace('.', '_')}"
        found.tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        found.tensors[f"{name}.alpha"] = torch.tensor(float(rank if alpha is None else alpha))
        scale = 1 if alpha is None else alpha / rank
        found.changes[f"{module}.weight"] = up.double().numpy() @ down.double().numpy() * scale
    return found


def written_formats(folder: Path) -> Iterator[Case]:
    """Every source in every format, every spelling in the default one, and files that are wrong on purpose."""
    for i, (source, options) in enumerate(SOURCES.items()):
        written = lora(*options)
        (folder / f"source-{i}").mkdir()
        with open_lora(written.save(folder / f"source-{i}")) as file:
            for key_format in KEY_FORMATS:
                target = folder / f"source-{i}" / f"{key_format}{'' if key_format == 'peft' else '.safetensors'}"
                convert(file, target, key_format)
                yield Case(f"{key_format}: {source}", target, written.changes, "lab", source, key_format)
        if source == "one rank":
            yield from faults(folder, folder / f"source-{i}" / "default.safetensors", written.changes)
    for i, (spelling, make) in enumerate(SPELLINGS.items()):
        if spelling != "ComfyUI differences":
            target, source = folder / f"default-{i}.safetensors", folder / f"to-default-{i}"
            source.mkdir()
            with open_lora(make().save(source)) as file:
                convert(file, target, "default")
            yield Case(f"default, from {spelling}", target, make().changes, source=spelling, key_format="default")


def faults(folder: Path, right: Path, changes: Changes) -> Iterator[Case]:
    """The file ``right`` with one thing wrong in it, each as the comparison must tell."""
    block = "diffusion_model.layers.0.attention"
    q, k, v = (f"{block}.to_{letter}.lora_" for letter in "qkv")

    def scaled(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{q}B.weight"] *= 1.001

    def swapped(tensors: dict[str, torch.Tensor]) -> None:
        for end in ("A.weight", "B.weight"):
            tensors[q + end], tensors[k + end], tensors[v + end] = tensors[v + end], tensors[q + end], tensors[k + end]

    def renamed(tensors: dict[str, torch.Tensor]) -> None:
        for end in ("A.weight", "B.weight"):
            tensors[f"diffusion_model.layers.0.attention.query.lora_{end}"] = tensors.pop(q + end)

    for name, fault in {"a wrong scale": scaled, "q, k and v swapped": swapped, "a renamed module": renamed}.items():
        tensors = load_torch(right)
        fault(tensors)
        path = folder / f"{name}.safetensors"
        save_torch(tensors, path)
        yield Case(f"{FAULT}{name}", path, changes, "lab")
