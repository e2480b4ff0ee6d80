"""The memory that a dry run tells is enough for the run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.measure import measure
from tests.cli.run import mergetool

SHAPES = {"up": (1500, 600), "down": (600, 1500), "q": (600, 600)}
FRESH = {"one": 1, "two": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and two models whose differences to it have directions and noise."""
    folder, dice = tmp_path_factory.mktemp("models"), torch.Generator().manual_seed(0)

    def gaussian(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=dice)

    base = {f"blocks.{i}.{name}.weight": gaussian(*shape) for i in range(3) for name, shape in SHAPES.items()}
    save_file(base, folder / "base.safetensors")
    for name in FRESH:
        change = {
            key: gaussian(len(t), 9) @ gaussian(9, t.shape[1]) + 0.3 * gaussian(*t.shape) for key, t in base.items()
        }
        save_file({key: t + change[key] for key, t in base.items()}, folder / f"{name}.safetensors")
    return folder


DIFF = ("diff", "base.safetensors", "one.safetensors", "--threads", "2")


@pytest.mark.parametrize(
    "words",
    [
        DIFF,
        (*DIFF, "--rank-max", "0", "--rank-thresh", "0.999"),
        (*DIFF, "--rule", "sum"),
        (*DIFF, "--budget", "2MB"),
        (*DIFF, "--variant2", "two.safetensors", "--union"),
        (*DIFF, "--full", "full", "--full-layer", "*.q.weight", "--checkpoint", "baked"),
    ],
    ids=lambda words: " ".join(words[5:]) or "plain",
)
def test_a_difference_stays_below_what_its_dry_run_tells(models: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    stays_below(models, (*words, "-o", str(tmp_path / "out.safetensors")))
    for name in ("full", "baked"):
        (models / f"{name}.safetensors").unlink(missing_ok=True)


@pytest.mark.parametrize("options", [("--rank", "8"), ("--rank-thresh", "0.9"), ("--budget", "1MB"), ()], ids=str)
def test_a_sum_of_loras_stays_below_what_its_dry_run_tells(
    models: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    for name in FRESH:
        path = models / f"{name}-lora.safetensors"
        if not path.exists():
            made = mergetool("diff", "base.safetensors", f"{name}.safetensors", "--rank", 64, "-o", path, cwd=models)
            assert made.code == 0, made.err
    loras = ("one-lora.safetensors", "two-lora.safetensors")
    stays_below(models, ("lora", "merge", *loras, *options, "-o", str(tmp_path / "out.safetensors")))


def stays_below(folder: Path, words: tuple[str, ...]) -> None:
    told = mergetool(*words, "--dry-run", "--json", cwd=folder).json["memory"]
    usage = measure([Path(sys.executable).with_name("mergetool"), *words], cwd=folder)
    assert usage.exit_code == 0
    assert 0 < usage.peak_anon < told


@pytest.mark.parametrize("key_format", ["default", "comfyui", "peft"])
def test_a_conversion_stays_below_what_its_dry_run_tells(tmp_path: Path, key_format: str) -> None:
    tensors = {}
    for part in (f"diffusion_model.layers.{i}.attention.{name}" for i in range(4) for name in ("to_q", "to_k", "to_v")):
        tensors |= {f"{part}.lora_A.weight": torch.ones(64, 3840), f"{part}.lora_B.weight": torch.ones(3840, 64)}
    save_file(tensors, tmp_path / "lora.safetensors")
    output = "out/" if key_format == "peft" else "out.safetensors"
    stays_below(tmp_path, ("lora", "convert", "lora.safetensors", "-o", output, "--key-format", key_format))
