"""Command lines that are nearly right: the error offers the one that is, before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.run import mergetool
from tests.families import checkpoint


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["merge", "a.safetensors", "b.safetensors"], '"0.5*a.safetensors + 0.5*b.safetensors" is their mean'),
        (["merge", "a", "+", "b", "-", "c"], 'write "a + b - c"'),
        (["merge", "a", "+", "b"], "0.5*a + 0.5*b"),
        (["lora", "bake", "m", "l.safetensors", "0.8"], 'write "l.safetensors:0.8"'),
        (["lora", "bake", "m", "l.safetensors", "0,8"], 'write "l.safetensors:0.8"'),
        (["lora", "bake", "m", "l.safetensors:0,8"], 'write "l.safetensors:0.8"'),
        (["lora", "merge", "l.safetensors", "k.safetensors", "30%"], 'write "k.safetensors:0.3"'),
        (["lora", "merge", "l.safetensors:-30%", "k.safetensors"], 'write "l.safetensors:-0.3"'),
        (["convert", "m"], "--dry-run"),
    ],
)
def test_the_line_that_works_is_offered(tmp_path: Path, words: list[str], offered: str) -> None:
    output = [] if words[0] == "convert" else ["-o", "x.safetensors"]
    ran = mergetool(*words, *output, cwd=tmp_path)
    assert ran.code == 2
    assert offered in ran.err
    assert len(ran.err.splitlines()) == 1


def test_a_lora_given_as_a_model_is_told_how_it_is_added(tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    rows = {f"diffusion_model.layers.0.attention.out.lora_{side}.weight": np.zeros((4, 4), "f4") for side in "AB"}
    save_file(rows, tmp_path / "l.safetensors")
    ran = mergetool("merge", "l.safetensors", "-o", "x.safetensors", cwd=tmp_path)
    assert ran.code == 65
    assert 'lora bake MODEL "l.safetensors"' in ran.err
    assert 'lora("l.safetensors")' in ran.err


def test_a_dry_run_of_convert_writes_nothing_and_says_what_it_would(tmp_path: Path) -> None:
    checkpoint(tmp_path / "m.safetensors")
    ran = mergetool("convert", "m.safetensors", "--dtype", "fp32", "--dry-run", "--json", cwd=tmp_path)
    assert ran.code == 0
    assert set(ran.json["tensors"].values()) == {"fp32"}
    assert ran.json["bytes_to_write"] > (tmp_path / "m.safetensors").stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize(
    "options",
    [
        ["--reader", "bogus"],
        ["--measure", "nonsense"],
        ["--nonfinite", "maybe"],
        ["--device", "tpu"],
        ["--gpu-memory", "lots"],
    ],
)
def test_a_recipes_options_are_checked_when_nothing_is_to_be_made(family: Path, options: list[str]) -> None:
    (family / "r.yaml").write_text(
        "{models: {alk: alk.safetensors, a: a.safetensors, b: b.safetensors}, merge: alk + 0.5*(a - b), output: o.safetensors}"
    )
    assert mergetool("merge", "r.yaml", "--force", cwd=family).code == 0
    ran = mergetool("merge", "r.yaml", *options, cwd=family)
    assert ran.code == 2
    assert options[1] in ran.err
