"""The fused kernels against the device's own copy, against torch eager and against torch.compile.

    python -m benchmarks.bench_kernels                  on a machine with a CUDA GPU; under a minute
    python -m benchmarks.bench_kernels --tune           also other block sizes, for whoever changes a kernel

Every size is far beyond the L2 cache, inputs are random numbers of a model's magnitudes, times are medians of CUDA
events after a warm-up. The ceiling is the best device-to-device copy of the same run, counting bytes read and written.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor

from benchmarks import provenance
from benchmarks.kernel_rivals import Bridge, compiled
from mergetool_kernels import blend

ELEMENTS = 1 << 29
MULTIPLIER = 20.0
BRIDGE = ((0, 0, 0), (0, 1, 1), (0, 2, 2), (3, 1, 2), (1, 1, 0), (2, 0, 1))  # x0 + m * (x1 - x2)


@dataclass(frozen=True, slots=True)
class Timing:
    """Median seconds and the bytes that had to move."""

    case: str
    provider: str
    seconds: tuple[float, float, float]  # p20, p50, p80
    moved: int

    @property
    def rate(self) -> float:
        """GB/s at the median."""
        return self.moved / self.seconds[1] / 1e9


def measure(case: str, provider: str, moved: int, work: Callable[[], object]) -> Timing:
    """Time ``work`` on the device."""
    low, middle, high = triton.testing.do_bench(work, warmup=50, rep=200, quantiles=[0.2, 0.5, 0.8])
    return Timing(case, provider, (low / 1e3, middle / 1e3, high / 1e3), moved)


def ceiling(elements: int) -> Timing:
    """The best copy this device does, of several sizes: bytes read plus bytes written over time."""
    best: Timing | None = None
    for share in (1, 2, 4):
        source = torch.randint(0, 255, (2 * elements // share,), dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        found = measure("copy", "torch copy_", 2 * source.numel(), lambda s=source, t=target: t.copy_(s))  # type: ignore[misc]
        best = found if best is None or found.rate > best.rate else best
    assert best is not None
    return best


def models(dtype: torch.dtype, elements: int) -> list[Tensor]:
    """Three weights of std 0.02; FP8 ones are stored at amax 448, as scaled files are."""
    spread = 0.02 if dtype.itemsize > 1 else 90.0
    generator = torch.Generator("cuda").manual_seed(0)
    found = []
    for _ in range(3):
        out = torch.empty(elements, dtype=dtype, device="cuda")
        for part in torch.split(out, 1 << 26):
            part.copy_((torch.randn(len(part), device="cuda", generator=generator) * spread).clamp(-448, 448))
        found.append(out)
    return found


def bridge(dtype: torch.dtype, elements: int, tune: bool) -> list[Timing]:
    """``a + 20 * (b - c)``: the fused kernel plain, with what a merge asks of it besides, and torch.compile at the same work."""
    a, b, c = models(dtype, elements)
    out = torch.empty_like(a)
    moved = 4 * a.numel() * a.element_size()
    name = str(dtype).removeprefix("torch.")
    scales = inverse = None
    if a.element_size() == 1:
        one, two, three, inverse = (torch.tensor([s], device="cuda") for s in (2e-4, 2.1e-4, 1.9e-4, 1 / 2e-3))
        scales = one, two, three
    operands = [blend.KernelOperand(x, s) for x, s in zip((a, b, c), scales or (None,) * 3, strict=True)]

    def fused(**options: object) -> Callable[[], object]:
        return lambda: blend.blend(BRIDGE, operands, [MULTIPLIER], out, inverse_scale=inverse, **options)  # type: ignore[arg-type]

    rows = [
        measure(f"bridge {name}", "fused", moved, fused(count=False)),
        measure(f"bridge {name}", "fused, checked", moved, fused()),
        measure(f"bridge {name}", "fused, checked and counted", moved, fused(base=0)),
        measure(f"bridge {name}", "fused, stochastic", moved, fused(count=False, stochastic_key=12345678901234567)),
        measure(f"bridge {name}", "fused, stochastic, counted", moved, fused(base=0, stochastic_key=12345678901234567)),
    ]
    if tune:
        for block, warps in itertools.product((1024, 2048, 4096, 8192), (4, 8, 16)):
            for label, options in (("", {"count": False}), (" counted", {"base": 0})):
                work = fused(block=block, warps=warps, **options)
                rows.append(measure(f"bridge {name}", f"block {block} warps {warps}{label}", moved, work))

    rival = Bridge(a, b, c, MULTIPLIER, scales, inverse)
    works: dict[str, Callable[[], object]] = {
        "": rival.plain,
        ", checked": rival.checked,
        ", checked and counted": rival.counted,
    }
    if dtype == torch.bfloat16:
        works[", stochastic"] = rival.stochastic
    rows.append(measure(f"bridge {name}", "torch eager", moved, rival.plain))
    for extra, does in works.items():
        try:
            rows.append(measure(f"bridge {name}", f"torch.compile{extra}", moved, compiled(does)))
        except Exception as error:  # a machine without a compiler: say so, and go on
            print(f"torch.compile did not run for {name}{extra}: {error}")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print a table, append to the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_kernels", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--elements", type=int, default=ELEMENTS)
    parser.add_argument("--results", type=Path, default=provenance.RESULTS)
    options = parser.parse_args(arguments)
    best = ceiling(options.elements)
    rows = [best]
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        rows += bridge(dtype, options.elements, options.tune)
        torch.cuda.empty_cache()
    name = torch.cuda.get_device_name()
    provenance.append((_result(row, best, options.elements, name) for row in rows), folder=Path(), path=options.results)
    print(f"{'case':28} {'provider':34} {'ms':>9} {'GB/s':>8} {'of copy':>8}")
    for row in rows:
        share = row.rate / best.rate
        print(f"{row.case:28} {row.provider:34} {row.seconds[1] * 1e3:9.3f} {row.rate:8.0f} {share:8.1%}")


def _result(row: Timing, best: Timing, elements: int, device: str) -> provenance.Result:
    return provenance.Result(
        "kernel", row.case, row.provider, "GB/s", [row.moved / s / 1e9 for s in row.seconds], "GB/s",
        ratio_to=best.provider, ratio=row.rate / best.rate, cache="device memory", device=device,
        config={"elements": elements, "triton": triton.__version__},
    )  # fmt: skip


if __name__ == "__main__":
    main()
