"""The treatment of a LoRA's keys in diffusers' ``FluxLoraLoaderMixin``. It makes modules of them, or rejects the file.

It takes a file with one ``.lora_down.weight`` for sd-scripts' (or OneTrainer's, or its own in old spelling), one with "processor" for xlabs', and of any other
what stands under ``transformer.``. Blocks are counted as in the published model, 19 and 38.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from mergetool.adapters.in_diffusers import Rejected
from mergetool.checkpoint.names import quoted

RELEASES = ("0.42.1",)
"""The releases that the tests run; mergetool forecasts no others."""

_DOUBLE = {
    **{
        f"{stream}_{ours}": (theirs,)
        for stream, names in (
            ("img", {"attn_proj": "attn.to_out.0", "mlp_0": "ff.net.0.proj", "mlp_2": "ff.net.2", "mod_lin": "norm1.linear"}),
            ("txt", {"attn_proj": "attn.to_add_out", "mlp_0": "ff_context.net.0.proj", "mlp_2": "ff_context.net.2", "mod_lin": "norm1_context.linear"}),
        )
        for ours, theirs in names.items()
    },
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}  # fmt: skip
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}
_BLOCK = re.compile(r"lora_unet_(double|single)_blocks_(0|[1-9]\d?)_(\w+)")
_COUNTS = {"double": 19, "single": 38}
_LOST = re.compile(
    r"lora_unet_(?:(?:guidance|time|vector)_in_(?:in|out)_layer|img_in|txt_in|final_layer_(?:linear|adaLN_modulation_1))"
)
"""Modules outside the blocks: the conversion drops their prefixes, and then nothing finds them."""
_MIXED = re.compile(
    r"lora_transformer_(?:(single_transformer_blocks|transformer_blocks)_(\d+)_attn_(\w+)"
    r"|(norm_out)_(linear)|(context_embedder|proj_out|x_embedder)|(time_text_embed)_(\w+_embedder)_(linear_[12]))"
)
_ENDS = (".lora_down.weight", ".lora_up.weight", ".alpha")
_XLABS = re.compile(
    r"(?:diffusion_model\.)?(double|single)_blocks\.(\d+)\.processor\.(qkv|proj)_lora([12]?)\.(?:down|up)\.weight"
)


def modules(keys: Collection[str], release: str = RELEASES[0]) -> dict[str, set[str]]:
    """The modules that get a layer, each with its keys. They go by the names that are then looked up in the model.

    Keys that lead nowhere are silently ignored by diffusers. Raises Rejected where ``release``, one of `RELEASES`, raises an error.
    """
    kept = [key for key in keys if "dora_scale" not in key]
    if any(".lora_down.weight" in key for key in kept):
        found = _with_down(kept)
        if not found and not any(_LOST.match(_flat(key)) for key in kept):
            raise Rejected("no key is left that it knows")
        return found
    if any("processor" in key for key in kept):
        return _xlabs(kept)
    if any("base_model" in key for key in kept):
        raise Rejected("names under base_model are taken for a file with every module of the published model")
    if not any("lora" in key for key in kept):
        raise Rejected("no key has the word lora")
    return _own(kept)


def alphas_are_read(keys: Collection[str], release: str = RELEASES[0]) -> bool:
    """Whether ``.alpha`` tensors count. They do not beside ``lora_down`` and ``lora_up`` under diffusers' own names."""
    return not (any(".lora_down.weight" in key for key in keys) and any(key.startswith("transformer.") for key in keys))


def takes_header(keys: Collection[str]) -> bool:
    """Whether ranks and scales may stand in the header.

    Alphas that are not multiplied into the factors must then be away.
    """
    return any(".lora_down.weight" in key for key in keys) or not any("alpha" in key for key in keys)


def _own(keys: Iterable[str]) -> dict[str, set[str]]:
    named = (
        (key, key.removeprefix("transformer.")) for key in keys if key.startswith("transformer.") and "lora" in key
    )
    found: dict[str, set[str]] = {}
    for key, name in named:
        found.setdefault(re.split(r"[._]lora[_.]", name)[0], set()).add(key)
    return found


def _with_down(keys: Collection[str]) -> dict[str, set[str]]:
    if any(key.startswith("transformer.") for key in keys):
        return _own(keys)
    if any(key.startswith("lora_transformer_") for key in keys):
        return _mixed(keys)
    names = {key: _flat(key) for key in keys}
    if any(".diff_b" in key for key in keys):
        names = {key: name for key, name in names.items() if ".diff_b" not in key}
    if any(".norm" in key and ".diff" in key for key in keys):
        names = {key: name for key, name in names.items() if ".norm" not in key and ".diff" not in key}
    found: dict[str, set[str]] = {}
    for key, name in names.items():
        if not name.startswith("lora_unet_"):
            continue  # text encoders, and what is dropped
        stem, end = _taken_apart(name)
        made = _in_block(stem)
        if not end or (not made and not _LOST.fullmatch(stem)):
            raise Rejected(f"{quoted(key)} is not understood")
        for module in made if end != ".alpha" else ():
            found.setdefault(module, set()).add(key)
    return found


def _in_block(stem: str) -> list[str]:
    match = _BLOCK.fullmatch(stem)
    if match is None or int(match[2]) >= _COUNTS[match[1]]:
        return []
    stack, names = ("transformer_blocks", _DOUBLE) if match[1] == "double" else ("single_transformer_blocks", _SINGLE)
    return [f"{stack}.{match[2]}.{name}" for name in names.get(match[3], ())]


def _flat(key: str) -> str:
    """A key with underscores for dots, but for its end."""
    name = key.replace("diffusion_model.", "lora_unet_")
    stem, end = _taken_apart(name)
    return stem.replace(".", "_") + end if end else name.replace(".", "_")


def _taken_apart(name: str) -> tuple[str, str]:
    end = next((end for end in _ENDS if name.endswith(end)), "")
    return name.removesuffix(end), end


def _mixed(keys: Collection[str]) -> dict[str, set[str]]:
    """Convert OneTrainer's keys: every module must have an alpha, and in blocks it tells only attention's modules apart."""
    found: dict[str, set[str]] = {}
    for key in keys:
        stem, end = _taken_apart(key)
        if key.startswith(("lora_unet_", "lora_te1_")):
            continue
        match = _MIXED.fullmatch(stem)
        if match is None or not end:
            raise Rejected(f"{quoted(key)} is not understood")
        if f"{stem}.alpha" not in keys:
            raise Rejected(f"{quoted(stem)} has no alpha")
        stack, number, inner, *others = match.groups()
        module = ".".join(filter(None, others))
        if stack:
            module = f"{stack}.{number}.attn.{'to_out.0' if inner == 'to_out_0' else inner}"
        if end != ".alpha":
            found.setdefault(module, set()).add(key)
    return found


def _xlabs(keys: Iterable[str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for key in keys:
        match = _XLABS.fullmatch(key)
        if match is None:
            raise Rejected(f"{quoted(key)} is not understood")
        double, number, kind, stream = match.groups()
        native = f"lora_unet_{double}_blocks_{number}_" + (
            {"qkv": "linear1", "proj": "linear2"}[kind]
            if double == "single"
            else f"{'txt' if stream == '2' else 'img'}_attn_{kind}"
        )
        made = _in_block(native)
        for module in made[:3]:
            found.setdefault(module, set()).add(key)
    return found
