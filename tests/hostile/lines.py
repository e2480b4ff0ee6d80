"""Every command that opens a file, with that file in every place it can take; {x} is the file, the others are good ones of `models.family`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.hostile.warm import Warm

LINES: Mapping[str, list[str]] = {
    "inspect": ["inspect", "{x}", "--verbose"],
    "inspect, JSON": ["inspect", "{x}", "--json"],
    "inspect, hash": ["inspect", "{x}", "--hash"],
    "merge, first": ["merge", "'{x}' + 0.5 * ('small-a.safetensors' - 'small-b.safetensors')", "-o", "out.safetensors"],
    "merge, later": ["merge", "'small-a.safetensors' + 2 * ('{x}' - 'small-b.safetensors')", "-o", "out.safetensors"],
    "merge, LoRA": ["merge", "'small-a.safetensors' + lora('{x}')", "-o", "out.safetensors"],
    "merge, dry run": ["merge", "0.5 * '{x}' + 0.5 * 'small-b.safetensors'", "--dry-run"],
    "diff": ["diff", "--base", "small-a.safetensors", "--variant", "{x}", "-o", "out.safetensors"],
    "convert": ["convert", "{x}", "-o", "out.safetensors", "--dtype", "fp16"],
    "verify": ["verify", "{x}", "--no-images"],
    "replay": ["replay", "{x}"],
    "compare": ["compare", "{x}", "small-a.safetensors"],
    "compare, reference": ["compare", "small-a.safetensors", "small-b.safetensors", "--reference", "{x}"],
    "lora inspect": ["lora", "inspect", "{x}", "--verbose"],
    "lora bake, model": ["lora", "bake", "{x}", "lora.safetensors", "-o", "out.safetensors"],
    "lora bake, LoRA": ["lora", "bake", "small-a.safetensors", "{x}", "-o", "out.safetensors"],
    "lora convert": ["lora", "convert", "{x}", "-o", "out.safetensors"],
    "lora merge": ["lora", "merge", "{x}", "lora.safetensors", "-o", "out.safetensors"],
    "lora resize": ["lora", "resize", "{x}", "--rank", "1", "-o", "out.safetensors"],
    "lora subtract": ["lora", "subtract", "lora.safetensors", "{x}", "-o", "out.safetensors"],
    "lora common": ["lora", "common", "{x}", "lora.safetensors", "-o", "out.safetensors"],
    "lora orthogonal": ["lora", "orthogonal", "lora.safetensors", "{x}", "-o", "out.safetensors"],
    "lora interference": ["lora", "interference", "{x}", "lora.safetensors"],
    "lora verify": ["lora", "verify", "small-a.safetensors", "{x}", "small-b.safetensors"],
}
CODES = {0, 1, 2, 65, 66, 73}
"""Exit codes that a hostile input may lead to: done, a check said no, usage, bad data, missing, no output."""


def lines(name: str) -> list[list[str]]:
    """Every command with ``name`` for its file."""
    return [[word.replace("{x}", name) for word in line] + _overwrite(line) for line in LINES.values()]


def _overwrite(line: list[str]) -> list[str]:
    return ["--overwrite"] if "-o" in line else []


def warmed(warm: Warm, folder: Path) -> None:
    """Run every command on a good model, a good LoRA and something that is refused, so that all of its imports are done; once a server."""
    if warm.is_warmed:
        return
    (folder / "refused").write_bytes(b"no model")
    for name in ("small-alk.safetensors", "lora.safetensors", "refused", "missing"):
        for line in lines(name):
            warm.warm_up(line, folder)
    for line in (["merge", "slerp('a.safetensors', 'b.safetensors')", "--dry-run"], ["merge", "a", "--dry-run"]):
        warm.warm_up(line, folder)
    for path in folder.glob("out*"):
        path.unlink()
    warm.is_warmed = True


def verdict(code: int, out: str, err: str) -> str | None:
    """What is wrong with how a command ended: another code, a traceback, more than one sentence."""
    if code not in CODES:
        return f"exit {code}: {err[-300:]}"
    if "Traceback" in err or (code > 2 and (not err.startswith("mergetool: ") or err.count("\n") != 1)):
        return f"exit {code}, and not one sentence: {err[-300:]!r}"
    return None
