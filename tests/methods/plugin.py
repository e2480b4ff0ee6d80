"""Packages that give merge methods, as an installation leaves them."""

from __future__ import annotations

from pathlib import Path

HALVES = '''
from collections.abc import Sequence
from typing import Annotated

from torch import Tensor

from mergetool.methods import Site, method
from mergetool.methods.registry import Range


@method(takes="deltas", least=1, most=1)
def {name}(tensors: Sequence[Tensor], site: Site, *, share: Annotated[float, Range(0, 1, "how much of it")] = 0.5) -> Tensor:
    """Keep a share of a difference.

    Formula: share * d1
    Source: this test
    """
    return tensors[0] * share
'''


def install(folder: Path, package: str, name: str, code: str, *, function: str = "") -> Path:
    """A distribution ``package`` in ``folder`` whose module of the same name holds ``code`` and is said to give the method ``name``."""
    folder.mkdir(exist_ok=True)
    module = package.replace("-", "_")
    (folder / f"{module}.py").write_text(code)
    facts = folder / f"{module}-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(f"[mergetool.methods]\n{name} = {module}:{function or name}\n")
    return folder
