"""What a tensor name means: families, layouts, parts and groups. Reads headers only, never tensor data."""

from mergetool.arch.anatomy import Anatomy, Description, Family, GroupSize, Part, Slice, describe
from mergetool.arch.patterns import select
from mergetool.arch.recognition import recognise

__all__ = [
    "Anatomy",
    "Description",
    "Family",
    "GroupSize",
    "Part",
    "Slice",
    "describe",
    "recognise",
    "select",
]
