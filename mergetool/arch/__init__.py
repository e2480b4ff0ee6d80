"""The meaning of tensor names: families, layouts, parts and groups. Reads headers only, never tensor data."""

from mergetool.arch.anatomy import Anatomy, Description, Family, GroupSize, Part, Preset, Slice, describe
from mergetool.arch.patterns import select
from mergetool.arch.prefixes import bundled
from mergetool.arch.recognition import recognise

__all__ = [
    "Anatomy",
    "Description",
    "Family",
    "GroupSize",
    "Part",
    "Preset",
    "Slice",
    "bundled",
    "describe",
    "recognise",
    "select",
]
