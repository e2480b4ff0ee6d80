"""Python, the system it runs on, and the mergetool in it."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

from mergetool import __version__, packages
from mergetool.installation.diagnosis import Diagnosis

OLDEST = (3, 11)


def python() -> Diagnosis:
    """The version of Python, and where it is."""
    version, place = platform.python_version(), sys.executable or "an embedded Python"
    facts = {"version": version, "executable": place, "prefix": sys.prefix}
    if sys.version_info < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        return Diagnosis(
            "python", "problem", f"{version}, {place}", f"install Python {wanted} or newer, and mergetool there", facts
        )
    return Diagnosis("python", "ok", f"{version}, {place}", facts=facts)


def system() -> Diagnosis:
    """The system and its processor's kind."""
    name = f"{platform.system()} {platform.release()}, {platform.machine()}"
    return Diagnosis("system", "ok", name, facts={"platform": platform.platform(), "machine": platform.machine()})


def mergetool() -> Diagnosis:
    """The version of mergetool, and where it was installed from."""
    folder = Path(__file__).parents[1]
    source = _source()
    facts = {"version": __version__, "folder": str(folder), "source": source}
    said = f"{__version__}, {folder}" + (f", installed from {source}" if source else "")
    recorded = packages.installed("mergetool")
    if recorded is None:
        return Diagnosis(
            "mergetool", "note", f"{said}, not installed by pip: versions of packages are not known", "", facts
        )
    if recorded != __version__:
        return Diagnosis(
            "mergetool", "problem", f"{said}, but pip has recorded {recorded}: files of two versions are mixed",
            "uninstall mergetool, and install it again", facts,
        )  # fmt: skip
    return Diagnosis("mergetool", "ok", said, facts=facts)


def _source() -> str:
    """The folder, file or address that pip installed from; "" for a package index."""
    try:
        text = metadata.distribution("mergetool").read_text("direct_url.json")
        address = json.loads(text)["url"] if text else ""
    except (metadata.PackageNotFoundError, OSError, ValueError, KeyError):
        return ""
    return str(address).removeprefix("file://") if os.name != "nt" else str(address)
