"""The ComfyUI folders on this machine, with the folders that they keep models in."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from mergetool.installation.diagnosis import Diagnosis

KINDS = ("diffusion_models", "unet", "checkpoints", "loras", "text_encoders", "clip", "vae")
EXTRA = "extra_model_paths.yaml"
VARIABLE = "COMFYUI_PATH"

_USUAL = (
    "~/ComfyUI",
    "~/comfy/ComfyUI",
    "~/Documents/ComfyUI",
    "/workspace/ComfyUI",
    "/opt/ComfyUI",
    "C:/ComfyUI_windows_portable/ComfyUI",
)


def diagnose() -> list[Diagnosis]:
    """A line for each ComfyUI that is found, and one for a variable that leads to none."""
    lines = []
    named = os.environ.get(VARIABLE)
    if named and not _is_comfyui(Path(named).expanduser()):
        said = f'{VARIABLE} is "{named}", and no ComfyUI is there'
        lines.append(Diagnosis("comfyui", "note", said, f"set {VARIABLE} to the folder that has main.py and models"))
    lines += [_found(folder) for folder in _folders()]
    if not lines:
        said = "none found in the usual places"
        lines.append(Diagnosis("comfyui", "note", said, f"set {VARIABLE} to its folder, if there is one"))
    return lines


def _found(folder: Path) -> Diagnosis:
    places = {kind: folder / "models" / kind for kind in KINDS if _is_folder(folder / "models" / kind)}
    extra = folder / EXTRA
    has_extra = _is_file(extra)
    said = f"{folder}: models/{{{','.join(places)}}}" if places else f"{folder}: its folder models is empty"
    if has_extra:
        said += f"; more in {extra}"
    facts = {
        "folder": str(folder),
        "models": {kind: str(place) for kind, place in places.items()},
        "extra_model_paths": str(extra) if has_extra else None,
    }
    return Diagnosis("comfyui", "ok", said, facts=facts)


def _folders() -> Iterator[Path]:
    seen = set()
    for place in _places():
        try:
            real = place.resolve()
        except (OSError, RuntimeError):
            continue
        if real not in seen and _is_comfyui(real):
            seen.add(real)
            yield real


def _places() -> Iterator[Path]:
    """The variable's folder, the working folder and those above it, the neighbours of this Python, and usual places."""
    if os.environ.get(VARIABLE):
        yield Path(os.environ[VARIABLE]).expanduser()
    try:
        here = Path.cwd()
        yield from (here, here / "ComfyUI", *here.parents)
    except OSError:  # the working folder is gone
        pass
    yield from (Path(__file__).parents[3], Path(sys.prefix).parent, Path(sys.prefix).parent / "ComfyUI")
    for text in _USUAL:
        try:
            yield Path(text).expanduser()
        except RuntimeError:  # there is no home
            continue


def _is_comfyui(folder: Path) -> bool:
    return _is_file(folder / "main.py") and _is_folder(folder / "comfy") and _is_folder(folder / "models")


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False
