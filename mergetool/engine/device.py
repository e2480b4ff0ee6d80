"""Choose the processor for the arithmetic, and its memory. It is the CPU, or CUDA GPUs through Triton."""

from __future__ import annotations

import importlib.util
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mergetool import packages
from mergetool.errors import DeviceError, UsageError

WORTH_STARTING = 1_000_000_000
"""Bytes to read from which ``auto`` starts a GPU: its driver and kernels take 2 to 4 seconds to come up."""


@dataclass(frozen=True, slots=True)
class Device:
    """Torch devices by ``names``, none for the CPU, and the ``memory`` to take of each.

    ``memory`` is in bytes, at most; 0 is four fifths of the free memory.
    """

    names: tuple[str, ...] = ()
    memory: int = 0

    @property
    def is_gpu(self) -> bool:
        return bool(self.names)


CPU = Device()


def choose(name: str, *, work: int, memory: int = 0, kernels: bool = True) -> Device:
    """The device that ``device`` names: ``cpu``, ``cuda`` (every GPU), ``cuda:1``, or ``auto``.

    ``auto`` takes GPUs when there are some, Triton can be imported (without ``kernels`` it need not) and ``work`` bytes are worth it, else the CPU; the
    output of a merge is the same. Raises UsageError for another word, and where a GPU is asked for that is not there.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name, re.ASCII):
        raise UsageError(f'`device` is "{name}", but has to be auto, cpu, cuda or cuda:NUMBER.')
    if name == "cpu" or (name == "auto" and (work < WORTH_STARTING or _torch_is_for_cpus())):
        return CPU
    try:
        missing = _obstacle(name, kernels)
    except Exception:  # as broken packages raise when they are imported
        if name == "auto":
            return CPU
        raise
    if missing is None:
        return Device(_gpus(name), memory)
    if name == "auto":
        return CPU
    raise UsageError(
        f"`device={name}` needs {missing}; `device=cpu` {'gives the same bytes' if kernels else 'does without'}."
    )


def torch_device(name: str) -> str:
    """The one device on which torch itself computes: a GPU where there is one. Raises what `choose` raises."""
    return next(iter(choose(name, work=WORTH_STARTING, kernels=False).names), "cpu")


def _obstacle(name: str, kernels: bool) -> str | None:
    import torch

    if not torch.cuda.is_available():
        return "a CUDA GPU, and a torch that is built for it" + (
            "" if torch.version.cuda else f" (this one, {torch.__version__}, is not)"
        )
    if kernels and importlib.util.find_spec("triton") is None:
        return f"Triton, which is missing ({packages.install(packages.named('triton'))})"
    if kernels and importlib.util.find_spec("mergetool_kernels") is None:
        return "the package mergetool_kernels, which is part of mergetool but missing here"
    wanted = name.partition(":")[2]
    if wanted and int(wanted) >= torch.cuda.device_count():
        return f"GPU {wanted}, but there are {torch.cuda.device_count()}, counted from 0"
    return None


def _torch_is_for_cpus() -> bool:
    """True where the installed torch is built without any GPU's libraries, told by its version file: importing it takes a second."""
    spec = importlib.util.find_spec("torch")
    with suppress(OSError):
        if spec is not None and spec.origin is not None:
            said = (Path(spec.origin).parent / "version.py").read_text()
            return all(re.search(rf"^{gpu}\b.*= None$", said, re.MULTILINE) for gpu in ("cuda", "hip"))
    return False


def _gpus(name: str) -> tuple[str, ...]:
    import torch

    return (name,) if ":" in name else tuple(f"cuda:{i}" for i in range(torch.cuda.device_count()))


def failure(name: str, error: Exception) -> DeviceError:
    """The sentence for a GPU that stopped working."""
    reason = str(error).partition("\n")[0]
    return DeviceError(f"the GPU {name} failed ({reason}); `device=cpu` gives the same bytes.")


def free_memory(name: str) -> int:
    """Bytes of a GPU that nobody holds."""
    import torch

    return torch.cuda.mem_get_info(name)[0]
