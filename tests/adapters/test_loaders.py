"""Who loads a file: diffusers and ComfyUI are run on every spelling."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from safetensors.torch import load_file, save_file

from mergetool.adapters import open_lora
from mergetool.adapters.loaders import Loading, loading
from mergetool.arch.z_image import REFERENCE_CONFIG, reference_shapes
from tests.adapters.spellings import (
    BLOCK,
    DIM,
    DOWN,
    FFN,
    MATRICES,
    NATIVE,
    SPELLINGS,
    UP,
    A,
    B,
    Written,
    f64,
    fused,
    loha,
    lokr,
    random,
    split,
)
from tests.families import TINY
from tests.oracles import ComfyUI


def native(prefix: str, down: str, up: str, *, flat: bool = False) -> Written:
    """ComfyUI's names of everything but q, k and v."""
    found = split(prefix, down, up, alpha=4, flat=flat)
    wanted = "_attention_out" if flat else ".attention.out"
    renamed = Written(changes={part: c for part, c in found.changes.items() if not re.search(r"to_[qkv]", part)})
    for key, tensor in found.tensors.items():
        if not re.search(r"to_[qkv]", key):
            renamed.tensors[re.sub(r"[._]attention[._]to_out[._]0", wanted, key)] = tensor
    return renamed


def both(fused_prefix: str, split_prefix: str, down: str, up: str, *, flat: bool = False) -> Written:
    """A file with q, k and v once as one and once apart."""
    found = fused(fused_prefix, down, up, flat=flat)
    apart = split(split_prefix, down, up, flat=flat)
    found.tensors |= apart.tensors
    for part, change in apart.changes.items():
        found.changes[part] = found.changes.get(part, 0) + change
    return found


def with_magnitudes(written: Written, ending: str) -> Written:
    for key in [key for key in written.tensors if key.endswith((A, DOWN))]:
        module = key.removesuffix(A).removesuffix(DOWN)
        rows = written.tensors[next(k for k in (module + B, module + UP) if k in written.tensors)].shape[0]
        written.tensors[module + ending] = torch.ones(rows) if "vector" in ending else torch.ones(rows, 1)
    return written


def others(prefix: str, *, flat: bool = False) -> Written:
    """Modulation and refiners, whose names have underscores of their own, and the embedders."""
    found = Written()
    for i, (module, (rows, columns)) in enumerate(
        {
            f"{BLOCK}.adaLN_modulation.0": (4 * DIM, DIM),
            "context_refiner.0.feed_forward.w3": (FFN, DIM),
            "noise_refiner.0.attention.to_out.0": (DIM, DIM),
            "cap_embedder.1": (DIM, 64),
            "all_x_embedder.2-1": (DIM, 64),
            "t_embedder.mlp.0": (1024, 256),
            "all_final_layer.2-1.linear": (64, DIM),
        }.items()
    ):
        a, b = random(2, columns, seed=i), random(rows, 2, seed=50 + i)
        name = prefix + (module.replace(".", "_") if flat else module)
        found.tensors |= {name + DOWN: a, name + UP: b}
        found.changes[module + ".weight"] = f64(b) @ f64(a)
    return found


def joined(one: Written, other: Written) -> Written:
    return Written(one.tensors | other.tensors, one.changes | other.changes)


