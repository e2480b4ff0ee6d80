"""diffusers' ``Flux2LoraLoaderMixin`` as a table: the modules that it makes of keys.

It takes a file with one ``.lora_down.weight`` for sd-scripts' and drops every name that it does not know there; of any other it renames what stands under
``diffusion_model.`` or ``base_model.model.``, all of which it must know, and takes the rest as it is.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from mergetool.adapters import in_diffusers
from mergetool.adapters.in_diffusers import Rejected
from mergetool.checkpoint.names import quoted

RELEASES = ("0.42.1",)
"""The releases that the tests run; mergetool forecasts no others."""

_BLOCK = {
    **{
        f"double_blocks.{{i}}.{stream}_{ours}": tuple(f"transformer_blocks.{{i}}.{name}" for name in theirs)
        for stream, qkv, out, ff in (
            ("img", ("attn.to_q", "attn.to_k", "attn.to_v"), "attn.to_out.0", "ff"),
            ("txt", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "attn.to_add_out", "ff_context"),
        )
        for ours, theirs in (("attn.qkv", qkv), ("attn.proj", (out,)), ("mlp.0", (f"{ff}.linear_in",)), ("mlp.2", (f"{ff}.linear_out",)))
    },
    "single_blocks.{i}.linear1": ("single_transformer_blocks.{i}.attn.to_qkv_mlp_proj",),
    "single_blocks.{i}.linear2": ("single_transformer_blocks.{i}.attn.to_out",),
}  # fmt: skip
_KOHYA = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_EXCHANGED = "final_layer.adaLN_modulation.1"
_OUTSIDE = {
    **_KOHYA,
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    _EXCHANGED: "norm_out.linear",
    **{
        f"{name}.lin": f"{name}.linear"
        for name in ("single_stream_modulation", "double_stream_modulation_img", "double_stream_modulation_txt")
    },
}
_NUMBER = re.compile(r"(?<=_blocks[._])(\d+)(?=[._])")
_LYCORIS = re.compile(r"lycoris_((?:single_)?transformer_blocks)_(\d+)_(\w+)\.lokr_\w+")
_IN_LYCORIS = {
    name.split(".", 2)[2].replace(".", "_"): name.split(".", 2)[2] for names in _BLOCK.values() for name in names
}


def modules(keys: Collection[str], release: str = RELEASES[0]) -> dict[str, set[str]]:
    """Name the modules that get a layer, each with the keys it is made of.

    The names are those that diffusers then looks up in the model. Keys that lead nowhere are silently ignored by diffusers. Raises Rejected where
    ``release``, one of `RELEASES`, raises an error.
    """
    kept = [key for key in keys if "dora_scale" not in key]
    if any(".lora_down.weight" in key for key in kept):
        return _kohya(kept)
    names = {key: key for key in kept}
    if any(key.startswith("base_model.model.") for key in kept):
        names = {key: key.replace("base_model.model.", "diffusion_model.") for key in kept}
    is_native = any(name.startswith("diffusion_model.") for name in names.values())
    if any(".lokr_" in key for key in kept):
        return _lokr(names, is_native=is_native)
    return _native(names) if is_native else in_diffusers.as_stored(kept)


def exchanged(keys: Iterable[str]) -> bool:
    """Whether the module of these keys gets its halves in the wrong order."""
    return any(_EXCHANGED in key for key in keys)


def _kohya(keys: Iterable[str]) -> dict[str, set[str]]:
    flat = {name.replace(".", "_"): held for name, held in _BLOCK.items()}
    flat |= {name.replace(".", "_"): (held,) for name, held in _KOHYA.items()}
    found: dict[str, set[str]] = {}
    for key in keys:
        stem, _, end = key.partition(".")
        made = _numbered(stem.removeprefix("lora_unet_"), flat)
        if stem.startswith("lora_unet_") and end in ("lora_down.weight", "lora_up.weight"):
            for module in made:
                found.setdefault(module, set()).add(key)
    return found


def _native(names: dict[str, str]) -> dict[str, set[str]]:
    known = {**_BLOCK, **{name: (held,) for name, held in _OUTSIDE.items()}}
    found: dict[str, set[str]] = {}
    for key, name in names.items():
        module, _, end = name.removeprefix("diffusion_model.").partition(".lora_")
        made = (
            [module]
            if module.startswith(("transformer_blocks.", "single_transformer_blocks."))
            else _numbered(module, known)
        )
        if end not in ("A.weight", "B.weight") or not made:
            raise Rejected(f"{quoted(key)} is not understood")
        for one in made:
            found.setdefault(one, set()).add(key)
    return found  # fmt: skip


def _lokr(names: dict[str, str], *, is_native: bool) -> dict[str, set[str]]:
    """q, k and v of one product stay one module of the model, which is made so: it is given as the three that it stands for."""
    is_lycoris = any(name.startswith("lycoris_") for name in names.values())
    if not is_lycoris and not is_native and any(name.startswith("transformer.") for name in names.values()):
        odd = next((key for key in names if "lora" not in key and "lokr" not in key), None)
        if odd is not None:
            raise Rejected(f"{quoted(odd)} is neither LoRA nor LoKr")
        return _by_module(
            {key: name.removeprefix("transformer.") for key, name in names.items() if name.startswith("transformer.")}
        )
    known = {**_BLOCK, **{name: (held,) for name, held in _OUTSIDE.items()}}
    found: dict[str, set[str]] = {}
    for key, name in names.items():
        if name.endswith(".alpha"):
            continue
        module, _, end = name.removeprefix("diffusion_model.").partition(".lokr_")
        made: Iterable[str] = (module,)
        if is_lycoris:
            match = _LYCORIS.fullmatch(name)
            inner = match and _IN_LYCORIS.get(match[3])
            made = (f"{match[1]}.{match[2]}.{inner}",) if match and inner else ()
        elif is_native:
            made = _numbered(module, known)
        if not end or not made:
            raise Rejected(f"{quoted(key)} is not understood")
        for one in made:
            found.setdefault(one, set()).add(key)
    return found  # fmt: skip


def _by_module(names: dict[str, str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for key, name in names.items():
        found.setdefault(name.partition(".lokr_")[0], set()).add(key)
    return found


def _numbered(name: str, known: dict[str, tuple[str, ...]]) -> list[str]:
    """The modules of diffusers' that ``known`` has for a name, with the number of its block."""
    number = _NUMBER.search(name)
    pattern = _NUMBER.sub("{i}", name, count=1)
    return [held.replace("{i}", number[0] if number else "") for held in known.get(pattern, ())]
