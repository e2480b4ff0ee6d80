"""Files of one model under other names, and files that are not of one model, in every command that takes two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.run import mergetool

NAMES = [
    "double_blocks.0.img_attn.qkv.weight",
    "double_blocks.0.img_attn.norm.key_norm.scale",
    "img_in.weight",
    "img_in.bias",
    "txt_in.weight",
    "x.weight",
]


def flux(seed: int, near: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """A few tensors of Flux by ComfyUI's names, or some that lie near others."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(40,) if name.endswith(("scale", "bias")) else (40, 40) for name in NAMES]
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in zip(NAMES, shapes, strict=True)}
    return drawn if near is None else {name: near[name] + 0.1 * value for name, value in drawn.items()}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``a`` bare, ``b`` near it under a prefix with the norm's other name, ``d`` under names of another layout."""
    monkeypatch.chdir(tmp_path)
    a = flux(0)
    b = {f"model.diffusion_model.{name.replace('.scale', '.weight')}": value for name, value in flux(1, a).items()}
    save_file(a, "a.safetensors")
    save_file(b | {"vae.decoder.conv_in.bias": torch.ones(3)}, "b.safetensors")
    save_file(
        {
            name.replace("double_blocks", "transformer_blocks")
            .replace("_in.", "_embedder.")
            .replace("x.w", "proj_out.w"): value
            for name, value in flux(2, a).items()
        },
        "d.safetensors",
    )
    return tmp_path


def test_a_prefix_is_put_on_replaced_and_taken_off_and_never_doubled(here: Path) -> None:
    before = load_file("a.safetensors")
    for at, (source, prefix) in enumerate(
        [("a", "net."), ("0", "model.diffusion_model."), ("1", "model.diffusion_model."), ("2", "")]
    ):
        ran = mergetool("convert", f"{source}.safetensors", "-o", f"{at}.safetensors", "--prefix", prefix, cwd=here)
        assert ran.code == 0, ran.err
        after = load_file(here / f"{at}.safetensors")
        assert after.keys() == {prefix + name for name in before}
        assert all(torch.equal(after[prefix + name], before[name]) for name in before)


def test_an_unknown_layout_and_a_prefix_without_a_dot_are_refused(here: Path) -> None:
    ran = mergetool("convert", "a.safetensors", "-o", "out.safetensors", "--layout", "comfyui", cwd=here)
    assert ran.code == 2
    assert 'no layout "comfyui" of generic models' in ran.err
    ran = mergetool("convert", "a.safetensors", "-o", "out.safetensors", "--prefix", "net", cwd=here)
    assert ran.code == 2
    assert 'write --prefix "net."' in ran.err
    assert not (here / "out.safetensors").exists()


def test_a_merge_keeps_the_first_models_own_names(here: Path) -> None:
    a, b = load_file("a.safetensors"), load_file("b.safetensors")
    for first, second, own in (("a", "b", a), ("b", "a", b)):
        ran = mergetool(
            "merge",
            f"{first}.safetensors + 0.5*({second}.safetensors - {first}.safetensors)",
            "-o",
            "m.safetensors",
            "--overwrite",
            cwd=here,
        )
        assert ran.code == 0, ran.err
        assert load_file("m.safetensors").keys() == own.keys()
    found = load_file("m.safetensors")
    for name, value in a.items():
        stored = f"model.diffusion_model.{name.replace('.scale', '.weight')}"
        assert torch.equal(found[stored], b[stored] + 0.5 * (value - b[stored]))
    assert torch.equal(found["vae.decoder.conv_in.bias"], b["vae.decoder.conv_in.bias"])