FILES: dict[str, Callable[[], Written]] = {
    **SPELLINGS,
    "transformer, down and up, no alpha": lambda: split("transformer.", DOWN, UP),
    "transformer, A and B without weight": lambda: split("transformer.", ".lora_A", ".lora_B"),
    "transformer, linear layers": lambda: split(
        "transformer.", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "transformer, joined": lambda: split("transformer.", "_lora.down.weight", "_lora.up.weight"),
    "diffusion_model, A and B without weight": lambda: split("diffusion_model.", ".lora_A", ".lora_B"),
    "transformer, default": lambda: split("transformer.", ".lora_A.default.weight", ".lora_B.default.weight"),
    "diffusion_model, dots": lambda: split("diffusion_model.", ".lora.down.weight", ".lora.up.weight", alpha=3),
    "lora_unet_ with A and B": lambda: split("lora_unet_", A, B, flat=True),
    "lora_unet_ without alpha": lambda: split("lora_unet_", DOWN, UP, flat=True),
    "other modules": lambda: others("diffusion_model."),
    "other modules, underscored": lambda: others("lora_unet_", flat=True),
    "ComfyUI's names, A and B": lambda: native("diffusion_model.", A, B),
    "ComfyUI's names, down and up": lambda: native("diffusion_model.", DOWN, UP),
    "ComfyUI's names, underscored": lambda: native("lora_unet_", DOWN, UP, flat=True),
    "ComfyUI's names after transformer.": lambda: native("transformer.", DOWN, UP),
    "ComfyUI's names, bare": lambda: native("", DOWN, UP),
    "fused and split": lambda: both("diffusion_model.", "diffusion_model.", DOWN, UP),
    "fused and split, underscored": lambda: both("lora_unet_", "lora_unet_", DOWN, UP, flat=True),
    "lycoris_, a LoRA": lambda: split("lycoris_", DOWN, UP, alpha=2, flat=True),
    "lora_transformer_": lambda: split("lora_transformer_", DOWN, UP, alpha=2, flat=True),
    "a whole checkpoint's prefix": lambda: split("model.diffusion_model.", DOWN, UP, alpha=2),
    "transformer, LoKr": lambda: lokr("transformer."),
    "transformer, LoKr, alpha": lambda: lokr("transformer.", decomposed=True, alpha=1.0),
    "bare LoKr": lambda: lokr(""),
    "underscored LoKr": lambda: lokr("lora_unet_", flat=True, decomposed=True, alpha=1.0),
    "LoHa after transformer.": lambda: loha("transformer."),
    "LoKr beside a LoRA": lambda: joined(
        lokr("diffusion_model."), Written({f"diffusion_model.{BLOCK}.attention.to_q{A}": random(4, DIM, seed=1),
        f"diffusion_model.{BLOCK}.attention.to_q{B}": random(DIM, 4, seed=2)},
        {f"{BLOCK}.attention.to_q.weight": f64(random(DIM, 4, seed=2)) @ f64(random(4, DIM, seed=1))})),
    "a whole difference beside a LoRA": lambda: joined(
        others("diffusion_model."), Written({"diffusion_model.cap_embedder.1.diff": random(DIM, 64, seed=3)},
        {"cap_embedder.1.weight": f64(random(DIM, 64, seed=3)) + others("").changes["cap_embedder.1.weight"]})),
    "A and B beside down and up": lambda: joined(split("diffusion_model.", A, B), others("diffusion_model.")),
}  # fmt: skip
DORAS: dict[str, Callable[[], Written]] = {
    "DoRA": lambda: with_magnitudes(split("diffusion_model.", A, B), ".dora_scale"),
    "DoRA, fused": lambda: with_magnitudes(fused("diffusion_model.", DOWN, UP), ".dora_scale"),
    "PEFT's DoRA after transformer.": lambda: with_magnitudes(split("transformer.", A, B), ".lora_magnitude_vector"),
    "PEFT's DoRA after diffusion_model.": lambda: with_magnitudes(
        split("diffusion_model.", A, B), ".lora_magnitude_vector"
    ),
}


def judged(written: Written, folder: Path) -> tuple[Path, list[Loading], set[str]]:
    path = written.save(folder)
    with open_lora(path) as file:
        assert set(file.changes) == set(written.changes)
        return path, loading(file), set(file.changes)


def pipeline() -> ZImagePipeline:
    """A pipeline whose transformer is all zeros, so that fusing a LoRA leaves its change."""
    with torch.device("meta"):
        transformer = ZImageTransformer2DModel.from_config({**REFERENCE_CONFIG, **TINY})
    transformer = transformer.to_empty(device="cpu").requires_grad_(False)
    for parameter in transformer.parameters():
        parameter.zero_()
    return ZImagePipeline(None, None, None, None, transformer)  # type: ignore[arg-type]


def loaded_by_diffusers(path: Path) -> dict[str, np.ndarray] | None:
    """Part -> change, of every module that got a layer; None where diffusers raises an error."""
    found = pipeline()
    folder, name = (path, "adapter_model.safetensors") if path.is_dir() else (path.parent, path.name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found.load_lora_weights(str(folder), weight_name=name)
        except Exception:  # of several classes
            return None
    marks = (".lora_A.default_0", ".lokr_w1", ".lokr_w1_a")
    layers = {
        re.split(r"\.lora_A\.|\.lokr_", name)[0]
        for name, _ in found.transformer.named_parameters()
        if any(mark in name for mark in marks)
    }
    if layers:
        found.fuse_lora()
        found.unload_lora_weights()
    state = found.transformer.state_dict()
    return {f"{layer}.weight": state[f"{layer}.weight"].double().numpy() for layer in layers}


@pytest.mark.parametrize("spelling", FILES)
def test_diffusers_loads_the_parts_that_are_said_and_no_other(tmp_path: Path, spelling: str) -> None:
    written = FILES[spelling]()
    path, (diffusers, _), parts = judged(written, tmp_path)
    found = loaded_by_diffusers(path)
    assert (found is None) == (diffusers.error is not None), diffusers.error
    right = {
        part
        for part, change in (found or {}).items()
        # the scale is multiplied into bf16 factors
        if np.allclose(change, written.changes[part], rtol=2**-6, atol=2**-6 * np.abs(written.changes[part]).max())
    }
    assert right == parts - set(diffusers.dropped)
    assert diffusers.applied == len(right)


@pytest.mark.parametrize("spelling", DORAS)
def test_diffusers_loses_the_magnitudes_that_are_said(tmp_path: Path, spelling: str) -> None:
    path, (diffusers, _), parts = judged(DORAS[spelling](), tmp_path)
    found = pipeline()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found.load_lora_weights(str(path.parent), weight_name=path.name)
        except Exception:  # of several classes
            assert diffusers.error
            return
    assert diffusers.error is None
    names = [name for name, _ in found.transformer.named_parameters()]
    layers = {name.split(".lora_A.")[0] + ".weight" for name in names if ".lora_A." in name}
    magnitudes = {name.split(".lora_mag")[0] + ".weight" for name in names if "lora_magnitude_vector" in name}
    reasons = diffusers.dropped
    assert {part for part, reason in reasons.items() if "magnitudes" in reason} == layers - magnitudes
    assert parts - set(reasons) == magnitudes


@pytest.fixture(scope="session")
def zeros(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without values, so that a LoRA's changes are what is there afterwards."""
    path = tmp_path_factory.mktemp("zeros") / "zeros.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in reference_shapes(TINY, "comfyui").items()}, path)
    return path


def added_by_comfyui(comfyui: ComfyUI, zeros: Path, lora: Path) -> Callable[[str], np.ndarray]:
    """What ComfyUI adds to a part, by its own map of names."""
    if lora.is_dir():
        lora = lora / "adapter_model.safetensors"
    names = comfyui.ask("names", model=zeros)["names"]
    comfyui.ask("patch", model=zeros, lora=lora, out=lora.with_name("patched.safetensors"))
    added = load_file(lora.with_name("patched.safetensors"))

    def of(part: str) -> np.ndarray:
        module, leaf = part.rsplit(".", 1)
        target, start, length = names.get(f"diffusion_model.{module}", (f"diffusion_model.{part}", None, None))
        stored = added[target.removeprefix("diffusion_model.").removesuffix("weight") + leaf]
        return f64(stored if start is None else stored[start : start + length])

    return of


@pytest.mark.parametrize("spelling", FILES)
def test_comfyui_adds_what_is_said(tmp_path: Path, spelling: str, comfyui: ComfyUI, zeros: Path) -> None:
    written = FILES[spelling]()
    path, (_, program), parts = judged(written, tmp_path)
    added = added_by_comfyui(comfyui, zeros, path)
    right = {
        part
        for part in parts
        # float32 sums of up to 16 products
        if added(part).any()
        and np.abs(added(part) - written.changes[part]).max() < 2**-19 * np.abs(written.changes[part]).max()
    }
    assert right == parts - set(program.dropped)  # of fused and split keys, the sum


def test_pad_tokens_are_taken_by_comfyui_and_not_applied(tmp_path: Path, comfyui: ComfyUI, zeros: Path) -> None:
    written = Written({"diffusion_model.x_pad_token.diff": random(1, DIM, seed=1)}, {"x_pad_token": np.zeros((1, DIM))})
    path, (diffusers, program), _ = judged(written, tmp_path)
    assert program.verdict == "not at all"
    assert "without being applied" in program.dropped["x_pad_token"]
    assert diffusers.error
    answer = comfyui.ask("patch", model=zeros, lora=path, out=tmp_path / "patched.safetensors")
    assert (answer["log"], answer["patched"]) == ([], ["diffusion_model.x_pad_token"])
    assert not load_file(tmp_path / "patched.safetensors")["x_pad_token"].any()


def test_of_another_family_nothing_is_said(tmp_path: Path) -> None:
    written = Written({f"unet.down.{x}.weight": random(4, 4, seed=1) for x in ("lora_A", "lora_B")})
    with open_lora(written.save(tmp_path)) as file:
        assert loading(file) == []


def test_the_words_are_those_of_the_command(tmp_path: Path) -> None:
    verdicts = partial(Loading, "x", error=None)
    assert verdicts(2, {}).verdict == "whole"
    assert verdicts(1, {"a": "why"}).verdict == "partly"
    assert verdicts(0, {"a": "why"}).verdict == "not at all"


assert set(NATIVE) <= {name.split(".", 2)[2] for name in MATRICES}
