"""The third stage against spandrel run by hand: its pictures, its files, what it refuses."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import mergetool
from mergetool.__main__ import main
from mergetool.errors import DataError, InputMissing, OutputError, PackageError
from mergetool.sampler import upscaler as third
from mergetool.sampler.upscaler import Upscaler, tiled
from tests.sampler import spandrels

PROMPT = "a blue circle on a gold background"
REACH = 19
"""Pixels that an ESRGAN of one block sees on each side: 15 convolutions in dense blocks, and those around them."""


@pytest.fixture(scope="module", autouse=True)
def _spandrel() -> Iterator[None]:
    with spandrels.installed():
        yield


def esrgan(**given: Any) -> dict[str, torch.Tensor]:
    """The weights of a small ESRGAN, random, so large that every convolution is seen in the result."""
    from spandrel.architectures.ESRGAN import ESRGAN

    torch.manual_seed(0)
    net = ESRGAN(**{"num_filters": 8, "num_blocks": 1, "scale": 2, **given})
    return {name: 2 * value for name, value in net.state_dict().items()}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("upscalers") / "2x-Small.safetensors"
    save_file(esrgan(), path)
    return path


def by_hand(file: Path, picture: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    import spandrel

    net = spandrel.ModelLoader().load_from_file(file).eval()
    with torch.no_grad():
        made = net(torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 255)
    return (made[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


def test_sample_enlarges_as_spandrel_does_and_keeps_the_picture_before(file: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"refiner": "lab.turbo", "steps": 2, "refine_steps": 2, "seeds": 7}
    (plain,) = mergetool.sample(PROMPT, base="lab.base", **how)
    (found,) = mergetool.sample(PROMPT, base="lab.base", upscale=file, output=tmp_path / "a.png", **how)
    assert found.unscaled is not None
    assert np.array_equal(np.asarray(found.unscaled), np.asarray(plain.image))
    wanted = by_hand(file, np.asarray(plain.image))
    assert wanted.shape == (128, 128, 3)
    assert len(np.unique(wanted)) > 50
    assert np.array_equal(np.asarray(found.image), wanted)
    with Image.open(tmp_path / "a.png") as large, Image.open(tmp_path / "a-unscaled.png") as small:
        assert np.array_equal(np.asarray(large), wanted)
        assert np.array_equal(np.asarray(small), np.asarray(plain.image))
        record, before = json.loads(large.info["mergetool"]), json.loads(small.info["mergetool"])
        assert large.info["parameters"].endswith("Postprocess upscale by: 2, Postprocess upscaler: 2x-Small")
    assert record["upscale"] == {
        "model": str(file),
        "architecture": "ESRGAN",
        "scale": 2,
        "size": [128, 128],
        "fingerprint": f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}",
    }
    assert before == {name: value for name, value in record.items() if name != "upscale"} == plain.parameters
    (tmp_path / "a.png").unlink()
    with pytest.raises(OutputError, match=r"a-unscaled\.png.* exists"):
        mergetool.sample(PROMPT, base="lab.base", upscale=file, output=tmp_path / "a.png")


def test_pictures_name_the_contents_of_every_stages_model(file: Path) -> None:
    (found,) = mergetool.sample(PROMPT, base="lab.base", refiner="lab.turbo", steps=1, refine_steps=1)
    wanted = {}
    for name in ("lab.base", "lab.turbo"):
        with mergetool.open_model(name) as opened:
            wanted[name] = opened.checkpoint.fingerprint()
    assert found.parameters["fingerprints"] == wanted


def test_a_folder_has_both_pictures_and_its_sheet_the_large_ones(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, whose spandrel a command of its own would not have."""
    asked = ["sample", PROMPT, "--base", "lab.base", "--refiner", "lab.turbo", "--steps", "1", "--refine-steps", "1"]
    asked += ["--strength", "0.1,0.3", "--upscale", str(file), "-o", str(tmp_path / "grid")]
    monkeypatch.setattr(sys, "argv", ["mergetool", *asked])
    with pytest.raises(SystemExit, match="0"):
        main()
    told = capsys.readouterr().out
    assert f"stage 3  {file}: ESRGAN, to 128 x 128" in told
    pictures = json.loads((tmp_path / "grid" / "pictures.json").read_text())
    assert [picture.get("unscaled") for picture in pictures] == [None, "000-1-unscaled.png", "000-2-unscaled.png"]
    assert ["upscale" in picture for picture in pictures] == [False, True, True]
    for picture in pictures[1:]:
        with Image.open(tmp_path / "grid" / picture["file"]) as image:
            assert image.size == (128, 128)
    assert {path.name for path in (tmp_path / "grid").iterdir()} == {
        *(f"000-{name}.png" for name in ("0", "1", "1-unscaled", "2", "2-unscaled")),
        *("sheet.png", "pictures.json"),
    }
    assert "7 files" in told


