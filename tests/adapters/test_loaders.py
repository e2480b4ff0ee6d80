"""Who loads a file: diffusers is run on every spelling, ComfyUI's mapping is written down once more, from the model's names on."""

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


ENDINGS = [
    (".lora_up.weight", ".lora_down.weight"), ("_lora.up.weight", "_lora.down.weight"),
    (".lora_B.weight", ".lora_A.weight"), (".lora_B", ".lora_A"), (".lora_B.default.weight", ".lora_A.default.weight"),
    (".lora.up.weight", ".lora.down.weight"), (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
]  # fmt: skip
HADAMARD = [".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b"]


def comfyui_map() -> dict[str, tuple[str, slice]]:
    """Every name of a module that ComfyUI knows -> the stored tensor and the rows of it, as its Lumina2 branch lists them."""
    known: dict[str, tuple[str, slice]] = {}
    for name in reference_shapes(TINY, "comfyui"):
        module = name.removesuffix(".weight")
        known[f"diffusion_model.{module}"] = name, slice(None)
        if name.endswith(".weight"):
            known["lora_unet_" + module.replace(".", "_")] = name, slice(None)
    tops = {"all_x_embedder.2-1.": "x_embedder.", "all_final_layer.2-1.": "final_layer."}
    for name in reference_shapes(TINY, "diffusers"):
        if not name.endswith(".weight"):
            continue
        module, rows, target = name.removesuffix(".weight"), slice(None), name
        for i, letter in enumerate("qkv"):
            if module.endswith(f".to_{letter}"):
                target = module.removesuffix(f"to_{letter}") + "qkv.weight"
                rows = slice(i * DIM, (i + 1) * DIM)
        for theirs, ours in {**NATIVE, "attention.norm_q": "attention.q_norm", **tops}.items():
            target = target.replace(theirs, ours)
        for spelled in (
            f"diffusion_model.{module}",
            f"transformer.{module}",
            module,
            "lycoris_" + module.replace(".", "_"),
        ):
            known[spelled] = target, rows
    return known


def loaded_by_comfyui(written: Written) -> dict[str, np.ndarray]:
    """What is added to each stored tensor: the alpha is a tensor beside the factors or 1 is the scale, whatever a config says."""
    shapes, tensors = reference_shapes(TINY, "comfyui"), written.tensors
    added = {name: np.zeros(shape) for name, shape in shapes.items()}
    for name, (target, rows) in comfyui_map().items():
        get = tensors.get
        alpha = float(tensors[f"{name}.alpha"]) if f"{name}.alpha" in tensors else None

        def scale(rank: int, alpha: float | None = alpha) -> float:
            return 1.0 if alpha is None else alpha / rank

        for up, down in ENDINGS:
            if name + up in tensors and name + down in tensors:
                b, a = f64(tensors[name + up]), f64(tensors[name + down])
                added[target][rows] += b @ a * scale(len(a))
        if name + HADAMARD[0] in tensors:
            a, b, c, d = (f64(tensors[name + ending]) for ending in HADAMARD)
            added[target][rows] += (a @ b) * (c @ d) * scale(len(b))
        first = get(f"{name}.lokr_w1")
        if first is not None:
            whole = get(f"{name}.lokr_w2")
            pair = None if whole is not None else (f64(tensors[f"{name}.lokr_w2_a"]), f64(tensors[f"{name}.lokr_w2_b"]))
            second = f64(whole) if whole is not None else pair[0] @ pair[1] * scale(len(pair[1]))  # type: ignore[index]
            added[target][rows] += np.kron(f64(first), second)
        if f"{name}.diff" in tensors and "pad_token" not in name:
            added[target][rows] += f64(tensors[f"{name}.diff"])
        if f"{name}.diff_b" in tensors:
            added[target.replace(".weight", ".bias")][rows] += f64(tensors[f"{name}.diff_b"])
    return added


def in_comfyui(part: str, added: dict[str, np.ndarray]) -> np.ndarray:
    for i, letter in enumerate("qkv"):
        if f".to_{letter}." in part:
            return added[part.replace(f"to_{letter}", "qkv")][i * DIM : (i + 1) * DIM]
    for ours, theirs in {
        "to_out.0": "out",
        "all_x_embedder.2-1": "x_embedder",
        "all_final_layer.2-1": "final_layer",
    }.items():
        part = part.replace(ours, theirs)
    return added[part]


@pytest.mark.parametrize("spelling", FILES)
def test_comfyui_adds_what_is_said(tmp_path: Path, spelling: str) -> None:
    written = FILES[spelling]()
    _, (_, comfyui), parts = judged(written, tmp_path)
    added = loaded_by_comfyui(written)
    right = {
        part
        for part in parts
        if in_comfyui(part, added).any() and np.allclose(in_comfyui(part, added), written.changes[part], rtol=1e-9)
    }
    assert right == parts - set(comfyui.dropped)  # of fused and split keys, the sum


def test_pad_tokens_are_taken_by_comfyui_and_not_applied(tmp_path: Path) -> None:
    written = Written({"diffusion_model.x_pad_token.diff": random(1, DIM, seed=1)}, {"x_pad_token": np.zeros((1, DIM))})
    _, (diffusers, comfyui), _ = judged(written, tmp_path)
    assert comfyui.verdict == "not at all"
    assert "without being applied" in comfyui.dropped["x_pad_token"]
    assert diffusers.error


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
