"""The presets of the sampler's stages, in the words of a command's help."""

from __future__ import annotations

from mergetool.options.sampling import FIRST, PRESETS


def presets() -> str:
    """What they are, a line each."""
    lines = [
        "\b",
        "Presets are what ComfyUI's stock templates of Z-Image are set to; other options change one setting of them:",
    ]
    for name, one in PRESETS.items():
        strength = "" if one.strength == FIRST.strength else f", strength {one.strength:g}"
        settings = (
            f"{one.steps:2} steps, cfg {one.cfg:g}, shift {one.shift:g}, {one.sampler}, {one.scheduler}{strength}"
        )
        lines.append(f"  {name:<15} {settings}")
    return "\n".join(lines) + "\n"
