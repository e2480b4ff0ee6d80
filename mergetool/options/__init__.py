"""The one table of options: name, kind, default and help of each, for every face.

A row is a field of a dataclass, ``rank_max: Annotated[int | None, Option("...", Whole())] = None``. Groups of rows stand here
(`merging`, `differences`, `running`); a request of the API is a class that has them as its bases. The command line makes its options
from the rows, recipes their keys, ComfyUI its widgets and the documentation its tables; a value is checked when the dataclass is made,
so that every face refuses the same with the same sentence. A sentence names an option in backquotes, `` `rank_max` ``, and each face spells that.
"""
