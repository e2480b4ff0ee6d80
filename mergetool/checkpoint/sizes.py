"""Sizes as people write them."""

from __future__ import annotations

from mergetool.errors import UsageError


def parse_size(text: str) -> int:
    """Bytes of ``300MB`` or ``2GB`` (decimal) or ``4GiB`` (binary); raises UsageError."""
    units = {"": 1, "B": 1}
    for i, letter in enumerate("KMGT", 1):
        units |= {f"{letter}B": 1000**i, f"{letter}IB": 1024**i, letter: 1000**i}
    digits = text.strip().rstrip("BKMGTIbkmgti ")
    try:
        value = float(digits) * units[text.strip()[len(digits) :].strip().upper()]
    except (KeyError, ValueError):
        raise UsageError(f'"{text}" is not a size; write for example 300MB, 2GB or 4GiB.') from None
    if not 0 < value < 2**63:
        raise UsageError(f'"{text}" is not a size that a file can have.')
    return int(value)
