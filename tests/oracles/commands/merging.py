"""Models merged and saved by ComfyUI's own nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.lora
import comfy_extras.nodes_lora_extract as extraction
import comfy_extras.nodes_model_merging as nodes
import folder_paths
from safetensors.torch import load_file, save_file

from tests.oracles.commands.models import loaded


def merge(out: str, operations: list[list[Any]]) -> dict[str, Any]:
    """Runs nodes one after the other and the node ModelSave on the last result; writes the file ``out``.

    An operation is ``[NODE, model, model, *numbers]``; a model is a path or the number of an earlier operation.
    """
    results: list[Any] = []
    for name, one, other, *numbers in operations:
        node = nodes.NODE_CLASS_MAPPINGS[name]()
        (result,) = getattr(node, node.FUNCTION)(_model(one, results), _model(other, results), *numbers)
        results.append(result)
    _moved_to(out, lambda: _save(results[-1], Path(out).parent))
    return {}


def save(model: str, out: str) -> dict[str, Any]:
    """The node ModelSave on a loaded file."""
    _moved_to(out, lambda: _save(loaded(model).patcher, Path(out).parent))
    return {}


def extract(model: str, base: str, out: str, rank: int, kind: str, bias: bool) -> dict[str, Any]:
    """The node LoraSave on ModelMergeSubtract(model, base, 1); ``kind`` is "standard" or "full_diff"."""
    (difference,) = nodes.ModelSubtract().merge(loaded(model).patcher, loaded(base).patcher, 1.0)

    def run() -> None:
        folder_paths.set_output_directory(str(Path(out).parent))
        extraction.LoraSave.execute("written", rank, kind, bias, model_diff=difference)

    _moved_to(out, run)
    return {}


def padded_difference(tensors: str, strength: float, out: str) -> dict[str, Any]:
    """A ``difference`` added to a smaller ``weight`` by ComfyUI's patching, told to pad it."""
    given = load_file(tensors)
    patch = (strength, ("diff", (given["difference"], {"pad_weight": True})), 1.0, None, None)
    save_file({"weight": comfy.lora.calculate_weight([patch], given["weight"], "weight")}, out)
    return {}


def _model(source: Any, results: list[Any]) -> Any:
    return results[source] if isinstance(source, int) else loaded(source).patcher


def _save(patcher: Any, folder: Path) -> None:
    node = nodes.ModelSave()
    node.output_dir = str(folder)
    node.save(patcher, "written")


def _moved_to(out: str, run: Any) -> None:
    """ComfyUI numbers its outputs: the only one of the name ``written`` becomes ``out``."""
    run()
    (made,) = Path(out).parent.glob("written_*.safetensors")
    made.rename(out)


COMMANDS = {"merge": merge, "padded_difference": padded_difference, "save": save, "extract": extract}
