"""The curves of block-weight tools: 26 weights along a UNet, made by formula.

Names and figures are those of the presets that supermerger (hako-mikan/sd-webui-supermerger, 0b1c491, scripts/mbwpresets_master.txt) offers: one weight for what is in no block, then one each
for 25 blocks, ``IN00`` to ``IN11``, ``M00``, ``OUT00`` to ``OUT11``. Block n lies at x = n / 24. Of a UNet with fewer blocks the tool takes the weights of those that
it has by name, and so is it here: SDXL ends at ``IN08`` and ``OUT08``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from itertools import groupby

from mergetool.arch.anatomy import Preset

WAY = 12
"""The blocks of either way in the tools' lists."""
LAST = 2 * WAY
OF_TOOLS = "a curve of block-weight tools"
_DIGITS = 15
Curve = Callable[[Fraction], Fraction]


def _smooth(x: Fraction) -> Fraction:
    return x * x * (3 - 2 * x)


def _folded(value: Fraction) -> Fraction:
    """A value above 1 goes down again, and below 0 up."""
    rest = value % 2
    return rest if rest <= 1 else 2 - rest


def _cosine(x: Fraction) -> Fraction:
    return Fraction(round((1 + math.cos(math.pi * x)) / 2, _DIGITS)).limit_denominator(10**_DIGITS)


def _cubic(x: Fraction, *coefficients: Fraction) -> Fraction:
    return sum((factor * x**power for power, factor in enumerate(coefficients)), Fraction(0))


def _true_hermite(x: Fraction) -> Fraction:
    """The published list has 0, not 1/24, at its beginning."""
    return _cubic(x, Fraction(1, 24), Fraction(25, 6), Fraction(-77, 8), Fraction(77, 12)) if x else x


def _fake_hermite(x: Fraction) -> Fraction:
    return _cubic(x, Fraction(0), Fraction(25, 6), Fraction(-19, 2), Fraction(19, 3))


def _smoothsteps() -> Iterator[tuple[str, Curve]]:
    """Smoothstep, folded: its values k times as large, or k times along the way."""
    for k in (1, 2, 3, 4):
        yield f"smoothstep*{k}" if k > 1 else "smoothstep", lambda x, k=k: _folded(k * _smooth(x))  # type: ignore[misc]
    for k in (2, 3, 4):
        yield f"smoothstep/{k}", lambda x, k=k: _smooth(_folded(k * x))  # type: ignore[misc]


_SMOOTHSTEPS = dict(_smoothsteps())
_CURVES: Mapping[str, Curve] = {
    "grad-v": lambda x: abs(1 - 2 * x),
    "grad-a": lambda x: 1 - abs(1 - 2 * x),
    **{f"flat-{n}": lambda x, n=n: Fraction(n, 100) for n in (25, 50, 75)},  # type: ignore[misc]
    **_SMOOTHSTEPS,
    "cosine": _cosine,
    "true-cubic-hermite": _true_hermite,
    "fake-cubic-hermite": _fake_hermite,
}
_REVERSED: Mapping[str, str] = {
    **{f"r-{name}": name for name in _SMOOTHSTEPS if name != "smoothstep"},
    "reverse-smoothstep": "smoothstep",
    "reverse-cosine": "cosine",
    "true-reverse-cubic-hermite": "true-cubic-hermite",
    "fake-reverse-cubic-hermite": "fake-cubic-hermite",
}
_HALF = Fraction(1, 2)
# Runs of (blocks, weight).
_STEPS: Mapping[str, tuple[tuple[int, Fraction | int], ...]] = {
    **{f"wrap{n:02}": ((n // 2, 1), (25 - n, 0), (n // 2, 1)) for n in (8, 12, 14, 16)},
    "mid12-50": ((5, 0), (14, _HALF), (6, 0)),
    "out07": ((18, 0), (7, 1)),
    "out12": ((13, 0), (12, 1)),
    "out12-5": ((12, 0), (1, _HALF), (12, 1)),
    "ring08-soft": ((5, 0), (1, _HALF), (3, 1), (1, _HALF), (5, 0), (1, _HALF), (3, 1), (1, _HALF), (5, 0)),
    "ring08-5": ((6, 0), (4, 1), (5, 0), (4, 1), (6, 0)),
    "ring10-5": ((5, 0), (5, 1), (5, 0), (5, 1), (5, 0)),
    "ring10-3": ((6, 0), (5, 1), (3, 0), (5, 1), (6, 0)),
    "all-a": ((25, 0),),
    "all-b": ((25, 1),),
}


def weights() -> dict[str, tuple[Fraction, list[Fraction]]]:
    """Map each curve's name to its weight outside the blocks, and those of 25 blocks.

    Only ``all-b`` changes parts outside the blocks.
    """
    places = [Fraction(n, LAST) for n in range(LAST + 1)]
    found = {name: [curve(x) for x in places] for name, curve in _CURVES.items()}
    found |= {name: [1 - weight for weight in found[other]] for name, other in _REVERSED.items()}
    found |= {name: [Fraction(weight) for count, weight in runs for _ in range(count)] for name, runs in _STEPS.items()}
    return {name: (Fraction(name == "all-b"), blocks) for name, blocks in found.items()}


def curves(blocks: int) -> Iterator[Preset]:
    """The presets of a UNet of so many blocks on either way, at most 12."""
    for name, (base, along) in weights().items():
        settings = [f"BASE={base}"]
        settings += _stack("input_blocks", "IN", along[:blocks])
        settings.append(f"M00={along[WAY]}")
        settings += _stack("output_blocks", "OUT", along[WAY + 1 : WAY + 1 + blocks])
        yield Preset(name, tuple(settings), OF_TOOLS)


def _stack(stack: str, word: str, along: Iterable[Fraction]) -> Iterator[str]:
    """A setting for each run of equal weights."""
    for weight, run in groupby(enumerate(along), key=lambda numbered: numbered[1]):
        numbers = [number for number, _ in run]
        name = f"{word}{numbers[0]:02}" if len(numbers) == 1 else f"{stack}.{numbers[0]}-{numbers[-1]}"
        yield f"{name}={weight}"
