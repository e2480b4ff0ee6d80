"""The checker reads every drawn picture of the new world right, and nothing into what is none."""

from __future__ import annotations

import numpy as np
import pytest

from training.checker import read
from training.world import SIZES, Scene, place, render

STYLES = [(False, False), (True, False), (False, True), (True, True)]


@pytest.mark.parametrize(("striped", "hollow"), STYLES)
@pytest.mark.parametrize("size", SIZES)
def test_every_drawn_picture_is_read_right(size: tuple[int, int], striped: bool, hollow: bool) -> None:
    generator = np.random.default_rng(1)
    for number in range(24):
        scene = Scene.random(generator, size, held_out=number % 4 == 0)
        found = read(render(scene, place(scene, size, generator), size, striped=striped, hollow=hollow))
        assert found.matches(scene), (scene.prompt, found)
        assert (found.striped, found.hollow) == (striped, hollow), (scene.prompt, found)


def test_soft_and_noisy_pictures_are_still_read() -> None:
    generator = np.random.default_rng(2)
    right = 0
    for _ in range(40):
        scene = Scene.random(generator)
        sharp = render(scene, place(scene, SIZES[0], generator), SIZES[0]).astype(float)
        soft = (sharp + np.roll(sharp, 1, 0) + np.roll(sharp, 1, 1) + np.roll(sharp, -1, 0) + np.roll(sharp, -1, 1)) / 5
        noisy = np.clip(soft + generator.normal(0, 10, soft.shape), 0, 255).astype(np.uint8)
        right += read(noisy).matches(scene)
    assert right >= 39


@pytest.mark.parametrize("seed", range(5))
def test_noise_shows_nothing(seed: int) -> None:
    picture = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
    assert read(picture).scene is None


def test_a_scene_with_its_figures_exchanged_is_another() -> None:
    generator = np.random.default_rng(3)
    scene = Scene.parse("a red circle left of a blue square on a gold background")
    assert scene is not None
    found = read(render(scene, place(scene, SIZES[0], generator), SIZES[0]))
    for other in (
        "a blue circle left of a red square on a gold background",
        "a red square left of a blue circle on a gold background",
        "a blue square left of a red circle on a gold background",
        "a red circle above a blue square on a gold background",
        "a red circle on a gold background",
    ):
        wrong = Scene.parse(other)
        assert wrong is not None
        assert not found.matches(wrong)


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a knight in armor",
        "a blue circle on a blue background",
        "a teal circle on a red background",
        "a red circle left of a red square on a gold background",
        "a red circle below a blue square on a gold background",
    ],
)
def test_a_prompt_of_another_world_is_none(prompt: str) -> None:
    assert Scene.parse(prompt) is None


def test_scenes_and_prompts_are_the_same_thing() -> None:
    generator = np.random.default_rng(4)
    for number in range(50):
        scene = Scene.random(generator, SIZES[number % 3], held_out=number % 5 == 0)
        assert Scene.parse(scene.prompt) == scene
        assert scene.held_out == (number % 5 == 0)
