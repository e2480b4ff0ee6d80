"""The checker reads what was drawn, and nothing into what was not."""

from __future__ import annotations

import numpy as np
import pytest

from mergetool.lab.checker import adherent, read
from mergetool.lab.world import PALETTE, SCENES, SHAPES, SIZE, Pixels, Placing, Scene, render

STYLES = [(False, False), (True, False), (False, True), (True, True)]


@pytest.mark.parametrize(("striped", "hollow"), STYLES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_drawn_picture_is_read_right(shape: str, striped: bool, hollow: bool) -> None:
    generator = np.random.default_rng(1)
    for scene in [scene for scene in SCENES if scene.shape == shape][::3]:
        found = read(render(scene, Placing.random(generator), striped=striped, hollow=hollow))
        assert found.matches(scene)
        assert (found.striped, found.hollow) == (striped, hollow)


def test_soft_and_noisy_pictures_are_still_read() -> None:
    generator = np.random.default_rng(2)
    right = 0
    for scene in SCENES[::7]:
        sharp = render(scene, Placing.random(generator)).astype(float)
        soft = (sharp + np.roll(sharp, 1, 0) + np.roll(sharp, 1, 1) + np.roll(sharp, -1, 0) + np.roll(sharp, -1, 1)) / 5
        noisy = np.clip(soft + generator.normal(0, 10, soft.shape), 0, 255).astype(np.uint8)
        right += read(noisy).matches(scene)
    assert right == len(SCENES[::7])


@pytest.mark.parametrize("seed", range(20))
def test_noise_shows_nothing(seed: int) -> None:
    picture = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    assert read(picture).ground is None


@pytest.mark.parametrize("colour", PALETTE)
def test_an_empty_ground_has_no_shape(colour: str) -> None:
    picture = np.broadcast_to(np.array(PALETTE[colour], np.uint8), (SIZE, SIZE, 3)).copy()
    found = read(picture)
    assert (found.shape, found.colour, found.ground) == (None, None, colour)


def _blob(seed: int) -> Pixels:
    """A ragged blob that is none of the shapes."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5 - SIZE / 2
    angle, radius = np.arctan2(y, x), np.hypot(x, y)
    edge = 12 + sum(generator.uniform(2, 4) * np.cos(k * angle + generator.uniform(0, 6)) for k in (2, 3, 5, 7))
    inside = (radius < edge)[:, :, None]
    return np.where(inside, np.array(PALETTE["red"]), np.array(PALETTE["white"])).astype(np.uint8)


def test_a_ragged_blob_is_mostly_no_shape() -> None:
    assert sum(read(_blob(seed)).shape is not None for seed in range(40)) <= 10


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a knight in armor",
        "a blue circle",
        "a blue circle on a blue background",
        "a teal circle on a red background",
    ],
)
def test_a_prompt_of_another_world_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="not a prompt"):
        adherent(np.zeros((SIZE, SIZE, 3), np.uint8), prompt)


def test_adherence_needs_shape_and_both_colours() -> None:
    picture = render(Scene("circle", "blue", "gold"), Placing(32, 32, 18))
    assert adherent(picture, "a blue circle on a gold background")
    for other in (
        "a blue square on a gold background",
        "a red circle on a gold background",
        "a blue circle on a red background",
    ):
        assert not adherent(picture, other)


def test_palette_colours_are_far_apart() -> None:
    colours = np.array(list(PALETTE.values()), float)
    distances = np.linalg.norm(colours[:, None] - colours, axis=-1) + 1e9 * np.eye(len(colours))
    assert distances.min() > 100


@pytest.mark.parametrize("scene", SCENES[::31])
def test_scenes_and_prompts_are_the_same_thing(scene: Scene) -> None:
    assert Scene.parse(scene.prompt) == scene
