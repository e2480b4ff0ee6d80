"""The packages of other people: their versions, and whether they can be imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from mergetool import packages
from mergetool.installation.diagnosis import Diagnosis
from mergetool.packages import PACKAGES, Package

FOR_EVERY_MERGE = ("google-re2", "numpy", "platformdirs", "pydantic", "tqdm", "typer")
"""The packages without which no merge works."""

NOT_TRIED = ("diffusers", "torchsde", "transformers")
"""Packages that are looked for and not imported: with each comes torch, which is tried, and half a minute."""

TRIED = tuple(
    module for package in PACKAGES if package.name not in NOT_TRIED for module in package.modules if module != "torch"
)
"""Modules that are imported to see whether they can be, besides torch."""


def diagnose(tried: Mapping[str, Mapping[str, Any]]) -> list[Diagnosis]:
    """Make a line for each package from the result of `probes.imported`."""
    return [_diagnosis(package, tried) for package in PACKAGES]


def _diagnosis(package: Package, tried: Mapping[str, Mapping[str, Any]]) -> Diagnosis:
    topic, version = package.name, packages.installed(package.name)
    facts = {"package": package.name, "version": version, "extra": package.extra or None}
    if version is None and not any(map(_is_there, package.modules)):
        needed = package.name in FOR_EVERY_MERGE
        said = (
            f"not installed; {package.uses} need it"
            if not package.extra
            else f"not installed (optional: {package.uses})"
        )
        return Diagnosis(topic, "problem" if needed else "note", said, packages.install(package), facts)
    if version is not None and package.modules and not any(map(_is_there, package.modules)):
        said = f"{version} is recorded and its files are gone; {package.uses} need it"
        return Diagnosis(topic, "problem", said, packages.reinstall(package), facts)
    error = next((tried[module]["error"] for module in package.modules if tried.get(module, {}).get("error")), "")
    if error:
        said = f"{version or 'of no known version'} cannot be imported ({error}); {package.uses} need it"
        return Diagnosis(topic, "problem", said, packages.reinstall(package), facts)
    if packages.is_too_old(package):
        said = f"{version} is too old: {package.uses} need {packages.requirement(package)}"
        return Diagnosis(topic, "problem", said, packages.install(package), facts)
    return Diagnosis(topic, "ok", f"{version or 'of no known version'}", facts=facts)


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
