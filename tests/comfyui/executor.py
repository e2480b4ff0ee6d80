"""What ComfyUI does with a custom node folder and a workflow in API format, in small.

Written from ComfyUI's documented interface of V1 nodes and the behaviour of its execution: a folder is loaded by path under a name of its own;
inputs are converted and checked against INPUT_TYPES, links by type, and VALIDATE_INPUTS gets what it asks for, None for links; a node whose
inputs, and whose ancestors' inputs and IS_CHANGED, are those of its last run is not run again; nodes run in a thread that is not the main one,
under ``torch.inference_mode``; an error is a message and the exception's type. ``folder_paths``, ``comfy.utils`` and
``comfy.model_management`` are stand-ins.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

CONVERT = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}
Prompt = dict[str, dict[str, Any]]


class InterruptProcessingException(Exception):  # ComfyUI's name
    """The user pressed cancel."""


@dataclass
class Host:
    """The stand-ins for ComfyUI's modules over the folder ``root``; ``bars`` are what progress bars were told."""

    root: Path
    bars: list[list[tuple[int, int]]] = field(default_factory=list)
    interrupt_after: int | None = None
    checks: int = 0

    def folders(self, kind: str) -> list[str]:
        names = ["unet", "diffusion_models"] if kind == "diffusion_models" else [kind]
        return [str(self.root / "models" / name) for name in names]

    def modules(self) -> dict[str, ModuleType]:
        paths = ModuleType("folder_paths")
        paths.get_folder_paths = self.folders  # type: ignore[attr-defined]
        paths.get_filename_list = self.filenames  # type: ignore[attr-defined]
        paths.get_full_path = self.full_path  # type: ignore[attr-defined]
        paths.get_output_directory = lambda: str(self.root / "output")  # type: ignore[attr-defined]
        utils, management = ModuleType("comfy.utils"), ModuleType("comfy.model_management")
        bars = self.bars

        class ProgressBar:
            def __init__(self, total: int) -> None:
                self.seen: list[tuple[int, int]] = []
                bars.append(self.seen)

            def update_absolute(self, value: int, total: int | None = None, preview: object = None) -> None:
                self.seen.append((value, total or 0))

        utils.ProgressBar = ProgressBar  # type: ignore[attr-defined]
        management.throw_exception_if_processing_interrupted = self.check  # type: ignore[attr-defined]
        return {"folder_paths": paths, "comfy.utils": utils, "comfy.model_management": management}

    def filenames(self, kind: str) -> list[str]:
        found = {
            str(p.relative_to(place)) for place in self.folders(kind) for p in Path(place).rglob("*") if p.is_file()
        }
        return sorted(found)

    def full_path(self, kind: str, name: str) -> str | None:
        inside = os.path.relpath(os.path.join("/", name), "/")
        return next((str(p) for place in self.folders(kind) if (p := Path(place) / inside).is_file()), None)

    def check(self) -> None:
        self.checks += 1
        if self.interrupt_after is not None and self.checks > self.interrupt_after:
            raise InterruptProcessingException


def load(folder: Path) -> ModuleType:
    """A custom node, a folder or a file, as a module under a name made of its path."""
    name = str(folder).replace(".", "_x_") if folder.is_dir() else str(folder.with_suffix(""))
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py" if folder.is_dir() else folder)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Failure:
    """Why a run stopped at a node."""

    node: str
    kind: str
    message: str


