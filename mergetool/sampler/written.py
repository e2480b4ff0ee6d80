"""Write pictures: one PNG, or a folder with a contact sheet and every parameter."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mergetool.checkpoint.files import write_file
from mergetool.checkpoint.targets import require_folder
from mergetool.errors import OutputError, UsageError
from mergetool.sampler import sheet

if TYPE_CHECKING:
    from mergetool.sampler.session import MadePicture


UNSCALED = "-unscaled"
"""The end of the name of a picture before the third stage."""


def require_target(target: Path, *, many: bool, enlarges: bool, overwrite: bool) -> None:
    """Raises OutputError, before any work, when the picture or folder cannot be made there."""
    if many and target.suffix.lower() == ".png":
        raise UsageError(
            f'more than one picture makes a folder, not a file: name one without .png, as in "{target.stem}".'
        )
    if not many and target.suffix.lower() != ".png":
        raise UsageError(f'one picture is a PNG: name it "{target.name}.png".')
    require_folder(target.parent)
    if target.is_dir() != many and target.exists():
        raise OutputError(f'"{target}" is {"no folder" if many else "a folder"}; choose another place with `output`.')
    if target.exists() and not overwrite and (not many or any(target.iterdir())):
        raise OutputError(f'"{target}" exists; choose another place with `output`, or replace it with `overwrite`.')
    if enlarges and not many and not overwrite and (beside := _unscaled(target)).exists():
        raise OutputError(f'"{beside}" exists; choose another place with `output`, or replace it with `overwrite`.')


def write(made: Sequence[Sequence[MadePicture]], target: Path, *, many: bool) -> list[Path]:
    """Write the pictures and return their paths.

    It is one file, or a folder with all of them, the sheet and ``pictures.json``. Beside an enlarged picture lies the unscaled one.
    """
    if not many:
        return _write_one(made[0][-1], target)
    target.mkdir(exist_ok=True)
    paths, record = [], []
    for row, line in enumerate(made):
        for column, drawn in enumerate(line):
            path = target / f"{row:03}-{column}.png"
            files = _write_one(drawn, path)
            paths += files
            beside = {"unscaled": files[1].name} if files[1:] else {}
            record.append({"file": path.name, **beside, **drawn.parameters})
    out = io.BytesIO()
    across = [_label(drawn) for drawn in made[0]]
    down = [f"{line[0].parameters['seed']}: {line[0].parameters['prompt']}" for line in made]
    sheet.sheet([[drawn.picture for drawn in line] for line in made], across, down).save(out, "PNG")
    for name, data in (("sheet.png", out.getvalue()), ("pictures.json", json.dumps(record, indent=1).encode() + b"\n")):
        write_file(target / name, data, overwrite=True)
        paths.append(target / name)
    return paths


def _write_one(drawn: MadePicture, path: Path) -> list[Path]:
    """Write a picture, and beside it the unscaled one, whose metadata have no third stage."""
    write_file(path, sheet.png(drawn.picture, drawn.parameters), overwrite=True)
    if drawn.unscaled is None:
        return [path]
    before = {name: value for name, value in drawn.parameters.items() if name != "upscale"}
    write_file(_unscaled(path), sheet.png(drawn.unscaled, before), overwrite=True)
    return [path, _unscaled(path)]


def _unscaled(path: Path) -> Path:
    return path.with_stem(path.stem + UNSCALED)


def _label(drawn: MadePicture) -> str:
    first, second, third = (drawn.parameters.get(stage) for stage in ("first", "second", "upscale"))
    drawn_by = f"{first['model']}, {first['steps']} steps" if first and not second else ""
    refined = f"strength {second['strength']:g}" if second else ""
    enlarged = f"{third['scale']} x larger" if third else ""
    return ", ".join(filter(None, (drawn_by, refined, enlarged)))
