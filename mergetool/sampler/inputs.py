"""Pictures and prompts out of files, as a person sees them."""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mergetool.errors import DataError, InputMissing

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 64_000_000

_MARKS = (  # UTF-32 first: its mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)


def read_picture(path: Path) -> tuple[NDArray[np.uint8], list[str]]:
    """Read a picture as uint8 [height, width, 3], with sentences on its losses.

    It is upright: its EXIF orientation is applied, 16 bits become 8 by value, and what is transparent becomes white. Raises InputMissing or
    DataError.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f'"{path}" has {image.width} x {image.height} pixels; {MAX_PIXELS} are the limit.')
            notes = []
            if getattr(image, "n_frames", 1) > 1:
                notes.append(f"{path.name} has {image.n_frames} frames; the first is used.")  # type: ignore[attr-defined]
            return _rgb(ImageOps.exif_transpose(image), path, notes), notes
    except FileNotFoundError:
        raise InputMissing(f'"{path}" does not exist; check the path of `init_image`.') from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f'"{path}" is not a picture that can be read ({type(error).__name__}).') from None


def _rgb(image: Image, path: Path, notes: list[str]) -> NDArray[np.uint8]:
    from PIL import Image

    if image.mode in ("F", "I"):
        raise DataError(
            f'"{path}" holds {"floats" if image.mode == "F" else "32-bit numbers"}, whose range is not known; save it with 8 or 16 bits.'
        )
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        if np.asarray(layers)[..., 3].min() < 255:
            notes.append(f"transparent parts of {path.name} become white.")
        image = Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers)
    return np.array(image.convert("RGB"))  # a copy, which torch may write to


def read_prompts(path: Path) -> tuple[str, ...]:
    """Read prompts, one a line, without empty lines and comments.

    The text is UTF-8, or UTF-16 or UTF-32 with a byte order mark; a comment begins with #.

    Raises InputMissing or DataError.
    """
    try:
        data = path.read_bytes()
        encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
        text = data.decode(encoding)
    except FileNotFoundError:
        raise InputMissing(f'"{path}" does not exist; check the path of `prompts`.') from None
    except (OSError, UnicodeError) as error:
        raise DataError(
            f'"{path}" is not a text file that can be read ({type(error).__name__}); save it as UTF-8.'
        ) from None
    if "\0" in text:
        raise DataError(f'"{path}" is not a text file that can be read (it has zero bytes); save it as UTF-8.')
    lines = (line.strip() for line in re.split(r"\r\n|\r|\n", text))
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    if not prompts:
        raise DataError(f'"{path}" holds no prompt: every line is empty or begins with #.')
    return prompts
