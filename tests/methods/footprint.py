"""What each method allocates at most at once and how long it takes, on whole parameters; run as a program, for a process of its own.

    python -m tests.methods.footprint ROWS COLUMNS [METHOD...]

Prints JSON: for each method the most memory it held beyond its arguments, in float32 tensors of their size, and nanoseconds an element.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path

import torch

from mergetool import methods
from mergetool.methods import Method
from tests.methods.parity.case import SITE
from tests.resident import resident


def measure(method: Method, shape: tuple[int, int]) -> tuple[float, float]:
    """Buffers and nanoseconds an element, with three arguments or as many as it takes at most."""
    assert method.function is not None
    random = torch.Generator().manual_seed(0)
    count = max(method.least, min(3, method.most or 3))
    given = [0.01 * torch.randn(shape, generator=random) for _ in range(count)]
    method.function([tensor[:8].clone() for tensor in given], SITE)  # what is imported or planned once
    Path("/proc/self/clear_refs").write_text("5")
    before, start = resident("VmRSS"), time.perf_counter()
    method.function(given, SITE)
    seconds = time.perf_counter() - start
    elements = given[0].numel()
    return (resident("VmHWM") - before) / (4 * elements), seconds / elements * 1e9


def main() -> None:
    """Measure those named, or all."""
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: what is freed is given back at once
    torch.set_num_threads(1)
    rows, columns, *names = sys.argv[1:]
    wanted = names or [name for name, method in methods.methods().items() if method.function is not None]
    print(json.dumps({name: measure(methods.find(name), (int(rows), int(columns))) for name in wanted}))


if __name__ == "__main__":
    main()
