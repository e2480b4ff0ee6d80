"""The metadata of every file that mergetool writes: its command and its inputs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from mergetool import __version__


def stamp(command: str, recipe: Mapping[str, object], inputs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Make the ``__metadata__`` of an output: the recipe, the inputs and the version.

    The recipe stands under ``mergetool.COMMAND``.

    ``inputs`` are display names with content fingerprints. ``format`` is what transformers and diffusers look for.
    """
    return {
        "format": "pt",
        "mergetool.version": __version__,
        f"mergetool.{command}": json.dumps(recipe, sort_keys=True),
        "mergetool.inputs": json.dumps([{"name": name, "fingerprint": made} for name, made in inputs], sort_keys=True),
    }


def display_names(names: Sequence[str]) -> dict[str, str]:
    """Shorten names for publication: the last component without suffix, made unique.

    Paths and addresses have such components.

    Example: ``["base", "/home/me/x.safetensors"]`` gives ``{"base": "base", "/home/me/x.safetensors": "x"}``.
    """
    shown: dict[str, str] = {}
    for name in names:
        short = name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1].removesuffix(".safetensors") or name
        unique, count = short, 2
        while unique in shown.values():
            unique, count = f"{short}-{count}", count + 1
        shown[name] = unique
    return shown
