"""Nodes that write files: complete or not at all, in ComfyUI's folders, over nothing that exists unless asked."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mergetool.comfyui import host, links
from mergetool.comfyui.sources import CATEGORY
from mergetool.ops.rounding import MODES
from mergetool.options.merging import MergeOptions
from mergetool.options.multipliers import parse_setting
from mergetool.recipe.quoting import quote

if TYPE_CHECKING:
    from mergetool.lora.extract import Extraction
    from mergetool.lora.pairs import Pairing
    from mergetool.options.differences import DiffOptions
    from mergetool.options.multipliers import Setting
    from mergetool.recipe.plan import Plan

FIRST = "as the anchor"
PLAIN = "none"
DTYPES = ("bf16", "fp16", "fp32", "fp8_e4m3", "fp8_e5m2")
LAYOUTS = ("comfyui", "diffusers")
QUANTS = ("fp8-scaled", "int8", "nvfp4", "mxfp8")
LARGEST_SEED = 2**53 - 1  # JavaScript's numbers are exact up to here
OVERWRITE = ("BOOLEAN", {"default": False, "tooltip": "Replace an existing file of that name."})


class Save:
    """A merge, streamed into a checkpoint."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Merge and write a checkpoint, in one pass over the files. A file that was made of the same inputs in the same way is left as it is."
    RETURN_TYPES = (links.MODEL, "STRING", "STRING")
    RETURN_NAMES = ("model", "path", "report")
    FUNCTION = "save"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What to merge, where to and in which form."""
        protect = "Take the refiners bit for bit from the anchor. Turn it off for architectures that have none."
        groups = "GROUP=MULT, one a line, as in: layers=linear(0.2,1)"
        return {
            "required": {
                "model": (links.MODEL, {}),
                "name": ("STRING", {"default": "mergetool/merged.safetensors"}),
                "folder": ([host.MODELS, host.OUTPUT], {}),
                "protect_refiner": ("BOOLEAN", {"default": True, "tooltip": protect}),
                "dtype": ([FIRST, *DTYPES], {}),
                "quant": ([PLAIN, *QUANTS], {"tooltip": "Container of the large matrices."}),
                "layout": ([FIRST, *LAYOUTS], {}),
                "rounding": (list(MODES), {}),
                # Called seed, ComfyUI's page would draw a new one after every run.
                "rounding_seed": ("INT", {"default": 0, "min": 0, "max": LARGEST_SEED, "tooltip": "Of stochastic."}),
                "overwrite": OVERWRITE,
                "force": (
                    "BOOLEAN",
                    {"default": False, "tooltip": "Merge models that do not look as if they belong together."},
                ),
            },
            "optional": {"groups": ("STRING", {"default": "", "multiline": True, "tooltip": groups})},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, name: str | None, groups: str | None = None) -> Literal[True] | str:
        """True, or what is wrong with a name or a group, before anything runs; what is linked is None and not known yet."""
        return host.first_error(
            lambda: host.target(host.OUTPUT, "later" if name is None else name), lambda: _settings(groups or "")
        )

    @classmethod
    def IS_CHANGED(cls, name: str, folder: str, **_: Any) -> float | str:
        """Never the same while the file is not there, so that one that was deleted is made again."""
        return "there" if host.target(folder, name).exists() else float("nan")

    @host.computing
    def save(
        self,
        model: str,
        name: str,
        folder: str,
        protect_refiner: bool,
        dtype: str,
        quant: str,
        layout: str,
        rounding: Any,
        rounding_seed: int,
        overwrite: bool,
        force: bool,
        groups: str = "",
    ) -> dict[str, Any]:
        """Write the merge; its path as a model, as text, and what became of it. Raises MergetoolError."""
        from mergetool.checkpoint.outputs import Target
        from mergetool.engine import job
        from mergetool.making import state

        options = MergeOptions(
            protect=("refiner",) if protect_refiner else (),
            multipliers=_settings(groups),
            dtype=None if dtype == FIRST else dtype,
            layout=None if layout == FIRST else layout,
            quant=None if quant == PLAIN else quant,
            rounding=rounding,
            seed=rounding_seed if rounding == "stochastic" else 0,
        )
        path = host.target(folder, name)
        with job.open_merge(model, options) as plan:
            if state.of_merge(plan, Target(path, "file"), None) == state.CURRENT:
                report = f"{path} was already made of this"
            else:
                advice = _advice(plan, force)
                report = "\n".join([_write(plan, path, overwrite), *advice])
        return {"ui": {"text": [report]}, "result": (quote(str(path.absolute())), str(path), report)}


class ExtractLora:
    """The difference of two checkpoints as a LoRA."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "variant - base as a LoRA. Both are files: link a merge through Save first. "
        "A file that was made of the same inputs in the same way is left as it is."
    )
    RETURN_TYPES = ("STRING", "STRING")
    RETURN_NAMES = ("path", "report")
    FUNCTION = "extract"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Two models, and how much of their difference to keep."""
        share = "Share of every matrix's energy to keep."
        return {
            "required": {
                "base": (links.MODEL, {}),
                "variant": (links.MODEL, {}),
                "name": ("STRING", {"default": "mergetool/difference.safetensors"}),
                "folder": ([host.LORAS, host.OUTPUT], {}),
                "rank_thresh": ("FLOAT", {"default": 0.995, "min": 0.0, "max": 1.0, "step": 0.001, "tooltip": share}),
                "rank_max": ("INT", {"default": 64, "min": 1, "max": 4096}),
                "exclude": ("STRING", {"default": "refiner", "tooltip": "Groups or patterns, separated by spaces."}),
                "dtype": (["bf16", "fp16", "fp32"], {}),
                "overwrite": OVERWRITE,
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, name: str | None) -> Literal[True] | str:
        """True, or what is wrong with the name, before anything runs; None is a linked one, not known yet."""
        return host.first_error(lambda: host.target(host.OUTPUT, "later" if name is None else name))

    @host.computing
    def extract(
        self,
        base: str,
        variant: str,
        name: str,
        folder: str,
        rank_thresh: float,
        rank_max: int,
        exclude: str,
        dtype: Any,
        overwrite: bool,
    ) -> dict[str, Any]:
        """Write the LoRA; its path, and what it holds. Raises MergetoolError."""
        from mergetool.checkpoint.outputs import Target
        from mergetool.lora.extract import open_diff
        from mergetool.making import state
        from mergetool.options.differences import DiffOptions

        options = DiffOptions(rank_thresh=rank_thresh, rank_max=rank_max, exclude=exclude.split(), dtype=dtype)
        path = host.target(folder, name)
        models = links.one_model(base, "a LoRA's base"), links.one_model(variant, "the model that a LoRA is taken of")
        with open_diff(*models, options) as pairing:
            if state.of_diff(pairing, options, Target(path, "file")) == state.CURRENT:
                report = f"{path} was already made of this"
            else:
                report = _extract(pairing, options, path, overwrite)
        return {"ui": {"text": [report]}, "result": (str(path), report)}


def _settings(groups: str) -> tuple[Setting, ...]:
    return tuple(parse_setting(line) for line in groups.splitlines() if line.strip())


def _advice(plan: Plan, force: bool) -> list[str]:
    """What the models say about themselves. Raises LineageError where they do not belong together, unless with ``force``."""
    from mergetool.comparison import preflight

    checked = preflight.check(plan)
    if not force:
        checked.refuse()
    return [f"{finding.level}: {finding.text}" for finding in checked.findings]


def _write(plan: Plan, path: Path, overwrite: bool) -> str:
    from mergetool.checkpoint.outputs import Target
    from mergetool.engine import device as devices
    from mergetool.engine import job

    started, done = time.monotonic(), 0
    report, total = host.progress(), plan.bytes_read + plan.header.data_size

    def advance(count: int) -> None:
        nonlocal done
        done += count
        report(done, total)

    host.make_folder(path)
    device = devices.choose("auto", work=plan.bytes_read, memory=0)
    outcome = job.run_merge(plan, Target(path, "file"), overwrite=overwrite, device=device, progress=advance)
    movement = outcome.movements.total
    lines = [
        f"{path}: {plan.header.file_size / 1e9:.3g} GB, {time.monotonic() - started:.1f} s",
        str(plan.expression.graph),
        ", ".join(f"{len(names)} {reason}" for reason, names in plan.reasons().items()),
    ]
    if movement.moved:
        lines.append(f"rounding kept {100 * movement.projection:.1f} % of the change")
    return "\n".join([*lines, *(f"note: {warning}" for warning in plan.warnings)])


def _extract(pairing: Pairing, options: DiffOptions, path: Path, overwrite: bool) -> str:
    from mergetool.api.progress import counting
    from mergetool.engine import device as devices
    from mergetool.lora import on_device
    from mergetool.lora.extract import extract

    host.make_folder(path)
    started = time.monotonic()
    with counting("diff", pairing.bytes_to_read(options), host.progress()) as advance:
        device = on_device.of(devices.choose("auto", work=pairing.bytes_to_read(options), kernels=False))
        found = extract(pairing, path, options, overwrite=overwrite, device=device, progress=advance)
    return f"{path}: {len(found.layers)} matrices, energy {_kept(found):.4f}, {time.monotonic() - started:.1f} s"


def _kept(found: Extraction) -> float:
    """The share of the decomposed matrices' energy that is in the LoRA."""
    total = sum(layer.total for layer in found.layers)
    return sum(layer.energy * layer.total for layer in found.layers) / total if total else 1.0
