"""Heat maps: rows and columns, shades in a terminal, pictures that are the same every time."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from mergetool.comparison import heatmap, plots
from mergetool.comparison.energies import Distance, Energies
from mergetool.comparison.heatmap import HeatMap


def part(name: str, *groups: str, base: float = 1.0, delta: float = 0.0) -> Distance:
    return Distance(name, frozenset(groups), Energies(1, base=base, delta=delta))


def test_rows_are_blocks_columns_kinds_and_cells_relative_distances() -> None:
    heat = heatmap.of_distances(
        [
            part("t_embedder.mlp.0.weight", "embedder", delta=0.25),
            part("layers.2.attention.to_q.weight", "layers", "attention", "q", delta=0.01),
            part("layers.10.feed_forward.w1.weight", "layers", "ffn", base=3.0, delta=0.0),
            part("layers.10.feed_forward.w2.weight", "layers", "ffn", base=1.0, delta=0.04),
            part("layers.10.ffn_norm1.weight", "layers", "norm"),
        ]
    )
    assert heat.blocks == ("t_embedder", "layers.2", "layers.10")
    assert heat.kinds == ("q", "ffn", "norm", "other")
    nan = np.nan
    wanted = [[nan, nan, nan, 0.5], [0.1, nan, nan, nan], [nan, 0.1, 0.0, nan]]
    np.testing.assert_allclose(heat.values, wanted)


def test_shades_are_logarithmic_with_nothing_zero_and_infinity_apart() -> None:
    values = np.array([[0.001, 0.01, 0.0999, 0.1], [np.nan, 0.0, np.inf, 0.003]])
    heat = HeatMap(("a", "b"), ("q", "k", "v", "out"), values)
    assert heat.shades() == ["·▒██", " 0!░"]
    assert heat.shades(heatmap.PLAIN_SHADES) == [".+##", " 0!-"]
    assert [round(value, 5) for _, value in heat.steps()] == [0.001, 0.00251, 0.00631, 0.01585, 0.03981]


def test_equal_values_and_no_values_have_a_shade_too() -> None:
    assert HeatMap(("a",), ("q", "k"), np.array([[0.5, 0.5]])).shades() == ["··"]
    assert HeatMap(("a",), ("q",), np.array([[0.0]])).shades() == ["0"]


def test_a_picture_is_the_same_bytes_every_time_and_darkest_where_least_changed(tmp_path: Path) -> None:
    heat = HeatMap(("layers.0", "a $b_ \x1b[2J"), ("q", "k"), np.array([[0.001, 0.1], [np.nan, 0.0]]))
    for name in ("one.png", "two.png"):
        plots.write_png(tmp_path / name, heat, label="relative distance", title="$x - \x1b y")
    raw = (tmp_path / "one.png").read_bytes()
    assert raw == (tmp_path / "two.png").read_bytes()
    pixels = {tuple(colour) for colour in np.array(Image.open(io.BytesIO(raw)).convert("RGB")).reshape(-1, 3).tolist()}
    assert {(68, 1, 84), (253, 231, 37), (217, 217, 217)} <= pixels  # viridis' ends, and grey for zero
    svg = plots.svg(heat, label="relative distance")
    assert svg == plots.svg(heat, label="relative distance")
    assert svg.startswith("<svg")
    assert "\x1b" not in svg
