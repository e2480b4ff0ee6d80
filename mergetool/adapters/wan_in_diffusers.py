"""The treatment of a LoRA's keys in diffusers' ``WanLoraLoaderMixin``. It makes modules of them, or rejects the file.

It renames a file with one key under ``diffusion_model.`` as Wan's own names, one with one under ``lora_unet_`` as musubi-tuner's, and of any other takes what
stands under ``transformer.``. Of 2.2's two transformers a file goes into the first unless ``load_into_transformer_2`` is given.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from mergetool.adapters.in_diffusers import Rejected, as_stored
from mergetool.checkpoint.names import quoted

RELEASES = ("0.42.1",)
"""The releases that the tests run; mergetool forecasts no others."""

_OWN, _FLAT = "diffusion_model.", "lora_unet_"
_PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
_IMAGE = {"k_img": "add_k_proj", "v_img": "add_v_proj"}
_BLOCK = {
    **{f"self_attn.{ours}": f"attn1.{theirs}" for ours, theirs in _PROJECTIONS.items()},
    **{f"cross_attn.{ours}": f"attn2.{theirs}" for ours, theirs in _PROJECTIONS.items()},
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
"""Modules of a block. Any of them may be missing, but in musubi-tuner's files."""
_EMBEDDERS = {
    f"{name}_embedding.{n}": f"condition_embedder.{name}_embedder.linear_{1 + n // 2}"
    for name in ("text", "time")
    for n in (0, 2)
}
_OUTSIDE = {
    **_EMBEDDERS,
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
}
_NUMBERED = re.compile(r"blocks\.(\d+)\.(.+)")


def modules(keys: Collection[str], release: str = RELEASES[0]) -> dict[str, set[str]]:
    """The modules that get a layer, each with its keys. They go by the names that are then looked up in the model.

    A bias is a module ``NAME.bias``. Keys that lead nowhere are silently ignored by diffusers. Raises Rejected where ``release`` raises an error.
    """
    if any(key.startswith(_OWN) for key in keys):
        return _native(keys)
    if any(key.startswith(_FLAT) for key in keys):
        return _musubi(keys)
    return as_stored([key for key in keys if "dora_scale" not in key])


def takes_header(keys: Collection[str]) -> bool:
    """Whether ranks and scales may stand in the header. Where they do, it makes no layer for a bias."""
    return not any(key.endswith(".diff_b") for key in keys)


def _native(keys: Collection[str]) -> dict[str, set[str]]:
    odd = next((key for key in keys if not key.startswith(_OWN)), None)
    if odd is not None:
        raise Rejected(f"{quoted(odd)} has another prefix than {_OWN}")
    names = {key.removeprefix(_OWN): key for key in keys}
    if not any(name.startswith("blocks.") for name in names):
        raise Rejected("it has no block")
    down, up = ("lora_A", "lora_B") if any("lora_A" in name for name in names) else ("lora_down", "lora_up")
    image = all(any(word in name for name in names) for word in _IMAGE)
    ends = {f".{down}.weight", f".{up}.weight"}
    timed = any(name.startswith("time_projection") and name.endswith(".weight") for name in names)
    found: dict[str, set[str]] = {}
    left = []
    for name, key in names.items():
        if (name.endswith((".diff", ".diff_b")) and "norm" in name) or ("time_projection" in name and not timed):
            continue
        module, end = _taken_apart(name)
        theirs = _renamed(module, image=image)
        if not theirs or (end == ".alpha" and theirs in _OUTSIDE.values()):
            left.append(key)
        elif end in ends:
            found.setdefault(theirs, set()).add(key)
        elif end == ".diff_b":
            found.setdefault(f"{theirs}.bias", set()).add(key)
        elif end == ".diff" and module == "head.head" and "head.head.diff_b" in names:
            found.setdefault(theirs, set()).add(key)
        elif end != ".alpha" or not {f"{module}{factor}" for factor in ends} <= names.keys():
            left.append(key)
    for name in _EMBEDDERS:
        if any(name in other for other in names) and not {f"{name}{end}" for end in ends} <= names.keys():
            raise Rejected(f"{quoted(_OWN + name)} has no factors")
    odd = next((key for key in left if ".diff" not in key), None)
    if odd is not None:
        raise Rejected(f"{quoted(odd)} is not understood")
    return found


def _musubi(keys: Collection[str]) -> dict[str, set[str]]:
    """Every module of every block, from 0 on, with its alpha, and no other."""
    modules = {**_BLOCK, **{f"cross_attn.{ours}": f"attn2.{theirs}" for ours, theirs in _IMAGE.items()}}
    if not all(any(word in key for key in keys) for word in _IMAGE):
        modules = _BLOCK
    numbers = {match[1] for key in keys if (match := re.match(r"lora_unet_blocks_(\d+)_", key))}
    wanted: dict[str, str] = {}
    for number in range(len(numbers)):
        for ours, theirs in modules.items():
            flat = f"{_FLAT}blocks_{number}_{ours.replace('.', '_')}"
            for end in (".lora_down.weight", ".lora_up.weight", ".alpha"):
                wanted[flat + end] = f"blocks.{number}.{theirs}"
    odd = next((key for key in keys if key not in wanted), None) or next((k for k in wanted if k not in keys), None)
    if odd is not None:
        raise Rejected(f"{quoted(odd)} is {'not understood' if odd in keys else 'missing'}")
    found: dict[str, set[str]] = {}
    for key, module in wanted.items():
        if not key.endswith(".alpha"):
            found.setdefault(module, set()).add(key)
    return found


def _taken_apart(name: str) -> tuple[str, str]:
    ends = (".lora_A.weight", ".lora_B.weight", ".lora_down.weight", ".lora_up.weight", ".alpha", ".diff_b", ".diff")
    end = next((end for end in ends if name.endswith(end)), "")
    return name.removesuffix(end), end


def _renamed(module: str, *, image: bool) -> str:
    """diffusers' name of one of Wan's own; empty for one that the conversion does not know."""
    match = _NUMBERED.fullmatch(module)
    if match is None:
        return _OUTSIDE.get(module, "")
    inner = _BLOCK.get(match[2], "")
    if not inner and image:
        inner = {f"cross_attn.{ours}": f"attn2.{theirs}" for ours, theirs in _IMAGE.items()}.get(match[2], "")
    return f"blocks.{match[1]}.{inner}" if inner else ""