def test_tiles_are_the_whole_picture_where_their_margin_is_what_the_model_sees(file: Path) -> None:
    upscaler = Upscaler.open(file)
    picture = torch.rand(1, 3, 150, 211, generator=torch.Generator().manual_seed(0))
    whole = tiled(upscaler._run, picture, 2, tile=0)
    tiles: list[int] = []
    found = tiled(upscaler._run, picture, 2, tile=2 * 2 * REACH + 40, margin=2 * REACH, done=tiles.append)
    assert sum(tiles) == 4 * 6
    assert (found - whole).abs().max() < 1e-5
    seen_less = tiled(upscaler._run, picture, 2, tile=64, margin=8)
    assert (seen_less - whole).abs().max() > 1e-4


def test_large_pictures_go_in_tiles_and_smaller_ones_where_a_gpu_is_full(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upscaler, seen = Upscaler.open(file), []
    run = Upscaler._run

    def full(self: Upscaler, image: torch.Tensor) -> torch.Tensor:
        seen.append(image.shape[2:])
        if max(image.shape[2:]) > 150:
            raise torch.OutOfMemoryError
        return run(self, image)

    monkeypatch.setattr(Upscaler, "_run", full)
    picture = np.random.default_rng(0).integers(0, 256, (70, 600, 3), np.uint8)
    assert upscaler.tiles((600, 70)) == 2
    made = upscaler.enlarge(picture)
    assert seen[0] == (70, 480)
    assert seen[1] == (70, 224)
    assert upscaler.notes == [
        f"the third stage goes on in tiles of {size} pixels: cpu was full." for size in (256, 128)
    ]
    assert np.abs(made.astype(int) - by_hand(file, picture)).max() <= 1


@pytest.mark.filterwarnings("ignore:torch.meshgrid")
def test_attention_in_windows_gets_its_padding(tmp_path: Path) -> None:
    from spandrel.architectures.SwinIR import SwinIR

    torch.manual_seed(0)
    net = SwinIR(
        embed_dim=12, depths=[2], num_heads=[2], window_size=8, mlp_ratio=2.0, upscale=2, upsampler="pixelshuffle"
    )
    save_file({name: value.clone() for name, value in net.state_dict().items()}, tmp_path / "swin.safetensors")
    picture = np.random.default_rng(0).integers(0, 256, (43, 61, 3), np.uint8)
    found = Upscaler.open(tmp_path / "swin.safetensors").enlarge(picture)
    assert np.array_equal(found, by_hand(tmp_path / "swin.safetensors", picture))


def test_a_pickle_of_tensors_is_read_and_one_with_more_is_not(file: Path, tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    torch.save({"params_ema": esrgan()}, tmp_path / "fine.pth")
    assert np.array_equal(Upscaler.open(tmp_path / "fine.pth").enlarge(picture), by_hand(file, picture))
    torch.save({"params_ema": esrgan(), "code": Upscaler}, tmp_path / "more.pth")
    with pytest.raises(DataError, match=r"more\.pth\" is a pickle that holds more than tensors"):
        Upscaler.open(tmp_path / "more.pth")


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"in_nc": 1, "out_nc": 1}, "makes 1 channels of 1, and pictures have 3"),
        (None, "is of no architecture that spandrel .* knows"),
    ],
)
def test_what_is_no_upscaler_is_refused_before_anything_is_drawn(
    weights: dict[str, int] | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(third.Upscaler, "enlarge", None)
    monkeypatch.setattr("mergetool.sampler.session.make", None)
    save_file({"a": torch.zeros(2)} if weights is None else esrgan(**weights), tmp_path / "a.safetensors")
    with pytest.raises(DataError, match=said):
        mergetool.sample(PROMPT, base="lab.base", upscale=tmp_path / "a.safetensors")
    with pytest.raises(InputMissing, match="check the path of `upscale`"):
        mergetool.sample(PROMPT, base="lab.base", upscale=tmp_path / "b.safetensors")


def test_without_spandrel_the_command_that_installs_it_is_told(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spandrel", None)
    monkeypatch.setattr("mergetool.sampler.session.make", None)
    with pytest.raises(PackageError, match=r"spandrel is not installed, which upscalers need; install it: .*spandrel"):
        mergetool.sample(PROMPT, base="lab.base", upscale=file)
