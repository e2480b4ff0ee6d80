"""The GPUs that torch and Triton can use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergetool import packages
from mergetool.installation.diagnosis import Diagnosis

_SAME = "merges run on the CPU, and give the same bytes"


def diagnose(torch: Mapping[str, Any]) -> list[Diagnosis]:
    """Make a line for each GPU, or one that says why there is none.

    ``torch`` is its entry in the result of `probes.imported`, {} where it is missing.
    """
    if not torch or torch.get("error"):
        return [
            Diagnosis("gpu", "note", f"not looked for, since torch cannot be imported; {_SAME}", facts={"devices": []})
        ]
    found = torch["gpus"]
    facts = {name: found[name] for name in ("cuda", "hip")}
    if not found["devices"]:
        return [_none(found, {**facts, "devices": []})]
    lines = []
    for place, device in enumerate(found["devices"]):
        text = f"cuda:{place} {device['name']}, {device['free'] / 1e9:.1f} of {device['total'] / 1e9:.1f} GB free"
        lines.append(Diagnosis("gpu", "ok", text, facts={**facts, **device}))
    if packages.installed("triton") is None:
        triton = packages.named("triton")
        lines.append(Diagnosis("gpu", "note", f"Triton is missing: {_SAME}", packages.install(triton)))
    return lines


def _none(found: Mapping[str, Any], facts: Mapping[str, Any]) -> Diagnosis:
    if not (found["cuda"] or found["hip"]):
        if has_driver():
            said = f"this machine has an NVIDIA driver, and this torch is built for CPUs; {_SAME}"
            return Diagnosis("gpu", "note", said, "install a torch for CUDA, as pytorch.org/get-started says", facts)
        return Diagnosis("gpu", "note", f"none: this torch is built for CPUs; {_SAME}", facts=facts)
    why = found["why"] or "torch sees no device"
    if has_driver():
        return Diagnosis(
            "gpu",
            "problem",
            f"torch cannot use the GPU ({why})",
            "update the NVIDIA driver, or restart the machine",
            facts,
        )
    return Diagnosis("gpu", "note", f"none ({why}); {_SAME}", facts=facts)


def has_driver() -> bool:
    """Whether this system has NVIDIA's driver loaded."""
    return Path("/proc/driver/nvidia/version").exists()
