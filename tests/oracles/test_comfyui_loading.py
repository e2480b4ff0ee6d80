"""What mergetool writes, loaded by the real ComfyUI."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families import checkpoint
from tests.oracles import ComfyUI, RefusedError


def test_a_generated_checkpoint_is_z_image_to_comfyui(tmp_path: Path, comfyui: ComfyUI) -> None:
    found = comfyui.ask("load", model=checkpoint(tmp_path / "m.safetensors"))
    assert (found["config"], found["missing"], found["unexpected"], found["log"]) == ("ZImage", [], [], [])


def test_what_comfyui_cannot_load_is_an_error_with_its_words(tmp_path: Path, comfyui: ComfyUI) -> None:
    with pytest.raises(RefusedError, match="FileNotFoundError"):
        comfyui.ask("load", model=tmp_path / "absent.safetensors")
