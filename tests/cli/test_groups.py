"""What ``--set`` shows of itself: beside every tensor of a dry run, in --json, and the presets of ``inspect``."""

from __future__ import annotations

from pathlib import Path

from mergetool.arch.families.z_image import Z_IMAGE
from tests.cli.run import mergetool

MERGE = "'alk.safetensors' + 20*('a.safetensors' - 'b.safetensors')"
SETTINGS = (
    "--set",
    "preset:late-layers",
    "--set",
    "layers=linear(0.5,1)",
    "--set",
    "layers.q=2",
    "--set",
    "layers.v=0",
)


def test_a_dry_run_has_the_multiplier_beside_every_tensor(family: Path) -> None:
    lines = mergetool("merge", MERGE, *SETTINGS, "--dry-run", cwd=family).out.splitlines()
    assert any(
        line.strip() == "set *=0, layers=linear(0,1), layers=linear(0.5,1), layers.q=2, layers.v=0" for line in lines
    )
    shown = {line.split()[0]: line.split("  ")[-1] for line in lines if "weight" in line}
    assert shown["layers.0.feed_forward.w1.weight"] == "x 0.5"
    assert shown["layers.1.feed_forward.w1.weight"] == "merged"
    assert shown["x_embedder.weight"] == "--set to 0"
    (fused,) = (line for line in lines if "layers.0.attention.qkv.weight" in line)
    assert fused.endswith("merged, --set to 0  to_q x 2  to_k x 0.5  to_v x 0")


def test_json_has_the_multiplier_of_every_part(family: Path) -> None:
    plan = mergetool("merge", MERGE, *SETTINGS, "--dry-run", "--json", cwd=family).json
    found = {step["part"]: step["multiplier"] for tensor in plan["tensors"] for step in tensor["steps"]}
    assert found["layers.0.attention.to_q.weight"] == 2
    assert found["layers.0.attention.to_k.weight"] == 0.5
    assert found["layers.1.attention.to_k.weight"] == 1
    assert found["layers.1.attention.to_v.weight"] == 0
    assert found["noise_refiner.0.attention.to_q.weight"] == 0


def test_inspect_lists_the_presets(family: Path) -> None:
    printed = mergetool("inspect", "alk.safetensors", cwd=family).out
    for preset in Z_IMAGE.presets:
        assert f"--set preset:{preset.name}  {', '.join(preset.settings)}" in printed
