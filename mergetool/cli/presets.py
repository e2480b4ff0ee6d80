"""The presets of the sampler's stages, in the words of a command's help."""

from __future__ import annotations

from mergetool.options.sampling import FIRST, PRESETS


def presets() -> str:
    """The presets as text, a line each."""
    lines = [
        "\b",
        "Presets have the settings of ComfyUI's stock templates for Z-Image; other\noptions change one setting:",
    ]
    for name, preset in PRESETS.items():
        strength = "" if preset.strength == FIRST.strength else f", strength {preset.strength:g}"
        settings = f"{preset.steps} steps, cfg {preset.cfg:g}, shift {preset.shift:g}, {preset.sampler}, {preset.scheduler}{strength}"
        lines.append(f"  {name:<14} {settings}")
    return "\n".join(lines) + "\n"