@dataclass
class Executor:
    """Runs workflows; outputs of nodes are kept from run to run, as ComfyUI's cache keeps them."""

    nodes: dict[str, type]
    cache: dict[str, tuple[str, tuple[Any, ...]]] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)
    ui: dict[str, dict[str, list[Any]]] = field(default_factory=dict)

    def run(self, prompt: Prompt) -> dict[str, tuple[Any, ...]] | Failure:
        """The outputs of every node that an output node needs, or the first failure. AssertionError for a node that breaks the interface."""
        prompt = json.loads(json.dumps(prompt))
        wanted = [
            n for n, node in prompt.items() if getattr(self.nodes[node["class_type"]], "OUTPUT_NODE", False) is True
        ]
        assert wanted, "prompt_no_outputs"
        self.ran, self.ui = [], {}
        box: list[Any] = []
        thread = threading.Thread(target=lambda: box.append(self._guarded(prompt, wanted)))
        thread.start()
        thread.join()
        if isinstance(box[0], AssertionError):
            raise box[0]
        return box[0]

    def errors(self, prompt: Prompt) -> list[tuple[str, str, str]]:
        """Node, kind and detail of everything that validation refuses."""
        prompt = json.loads(json.dumps(prompt))
        return [error for node in prompt for error in self._validate(prompt, node)]

    def _guarded(self, prompt: Prompt, wanted: list[str]) -> Any:
        try:
            with torch.inference_mode():
                for node in prompt:
                    errors = self._validate(prompt, node)
                    if errors:
                        return Failure(*errors[0])
                return self._execute(prompt, wanted)
        except AssertionError as broken:
            return broken

    def _validate(self, prompt: Prompt, node: str) -> list[tuple[str, str, str]]:
        cls, inputs = self.nodes[prompt[node]["class_type"]], prompt[node]["inputs"]
        declared, errors = declared_inputs(cls), []
        validate = getattr(cls, "VALIDATE_INPUTS", None)
        asked = inspect.getfullargspec(validate).args if validate is not None else []
        for name, (kind, options, required) in declared.items():
            if name not in inputs:
                if required:
                    errors.append((node, "required_input_missing", name))
                continue
            value = inputs[name]
            if isinstance(value, list):
                received = self.nodes[prompt[value[0]]["class_type"]].RETURN_TYPES[value[1]]
                if received != kind:
                    errors.append((node, "return_type_mismatch", f"{name}: {received}, not {kind}"))
                continue
            try:
                value = inputs[name] = CONVERT.get(kind, lambda v: v)(value) if isinstance(kind, str) else value
            except (TypeError, ValueError):
                errors.append((node, "invalid_input_type", f"{name}: {value!r}"))
                continue
            if name in asked:
                continue
            if "min" in options and value < options["min"]:
                errors.append((node, "value_smaller_than_min", name))
            elif "max" in options and value > options["max"]:
                errors.append((node, "value_bigger_than_max", name))
            elif isinstance(kind, list) and value not in kind:
                errors.append((node, "value_not_in_list", f"{name}: {value!r} not in {kind}"))
        if not errors and validate is not None:
            constants = {name: None if isinstance(v, list) else v for name, v in inputs.items() if name in asked}
            answer = validate(**constants)
            if answer is not True:
                errors.append((node, "custom_validation_failed", str(answer)))
        return errors

    def _execute(self, prompt: Prompt, wanted: list[str]) -> dict[str, tuple[Any, ...]] | Failure:
        order: list[str] = []
        for node in wanted:
            self._visit(prompt, node, order)
        outputs: dict[str, tuple[Any, ...]] = {}
        for node in order:
            signature = self._signature(prompt, node)
            if node in self.cache and self.cache[node][0] == signature and "NaN" not in signature:
                outputs[node] = self.cache[node][1]
                continue
            cls = self.nodes[prompt[node]["class_type"]]
            declared = declared_inputs(cls)
            given = {n: outputs[v[0]][v[1]] if isinstance(v, list) else v
                     for n, v in prompt[node]["inputs"].items() if n in declared}  # fmt: skip
            made = self.objects.setdefault(node, cls())
            try:
                returned = getattr(made, cls.FUNCTION)(**given)
            except Exception as error:
                kind = f"{type(error).__module__}.{type(error).__qualname__}"
                return Failure(node, kind, str(error))
            self.ran.append(node)
            outputs[node] = self._result(node, cls, returned)
            self.cache[node] = signature, outputs[node]
        return outputs

    def _visit(self, prompt: Prompt, node: str, order: list[str]) -> None:
        for value in prompt[node]["inputs"].values():
            if isinstance(value, list):
                self._visit(prompt, value[0], order)
        if node not in order:
            order.append(node)

    def _signature(self, prompt: Prompt, node: str) -> str:
        order: list[str] = []
        self._visit(prompt, node, order)
        parts = []
        for one in order:
            cls, inputs = self.nodes[prompt[one]["class_type"]], prompt[one]["inputs"]
            changed: Any = False
            if hasattr(cls, "IS_CHANGED"):
                try:
                    changed = cls.IS_CHANGED(**{n: None if isinstance(v, list) else v for n, v in inputs.items()})
                except Exception:  # ComfyUI warns and runs the node again
                    changed = float("nan")
            parts.append([prompt[one]["class_type"], inputs, changed])
        return json.dumps(parts, sort_keys=True)

    def _result(self, node: str, cls: type, returned: Any) -> tuple[Any, ...]:
        if isinstance(returned, dict):
            assert set(returned) <= {"ui", "result"}, f"{cls.__name__} returned {sorted(returned)}"
            for key, values in returned.get("ui", {}).items():
                assert isinstance(values, list), f"ui[{key}] of {cls.__name__} is no list"
                json.dumps(values)
            self.ui[node] = returned.get("ui", {})
            returned = returned["result"]
        assert isinstance(returned, tuple), f"{cls.__name__} returned {type(returned).__name__}"
        assert len(returned) == len(cls.RETURN_TYPES), f"{cls.__name__} returned {len(returned)} values"  # type: ignore[attr-defined]
        return returned


def declared_inputs(cls: Any) -> dict[str, tuple[Any, dict[str, Any], bool]]:
    """Name -> type, options, and whether it is required, of a node's INPUT_TYPES."""
    types = cls.INPUT_TYPES()
    found = {}
    for category in ("required", "optional"):
        for name, declared in types.get(category, {}).items():
            found[name] = declared[0], (declared[1] if len(declared) > 1 else {}), category == "required"
    return found
