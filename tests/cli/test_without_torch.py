"""Commands where torch is missing or broken: what needs none gives the same bytes, and what needs it says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mergetool import packages
from tests import absent
from tests.families import checkpoint

MERGE = "alk.safetensors + 0.5*(a.safetensors - b.safetensors)"
MADE = {
    "merge.safetensors": ["merge", MERGE],
    "half.safetensors": ["merge", MERGE, "--dtype", "fp16", "--measure", "all"],
    "feedback.safetensors": ["merge", MERGE, "--rounding", "error-feedback"],
    "stochastic.safetensors": ["merge", MERGE, "--rounding", "stochastic", "--dtype", "fp8_e4m3"],
    "mixed.safetensors": [
        "merge",
        "weighted_sum(alk.safetensors, a.safetensors, alpha=0.25)",
        "--from",
        "alk.safetensors",
    ],
    "fp8.safetensors": ["convert", "a.safetensors", "--quant", "fp8-scaled"],
    "int8.safetensors": ["convert", "a.safetensors", "--quant", "int8"],
    "nvfp4.safetensors": ["convert", "b.safetensors", "--quant", "nvfp4"],
    "wide.safetensors": ["convert", "fp8.safetensors", "--dtype", "fp32"],
    "quantised.safetensors": ["merge", "fp8.safetensors + 0.5*(int8.safetensors - nvfp4.safetensors)"],
}
"""What is made, in this order."""
SAID = [
    ["inspect", "a.safetensors", "--json"],
    ["compare", "a.safetensors", "quantised.safetensors", "--json"],
    ["models", "list", "--json"],
    ["methods", "--json"],
    ["methods", "ties"],
]
NEEDS_TORCH = {
    "merge methods": ["merge", "ties(a.safetensors, b.safetensors, base=alk.safetensors)", "-o", "none.safetensors"],
    "merge methods, such as ties, of a dry run": ["merge", "ties(a.safetensors, b.safetensors, base=alk.safetensors)", "--dry-run"],
    "differences": ["diff", "a.safetensors", "b.safetensors", "-o", "none.safetensors"],
    "LoRAs": ["lora", "bake", "a.safetensors", "lora.safetensors", "-o", "none.safetensors"],
    "sums of LoRAs": ["lora", "merge", "lora.safetensors", "lora.safetensors", "-o", "none.safetensors"],
    "a GPU": ["merge", MERGE, "--device", "cuda", "-o", "none.safetensors"],
}  # fmt: skip


def family(folder: Path) -> Path:
    """Three fine-tunes of one base."""
    folder.mkdir()
    for seed, name in enumerate(["alk", "a", "b"]):
        checkpoint(folder / f"{name}.safetensors", variant=seed)
    return folder


@pytest.fixture(scope="module")
def with_torch(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The files made, and what is said, where all packages are there."""
    place = tmp_path_factory.mktemp("with")
    folder = family(place / "models")
    lines = [*([*line, "-o", name] for name, line in MADE.items()), *SAID]
    ended, _ = absent.commands(lines, folder, absent.environment(place))
    assert [each.code for each in ended] == [0] * len(lines), [each.err for each in ended]
    return folder, [each.out for each in ended[len(MADE) :]]


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "no kernels"])
@pytest.mark.parametrize("how", ["absent", "broken"])
def test_what_needs_no_torch_gives_the_same_without(
    how: str, kernels: bool, with_torch: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """Byte for byte, in reports too, but for sums whose last digits depend on the kernels."""
    given, said = with_torch
    folder = family(tmp_path / "models")
    lines = [*([*line, "-o", name] for name, line in MADE.items()), *SAID]
    env = absent.environment(tmp_path, **{how: ["torch"]})  # type: ignore[arg-type]
    ended, modules = absent.commands(lines, folder, env, kernels=kernels)
    assert [each.code for each in ended] == [0] * len(lines), [each.err for each in ended]
    assert "torch" not in modules
    for name in MADE:
        assert (folder / name).read_bytes() == (given / name).read_bytes(), name
    found = [each.out.replace(str(folder), str(given)) for each in ended[len(MADE) :]]
    if not kernels:
        assert_close(json.loads(found[1]), json.loads(said[1]))
        found[1] = said[1]
    assert found == said


def assert_close(found: object, wanted: object) -> None:
    """Two reports that differ in no number by more than one in a hundred thousand, and in nothing else."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        assert list(found) == list(wanted)
        for key, value in wanted.items():
            assert_close(found[key], value)
    elif isinstance(wanted, list) and isinstance(found, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_close(one, other)
    else:
        assert found == (pytest.approx(wanted, rel=1e-5, abs=1e-9) if isinstance(wanted, float) else wanted)


@pytest.mark.parametrize("how", ["absent", "broken"])
def test_what_needs_torch_says_so_in_a_sentence_and_writes_nothing(how: str, tmp_path: Path) -> None:
    folder = family(tmp_path / "models")
    lora = ["diff", "a.safetensors", "b.safetensors", "--rank-max", "4", "-o", "lora.safetensors"]
    made, _ = absent.commands([lora], folder, absent.environment(tmp_path))
    assert made[0].code == 0, made[0].err
    before = sorted(folder.iterdir())
    env = absent.environment(tmp_path, **{how: ["torch"]})  # type: ignore[arg-type]
    ended, _ = absent.commands(list(NEEDS_TORCH.values()), folder, env)
    torch = packages.named("torch")
    begin, mend = (
        ("mergetool: the package torch is not installed, which ", packages.install(torch))
        if how == "absent"
        else (
            "mergetool: the package torch is installed and cannot be imported (OSError: lib",
            packages.reinstall(torch),
        )
    )
    for what, each in zip(NEEDS_TORCH, ended, strict=True):
        assert each.code == 69, (what, each)
        assert each.err.startswith(begin), (what, each.err)
        assert each.err.endswith(f": {mend}\n"), (what, each.err)
        assert each.err.count("\n") == 1, (what, each.err)
    assert sorted(folder.iterdir()) == before
