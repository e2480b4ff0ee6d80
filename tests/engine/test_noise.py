"""The measured noise of a quantised model is what quantising it added, known here from the original."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from mergetool import models
from mergetool.engine import noise
from mergetool.recipe.steps import Input
from tests.families import TINY, checkpoint
from tests.quant.ggml import Q
from tests.quant.models import as_gguf, is_large, quantised


def measured(path: Path) -> float | None:
    with models.open_model(str(path)) as opened:
        return noise.measure(Input("m", opened.checkpoint, opened.anatomy))


def added(source: Path, values: dict[str, np.ndarray]) -> float:
    """Relative RMS error of the large matrices."""
    wrong = total = 0.0
    for name, tensor in load_file(source).items():
        if is_large(name, tensor):
            exact = tensor.float().numpy().astype(np.float64)
            wrong += float(np.square(values[name] - exact).sum())
            total += float(np.square(exact).sum())
    return float(np.sqrt(wrong / total))


@pytest.mark.parametrize("container", ["fp8", "old fp8", "fp8 rows", "nvfp4", "mxfp8", "int8", "convrot"])
def test_noise_is_what_quantising_added(tmp_path: Path, container: str) -> None:
    source = checkpoint(tmp_path / "x.safetensors", variant=1)
    values = quantised(tmp_path / "q.safetensors", source, container)
    # Block scales put the largest of 16 values almost on a code, which the steps do not know: 15 % too much for nvfp4.
    assert measured(tmp_path / "q.safetensors") == pytest.approx(added(source, values), rel=0.2)


@pytest.mark.parametrize("kind", [Q.Q8_0, Q.Q4_0, Q.Q4_K], ids=lambda kind: kind.name)
def test_noise_of_gguf_blocks_is_about_what_quantising_added(tmp_path: Path, kind: Q) -> None:
    wide = {**TINY, "dim": 256, "n_heads": 8}
    source = checkpoint(tmp_path / "x.safetensors", variant=1, config=wide)
    values = as_gguf(tmp_path / "q.gguf", source, kind)
    assert measured(tmp_path / "q.gguf") == pytest.approx(added(source, values), rel=0.35)


def test_a_plain_model_has_none(tmp_path: Path) -> None:
    assert measured(checkpoint(tmp_path / "x.safetensors")) is None
