"""Pictures for people: PNG files that carry their parameters, and labelled contact sheets."""

from __future__ import annotations

import bisect
import functools
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

Pictures = NDArray[np.uint8]

SMALLEST_SIDE = 128
"""Pictures in a sheet are enlarged by whole factors to at least this many pixels."""

LARGEST_SIDE = 512
_SAMPLERS = {"euler": "Euler", "res_multistep": "Res Multistep", "dpmpp_2m_sde": "DPM++ 2M SDE"}
_GAP = 6
_WIDEST_LABEL = 300
_INK, _PAPER = (30, 30, 34), (250, 250, 248)


def png(picture: Pictures, parameters: Mapping[str, Any]) -> bytes:
    """Encode a picture uint8 [height, width, 3] as PNG, with its parameters.

    They are in the metadata twice.

    ``parameters`` is the text that web interfaces of this field read and write (prompt, negative prompt, one line of
    "Steps: ..., CFG scale: ..."); ``mergetool`` is all of them as JSON.
    """
    info = PngImagePlugin.PngInfo()
    info.add_itxt("parameters", infotext(parameters))
    info.add_itxt("mergetool", json.dumps(parameters, sort_keys=True))
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG", pnginfo=info)
    return out.getvalue()


def infotext(parameters: Mapping[str, Any]) -> str:
    """The parameters of one picture as the one-line text of web interfaces. Their cfg is guidance + 1."""
    first, second = parameters.get("first"), parameters.get("second")
    stage = first or second
    lines = [str(parameters["prompt"])]
    if parameters.get("negative"):
        lines.append(f"Negative prompt: {parameters['negative']}")
    width, height = parameters["size"]
    pairs: dict[str, Any] = {}
    if stage and "pipeline" in stage:
        pairs = {"Steps": stage["steps"], "Sampler": f"diffusers' {stage['pipeline']}"}
        scale = stage.get("cfg", stage.get("guidance"))
        pairs |= {} if scale is None else {"CFG scale": f"{scale:g}"}
    elif stage:
        pairs = {
            "Steps": stage["steps"],
            "Sampler": _SAMPLERS.get(stage["sampler"], stage["sampler"]),
            "Schedule type": stage["scheduler"].replace("_", " ").title(),
            "CFG scale": f"{stage['guidance'] + 1:g}",
        }
    pairs |= {"Seed": parameters["seed"], "Size": f"{width}x{height}"}
    if stage:
        pairs |= {"Model": stage["model"]} | ({"Shift": f"{stage['shift']:g}"} if "shift" in stage else {})
    if first and second:
        pairs |= {
            "Refiner": second["model"],
            "Denoising strength": f"{second['strength']:g}",
            "Refiner steps": second["evaluations"],
            **({"Refiner start sigma": f"{second['start_sigma']:.4f}"} if "start_sigma" in second else {}),
            "Refiner seed": parameters["refine_seed"],
        }
    if "upscale" in parameters:
        third = parameters["upscale"]
        pairs |= {"Postprocess upscale by": third["scale"], "Postprocess upscaler": Path(third["model"]).stem}
    lines.append(", ".join(f"{key}: {value}" for key, value in pairs.items()))
    return "\n".join(lines)


def sheet(
    rows: Sequence[Sequence[Pictures]], across: Sequence[str], down: Sequence[str], *, title: str = ""
) -> Image.Image:
    """A contact sheet: pictures in ``rows``, a label above each column and beside each row.

    Pictures are uint8 [height, width, 3], all of one shape up to scale; labels may be empty.
    """
    height, width = rows[0][0].shape[:2]
    factor = max(1, -(-SMALLEST_SIDE // min(height, width)))
    shrink = min(1.0, LARGEST_SIDE / max(height * factor, width * factor))
    cell = (round(width * factor * shrink), round(height * factor * shrink))
    font = _font(13)
    margin = max((round(font.getlength(_cut(label, font, _WIDEST_LABEL))) for label in down), default=0)
    left = margin + 2 * _GAP if margin else _GAP
    columns = max(len(row) for row in rows)
    top = _GAP + (24 if title else 0) + (20 if any(across) else 0)
    size = (left + columns * (cell[0] + _GAP), top + len(rows) * (cell[1] + _GAP))
    canvas = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((_GAP, _GAP), _cut(title, _font(15), size[0] - 2 * _GAP), _INK, _font(15))
    for column, label in enumerate(across):
        draw.text((left + column * (cell[0] + _GAP), top - 19), _cut(label, font, cell[0]), _INK, font)
    resampling = Image.Resampling.NEAREST if shrink == 1.0 else Image.Resampling.LANCZOS
    for line, (row, label) in enumerate(zip(rows, list(down) + [""] * (len(rows) - len(down)), strict=True)):
        y = top + line * (cell[1] + _GAP)
        draw.text((_GAP, y + cell[1] // 2 - 8), _cut(label, font, _WIDEST_LABEL), _INK, font)
        for column, picture in enumerate(row):
            tile = Image.fromarray(picture).resize(cell, resampling)
            canvas.paste(tile, (left + column * (cell[0] + _GAP), y))
    return canvas


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib brings it: it has Latin, Greek, Cyrillic and symbols, where Pillow's own draws boxes."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _cut(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, cut off with an ellipsis where it would be wider than ``width`` pixels."""
    text = text.splitlines()[0][:500] if text else ""
    if font.getlength(text) <= width:
        return text
    fits = bisect.bisect_left(range(len(text)), True, key=lambda count: font.getlength(text[:count] + "…") > width)
    return text[: fits - 1] + "…"
