"""The register of families: one file each, and this list. No other room names one."""

from __future__ import annotations

from collections.abc import Mapping

from mergetool.arch.anatomy import Family
from mergetool.arch.families.z_image import Z_IMAGE
from mergetool.checkpoint.header import TensorInfo

FAMILIES: tuple[Family, ...] = (Z_IMAGE,)
"""Every family that is known by name; of two that would take a file the first does."""


def shown_by(tensors: Mapping[str, TensorInfo]) -> Family | None:
    """The family that ``tensors``, under the model's own names, are of; None where none is known."""
    return next((family for family in FAMILIES if family.shows(tensors)), None)
