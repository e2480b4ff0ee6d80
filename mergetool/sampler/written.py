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


def require_target(target: Path, *, many: bool, overwrite: bool) -> None:
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


def write(made: Sequence[Sequence[MadePicture]], target: Path, *, many: bool) -> list[Path]:
    """Write the pictures and return their paths.

    It is one file, or a folder with all of them, the sheet and ``pictures.json``.
    """
    if not many:
        last = made[0][-1]
        write_file(target, sheet.png(last.picture, last.parameters), overwrite=True)
        return [target]
    target.mkdir(exist_ok=True)
    paths, record = [], []
    for row, line in enumerate(made):
        for column, drawn in enumerate(line):
            path = target / f"{row:03}-{column}.png"
            write_file(path, sheet.png(drawn.picture, drawn.parameters), overwrite=True)
            paths.append(path)
            record.append({"file": path.name, **drawn.parameters})
    out = io.BytesIO()
    across = [_label(drawn) for drawn in made[0]]
    down = [f"{line[0].parameters['seed']}: {line[0].parameters['prompt']}" for line in made]
    sheet.sheet([[drawn.picture for drawn in line] for line in made], across, down).save(out, "PNG")
    for name, data in (("sheet.png", out.getvalue()), ("pictures.json", json.dumps(record, indent=1).encode() + b"\n")):
        write_file(target / name, data, overwrite=True)
        paths.append(target / name)
    return paths


def _label(drawn: MadePicture) -> str:
    first, second = drawn.parameters["first"], drawn.parameters["second"]
    if second is None:
        return f"{first['model']}, {first['steps']} steps"
    return f"strength {second['strength']:g}"
