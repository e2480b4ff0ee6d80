"""The installation, looked at by `mergetool doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergetool.api.events import Events, Request

if TYPE_CHECKING:
    from mergetool.installation.diagnosis import Diagnosis


@dataclass(frozen=True)
class Doctor(Request):
    """A look at the installation."""


def run_doctor(asked: Doctor, events: Events) -> Sequence[Diagnosis]:
    """Look at Python, packages, kernels, GPUs, ComfyUI and disks; nothing is written.

    Packages are imported in processes of their own, with a time limit. Raises nothing for what it finds: each is a line.
    """
    from mergetool.installation import comfyui_folders, disks, gpus, interpreter, libraries, probes, processor

    # torch in a process of its own: it takes longest, and may take the others down.
    with ThreadPoolExecutor(2) as pool:
        torch_of = pool.submit(probes.imported, ["torch"])
        tried = probes.imported(libraries.TRIED)
        torch = torch_of.result()
    return [
        interpreter.python(),
        interpreter.system(),
        interpreter.mergetool(),
        *libraries.diagnose({**tried, **torch}),
        processor.kernels(),
        *gpus.diagnose(torch.get("torch", {})),
        processor.cores(),
        processor.memory(),
        *disks.diagnose(),
        disks.names_file(),
        *comfyui_folders.diagnose(),
    ]
