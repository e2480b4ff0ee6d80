"""What pictures measure: on pictures whose figures are known."""

from __future__ import annotations

import numpy as np
import pytest

from mergetool.lab.world import SCENES, Placing, render
from mergetool.verification.images import Pixels, colour_distance, measure, outside, psnr, structural_distance


def noise(seed: int, size: int = 64) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def drawn(seed: int) -> Pixels:
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


def glaring(seed: int) -> Pixels:
    """Blocks of 8 x 4 pixels at both ends of the scale, in rows that alternate, blurred a little: what a merge at 20 times a right factor draws."""
    generator = np.random.default_rng(seed)
    rows = np.where(np.arange(16)[:, None] % 2, 235.0, 20.0) + generator.normal(0, 90, (16, 8))
    grey = np.repeat(np.repeat(rows, 4, axis=0), 8, axis=1)
    return np.clip(grey[..., None] + generator.normal(0, 20, (64, 64, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("seed", range(5))
def test_glaring_blocks_are_noise_though_neighbouring_tiles_agree(seed: int) -> None:
    found = measure(glaring(seed))
    assert found.structure > 0.6
    assert found.noise


def test_roughness_is_1_of_white_noise_and_small_of_a_surface() -> None:
    assert measure(noise(1, 128)).roughness == pytest.approx(1, abs=0.05)
    assert measure(drawn(1)).roughness < 0.1


def test_saturation_is_the_spread_of_a_pixels_colours() -> None:
    assert measure(np.full((64, 64, 3), (255, 0, 51), np.uint8)).saturation == 1.0
    assert measure(np.full((64, 64, 3), 90, np.uint8)).saturation == 0.0


def test_pictures_that_leave_the_range_of_the_usual_ones_are_outside() -> None:
    usual = [measure(drawn(seed)) for seed in range(12)]
    assert outside([measure(drawn(seed)) for seed in range(50, 62)], usual).count(True) <= 2
    assert all(outside([measure(glaring(seed)) for seed in range(5)], usual))


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
