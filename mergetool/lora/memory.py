"""Upper bounds on the memory of a sum or a conversion of LoRAs, from shapes alone.

As in `difference.memory` every matrix is counted at the largest rank that its options allow. Numbers of bytes are of
arrays that live at the same time; a test holds that runs stay below them.
"""

from __future__ import annotations

from math import prod

from mergetool.adapters.lora_file import LoraFile
from mergetool.checkpoint.dtypes import DType
from mergetool.difference.memory import READING, largest, of_dense
from mergetool.engine.job import BASE_MEMORY
from mergetool.engine.threads import asked
from mergetool.lora.gathering import Gathering
from mergetool.lora.selection import Budget, ByRule, Exact, Fixed, Selection


def of_sum(gathering: Gathering, selection: Selection, dtype: DType | None = None, threads: int | None = None) -> int:
    """Bytes of anonymous memory that `combine` may come to take, the interpreter's among them."""
    kept, works = 0, []
    for module in gathering.modules:
        m, n = module.matrix
        width = module.width
        rank = min(_allowed(selection, width or min(m, n)), width or min(m, n), min(m, n) if width is None else width)
        kept += rank * (m + n) * (dtype or module.dtype).itemsize
        works.append(_of_factors(m, n, width) if width is not None else of_dense(m, n, rank, searched=False))
    if isinstance(selection, Budget):
        kept = min(kept, selection.size)
    return BASE_MEMORY + READING + largest(works, asked(threads)) + kept


def of_conversion(file: LoraFile) -> int:
    """Bytes of anonymous memory that `convert` may take, those of the interpreter included.

    They hold all of the file, and one module in float64.
    """
    stored = [[file.checkpoint.tensors[key] for key in adapter.tensors.values()] for adapter in file.adapters]
    one = max((sum(prod(info.shape) for info in infos) for infos in stored), default=0)
    whole = sum(info.nbytes for infos in stored for info in infos)
    return BASE_MEMORY + READING + 3 * whole + 48 * one


def _of_factors(m: int, n: int, width: int) -> int:
    """Sums, QRs and rounded copies of factors of ``width`` columns, and the small core between them."""
    return 64 * width * (m + n) + 64 * width**2


def _allowed(selection: Selection, width: int) -> int:
    """The largest rank that a selection allows a module of ``width``."""
    match selection:
        case Exact():
            return width
        case Fixed(rank):
            return rank
        case ByRule(_, most) | Budget(_, most):
            return width if most is None else most
