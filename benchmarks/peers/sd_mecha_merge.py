"""a + alpha * (b - c) with sd-mecha, for `benchmarks.bench_merge`; run it with an interpreter that has sd-mecha.

    python benchmarks/peers/sd_mecha_merge.py A B C OUT --alpha 20

Library defaults (float32 arithmetic, its own thread count and buffers) except the output dtype: it would
write fp16, and the bytes written must be comparable.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import sd_mecha  # type: ignore[import-not-found,unused-ignore]
import torch


def main() -> None:
    """Parse the command line, merge, and return once sd-mecha has closed the output."""
    parser = argparse.ArgumentParser()
    for name in ("a", "b", "c", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--alpha", type=float, required=True)
    options = parser.parse_args()
    a, b, c = (sd_mecha.model(path.resolve()) for path in (options.a, options.b, options.c))
    recipe = sd_mecha.add_difference(a, b, c, alpha=options.alpha)
    sd_mecha.merge(recipe, output=options.out.resolve(), merge_dtype=torch.float32, output_dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
