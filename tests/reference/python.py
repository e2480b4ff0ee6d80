"""docs/reference/python.md: what ``mergetool.__all__`` lists, for Sphinx to fill from docstrings."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import mergetool
from mergetool.errors import MergetoolError

HEAD = """\
# Python

Everything that `mergetool.__all__` lists. Other names are the house's own and may change. `import mergetool` costs nothing: a function's modules are loaded when it is first used.

```python
import mergetool

mergetool.merge("alkahest + 20 * (tuned - base)", "out.safetensors", protect=["refiner"])
```

A failure is a `MergetoolError` ([exit codes and errors](exit-codes.md)). Values of options are those of the [command line](options.md)."""

MEMBERS = ("Checkpoint", "CheckpointWriter", "Recipe")
"""Classes whose methods people call."""


def lines() -> Iterator[str]:
    """The page."""
    yield from HEAD.splitlines()
    everything = {name: getattr(mergetool, name) for name in mergetool.__all__}
    commands = [name for name, one in everything.items() if hasattr(one, "request")]
    classes = [name for name, one in everything.items() if inspect.isclass(one)]
    functions = [name for name in everything if name not in (*commands, *classes)]
    yield from _section(
        "Commands as functions",
        "Each does what the command of its name does, and returns what the command prints.",
        commands,
    )
    yield from _section("Plans, models and expressions", "What the commands are made of.", functions)
    yield from _section("Classes", "What the functions take and give.", classes)


def _section(title: str, sentence: str, names: list[str]) -> Iterator[str]:
    yield from ("", f"## {title}", "", sentence)
    for name in names:
        one = getattr(mergetool, name)
        kind = (
            ("autoexception" if issubclass(one, MergetoolError) else "autoclass")
            if inspect.isclass(one)
            else "autofunction"
        )
        members = ["   :members:", "   :member-order: bysource"] if name in MEMBERS else []
        yield from ("", f"### {name}", "", "```{eval-rst}", f".. {kind}:: mergetool.{name}", *members, "```")
