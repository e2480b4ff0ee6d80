"""The presets of the sampler's stages, in the words of a command's help."""

from __future__ import annotations

from mergetool.options.sampling import FIRST, PRESETS


def presets() -> str:
    """The presets as text, a line each."""
    lines = [
        "\b",
        "Presets are what ComfyUI's stock templates of Z-Image are set to; other options change one setting of them:",
    ]
    for name, preset in PRESETS.items():
        strength = "" if preset.strength == FIRST.strength else f", strength {preset.strength:g}"
        settings = f"{preset.steps:2} steps, cfg {preset.cfg:g}, shift {preset.shift:g}, {preset.sampler}, {preset.scheduler}{strength}"
        lines.append(f"  {name:<15} {settings}")
    return "\n".join(lines) + "\n"
