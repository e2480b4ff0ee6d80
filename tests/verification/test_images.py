"""What pictures measure: on pictures whose figures are known."""

from __future__ import annotations

import numpy as np
import pytest

from mergetool.lab.world import SCENES, Placing, render
from mergetool.verification.images import Picture, colour_distance, measure, psnr, structural_distance


def noise(seed: int, size: int = 64) -> Picture:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def drawn(seed: int) -> Picture:
    generator = np.random.default_rng(seed)
    return render(SCENES[generator.integers(len(SCENES))], Placing.random(generator))


@pytest.mark.parametrize("size", [64, 128, 250])
def test_white_noise_has_no_structure(size: int) -> None:
    found = measure(noise(0, size))
    assert abs(found.structure) < 0.15  # 240 pairs of tiles of 3 values: a standard error of 0.04
    assert found.noise


def test_structure_is_the_correlation_of_neighbouring_tiles() -> None:
    picture = noise(3, 32)
    tiles = picture.astype(np.float64).reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))
    centred = tiles - tiles.mean(axis=(0, 1))

    def cosine(one: np.ndarray, other: np.ndarray) -> float:
        return float(one.ravel() @ other.ravel() / np.linalg.norm(one) / np.linalg.norm(other))

    wanted = max(cosine(centred[1:], centred[:-1]), cosine(centred[:, 1:], centred[:, :-1]))
    assert measure(picture).structure == pytest.approx(wanted)


@pytest.mark.parametrize("turned", [False, True])
def test_stripes_are_no_noise(turned: bool) -> None:
    scenes = [render(scene, Placing(32, 32, 18), striped=True, hollow=True) for scene in SCENES[::20]]
    assert not any(measure(np.ascontiguousarray(p.swapaxes(0, 1)) if turned else p).noise for p in scenes)


@pytest.mark.parametrize("seed", range(10))
def test_a_drawn_picture_has_structure_and_contrast(seed: int) -> None:
    found = measure(drawn(seed))
    assert found.structure > 0.75
    assert found.contrast > 15


def test_a_flat_picture_has_neither_contrast_nor_structure() -> None:
    found = measure(np.full((64, 64, 3), 130, np.uint8))
    assert (found.structure, found.contrast, found.clipped) == (0.0, 0.0, 0.0)


def test_a_burnt_picture_is_clipped() -> None:
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, 32:] = 255
    assert measure(picture).clipped == 1.0


def test_colour_distance_is_that_of_the_histograms() -> None:
    red, blue = np.zeros((2, 16, 16, 3), np.uint8)
    red[..., 0], blue[..., 2] = 200, 200
    half = red.copy()
    half[:8] = blue[:8]
    assert colour_distance(red, red) == 0.0
    assert colour_distance(red, blue) == 1.0
    assert colour_distance(red, half) == pytest.approx(0.5)


def test_structural_distance_is_zero_for_equal_pictures_and_near_one_for_noise() -> None:
    picture = drawn(3)
    assert structural_distance(picture, picture) == pytest.approx(0.0, abs=1e-12)
    assert structural_distance(noise(1), noise(2)) > 0.8


def test_structural_distance_grows_with_noise() -> None:
    picture = drawn(4)
    generator = np.random.default_rng(0)
    distances = [
        structural_distance(
            picture, np.clip(picture + generator.normal(0, sigma, picture.shape), 0, 255).astype(np.uint8)
        )
        for sigma in (0, 5, 20, 80)
    ]
    assert distances == sorted(distances)


def test_pictures_of_different_size_are_not_compared() -> None:
    with pytest.raises(ValueError, match="one size"):
        structural_distance(noise(0, 64), noise(0, 128))


def test_psnr_is_that_of_the_mean_square_error() -> None:
    picture = np.full((8, 8, 3), 100, np.uint8)
    assert psnr(picture, picture + 10) == pytest.approx(20 * np.log10(255 / 10))
    assert psnr(picture, picture) == float("inf")
