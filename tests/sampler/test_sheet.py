"""PNG metadata and contact sheets, read back by Pillow."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
from PIL import Image

from mergetool.sampler.sheet import infotext, png, sheet

PARAMETERS: dict[str, Any] = {
    "prompt": "a blue circle on a gold background — ☀",
    "negative": "a red one",
    "seed": 7,
    "size": [64, 48],
    "first": {
        "model": "lab.base",
        "steps": 30,
        "guidance": 3.0,
        "shift": 6.0,
        "sampler": "dpmpp_2m_sde",
        "scheduler": "sgm_uniform",
        "start_sigma": 1.0,
        "evaluations": 30,
        "loras": {},
    },
    "second": {
        "model": "lab.turbo",
        "steps": 4,
        "guidance": 0.0,
        "shift": 3.0,
        "sampler": "euler",
        "scheduler": "simple",
        "start_sigma": 0.346,
        "evaluations": 4,
        "loras": {},
        "strength": 0.15,
        "strength_as": "comfyui",
    },
    "refine_seed": 8,
}


def picture(value: int = 90) -> np.ndarray:
    return np.full((48, 64, 3), value, np.uint8)


def test_a_png_carries_the_picture_and_every_parameter() -> None:
    with Image.open(io.BytesIO(png(picture(), PARAMETERS))) as image:
        assert np.array_equal(np.asarray(image), picture())
        assert json.loads(image.info["mergetool"]) == PARAMETERS
        assert image.info["parameters"] == infotext(PARAMETERS)


def test_infotext_is_what_web_interfaces_read() -> None:
    lines = infotext(PARAMETERS).splitlines()
    assert lines[0] == PARAMETERS["prompt"]
    assert lines[1] == "Negative prompt: a red one"
    pairs = dict(pair.split(": ", 1) for pair in lines[2].split(", "))
    assert (pairs["Steps"], pairs["CFG scale"], pairs["Seed"], pairs["Size"]) == ("30", "4", "7", "64x48")
    assert (pairs["Sampler"], pairs["Schedule type"]) == ("DPM++ 2M SDE", "Sgm Uniform")
    assert (pairs["Denoising strength"], pairs["Refiner"]) == ("0.15", "lab.turbo")


def test_a_sheet_holds_every_picture_in_its_place() -> None:
    made = sheet([[picture(10), picture(20)], [picture(30), picture(40)]], ["a", "b"], ["x", "y"], title="test")
    found = np.asarray(made)
    assert sorted({int(value) for value in (10, 20, 30, 40) if (found == value).all(-1).sum() >= 171 * 128}) == [
        10,
        20,
        30,
        40,
    ]


def test_a_long_label_does_not_widen_the_sheet() -> None:
    short, long = (sheet([[picture()]], [label], [label]).size for label in ("a" * 60, "a" * 6000))
    assert short == long


def test_labels_are_drawn_in_more_than_ascii() -> None:
    """Every character of its own looks unlike the box that stands for a missing one."""
    missing, *drawn = (
        np.asarray(sheet([[picture()]], [character], [])).tobytes() for character in ("\U000f0000", "×", "é", "Ж", "λ")
    )
    assert missing not in drawn
    assert len(set(drawn)) == len(drawn)
