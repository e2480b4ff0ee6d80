"""Pictures and prompts out of files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mergetool.errors import DataError, InputMissing
from mergetool.sampler.inputs import read_picture, read_prompts

RED, BLUE = (255, 0, 0), (0, 0, 255)


def test_a_picture_is_turned_upright_as_its_exif_says(tmp_path: Path) -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[:, :3], pixels[:, 3:] = RED, BLUE
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter to the right: what is at the left comes to the top
    Image.fromarray(pixels).save(tmp_path / "phone.png", exif=exif)
    found, notes = read_picture(tmp_path / "phone.png")
    assert (found.shape, tuple(found[0, 0]), tuple(found[-1, 0]), notes) == ((6, 4, 3), RED, BLUE, [])


def test_sixteen_bits_become_eight_by_value(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 257, 32767, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "grey.png")
    found, _ = read_picture(tmp_path / "grey.png")
    assert found[0, :, 0].tolist() == [0, 0, 1, 1, 127, 128, 255]
    assert (found == found[..., :1]).all()


def test_what_is_transparent_becomes_white_and_is_told(tmp_path: Path) -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (255, 0, 0, 255)
    pixels[0, 1] = (255, 0, 0, 128)
    Image.fromarray(pixels).save(tmp_path / "alpha.png")
    found, notes = read_picture(tmp_path / "alpha.png")
    assert [tuple(pixel) for pixel in found.reshape(4, 3)] == [RED, (255, 127, 127), (255,) * 3, (255,) * 3]
    assert notes == ["transparent parts of alpha.png become white."]


def test_an_opaque_alpha_channel_changes_nothing(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 4), np.uint8)
    pixels[..., 3] = 255
    Image.fromarray(pixels).save(tmp_path / "opaque.png")
    found, notes = read_picture(tmp_path / "opaque.png")
    assert (found.tolist(), notes) == (pixels[..., :3].tolist(), [])


def test_numbers_of_no_known_range_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(DataError, match="holds floats, whose range is not known"):
        read_picture(tmp_path / "float.tiff")


@pytest.mark.parametrize("cut", [0, 1, 30, 60])
def test_a_picture_that_is_cut_off_is_one_sentence(tmp_path: Path, cut: int) -> None:
    Image.new("RGB", (64, 64), RED).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:cut])
    with pytest.raises(DataError, match="is not a picture that can be read"):
        read_picture(tmp_path / "cut.png")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_prompts_are_lines_in_any_marked_encoding(tmp_path: Path, encoding: str, end: str) -> None:
    lines = ["# a comment", "", "  一只蓝色的圆 ", "b\x0bwith a tab of another kind", ""]
    (tmp_path / "prompts.txt").write_bytes(end.join(lines).encode(encoding))
    assert read_prompts(tmp_path / "prompts.txt") == ("一只蓝色的圆", "b\x0bwith a tab of another kind")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("ä".encode("latin-1"), "save it as UTF-8"),
        ("a".encode("utf-16-le"), "save it as UTF-8"),
        (b"# only\r\n\r\n", "holds no prompt"),
    ],
)
def test_a_file_without_readable_prompts_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "prompts.txt").write_bytes(data)
    with pytest.raises(DataError, match=words):
        read_prompts(tmp_path / "prompts.txt")


@pytest.mark.parametrize("read", [read_picture, read_prompts])
def test_what_is_not_there_is_missing(tmp_path: Path, read: object) -> None:
    with pytest.raises(InputMissing, match="does not exist"):
        read(tmp_path / "nothing")  # type: ignore[operator]