@pytest.mark.parametrize(
    "command",
    [
        ("merge", "0.5*a.safetensors + 0.5*d.safetensors", "-o", "out.safetensors"),
        ("merge", "a.safetensors + 0.5*(b.safetensors - d.safetensors)", "-o", "out.safetensors"),
        ("compare", "a.safetensors", "d.safetensors"),
        ("compare", "a.safetensors", "b.safetensors", "--reference", "d.safetensors"),
        ("diff", "--base", "a.safetensors", "--variant", "d.safetensors", "-o", "out.safetensors"),
    ],
)
def test_two_layouts_are_refused_with_a_tensor_of_each(here: Path, command: tuple[str, ...]) -> None:
    ran = mergetool(*command, cwd=here)
    assert ran.code == 65
    assert '"double_blocks.0.img_attn.qkv.weight"' in ran.err
    assert '"img_embedder.weight"' in ran.err
    assert not (here / "out.safetensors").exists()


def test_compare_and_diff_take_both_prefixes(here: Path) -> None:
    ran = mergetool("compare", "a.safetensors", "b.safetensors", "--json", cwd=here)
    assert ran.code == 0, ran.err
    assert len(ran.json["parts"]) == len(NAMES)
    ran = mergetool(
        "diff", "--base", "a.safetensors", "--variant", "b.safetensors", "-o", "l.safetensors", "--rank", "4", cwd=here
    )
    assert ran.code == 0, ran.err
    assert len([name for name in load_file("l.safetensors") if "lora_A" in name]) == 4
    ran = mergetool("lora", "bake", "b.safetensors", "l.safetensors", "-o", "baked.safetensors", cwd=here)
    assert ran.code == 0, ran.err


def test_a_large_share_that_did_not_meet_is_said(here: Path) -> None:
    b = load_file("b.safetensors")
    save_file({name: value for name, value in b.items() if "x.weight" not in name}, "less.safetensors")
    for command in (
        ("merge", "a.safetensors + (less.safetensors - b.safetensors)", "-o", "out.safetensors"),
        ("compare", "a.safetensors", "less.safetensors"),
    ):
        ran = mergetool(*command, cwd=here)
        assert ran.code == 0, ran.err
        assert "25 % of the parameters of a.safetensors are not in less.safetensors" in ran.out


def test_a_copy_is_no_merge_that_met_nothing(here: Path) -> None:
    ran = mergetool("merge", "1*a.safetensors", "-o", "out.safetensors", cwd=here)
    assert ran.code == 0, ran.err
    assert "copied" in ran.out


def test_a_part_of_another_shape_is_kept_from_whichever_model_is_named(here: Path) -> None:
    a = load_file("a.safetensors")
    save_file(a | {"img_in.weight": torch.cat([a["img_in.weight"]] * 2, 1)}, "inpaint.safetensors")
    expression = "a.safetensors + (inpaint.safetensors - a.safetensors)"
    ran = mergetool("merge", expression, "-o", "m.safetensors", cwd=here)
    assert ran.code == 65
    assert '--exclude "img_in.weight"' in ran.err
    for options, columns in (((), 40), (("--from", "inpaint.safetensors"), 80)):
        ran = mergetool(
            "merge", expression, "-o", "m.safetensors", "--overwrite", "--exclude", "img_in.weight", *options, cwd=here
        )
        assert ran.code == 0, ran.err
        assert load_file("m.safetensors")["img_in.weight"].shape == (40, columns)


def test_do_not_differ_is_only_said_where_no_element_differs(here: Path) -> None:
    a = load_file("a.safetensors")
    tall = {f"blocks.{n}.weight": torch.ones(200, 512) for n in range(3)}
    other = {name: value.clone() for name, value in tall.items()}
    other["blocks.1.weight"][0, 0] = 2.0  # the sample takes the middle rows
    save_file(tall, "one.safetensors")
    save_file(other, "two.safetensors")
    save_file(a, "same.safetensors")
    assert "do not differ" not in mergetool("compare", "one.safetensors", "two.safetensors", cwd=here).out
    assert "do not differ" in mergetool("compare", "a.safetensors", "same.safetensors", cwd=here).out
