"""Row 20, by chance: random shard names, of which those that pass must stay in the folder by pathlib's reading of both rules."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import PurePosixPath, PureWindowsPath

from mergetool.checkpoint.names import why_not_plain
from tests.hostile.tally import Tally
from tests.hostile.targets import NAME_PIECES

END = ".safetensors"


def run(count: int, *, check: Callable[[str, str], str | None] = why_not_plain, seed: int = 20) -> Tally:
    """``count`` names of suspicious pieces; ``check`` says why a name is refused."""
    tally = Tally("20", "random shard names, read as Windows and POSIX read them", injected=count)
    dice = random.Random(seed)
    with warnings.catch_warnings():  # is_reserved is deprecated from Python 3.13 on
        warnings.simplefilter("ignore", DeprecationWarning)
        for _ in range(count):
            name = "".join(dice.choices(NAME_PIECES, k=dice.randint(0, 4))) + dice.choice(["", END, END, END])
            tally.judge(None if check(name, END) is not None else _fault(name))
    return tally


def _fault(name: str) -> str | None:
    windows = PureWindowsPath(name)
    leads_out = windows.is_reserved() or windows.drive or not windows.parts == PurePosixPath(name).parts == (name,)
    return f"{name!a} may pass and leads out" if leads_out else None
