"""diffusers' ``QwenImageLoraLoaderMixin`` as a table: the modules that it makes of keys.

A file with an ``.alpha``, ``default.``, ``diffusion_model.`` or ``lora_unet_`` goes through its conversion, which takes these prefixes off and puts ``transformer.``
before whatever is left; of any other file it takes what stands under ``transformer.``. LoKr and whole differences it rejects.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from mergetool.adapters import in_diffusers
from mergetool.adapters.in_diffusers import Rejected
from mergetool.checkpoint.names import quoted

RELEASES = ("0.42.1",)
"""The releases that the tests run; mergetool forecasts no others."""

_TOP = {
    "norm_out_linear": "norm_out.linear",
    "time_text_embed_timestep_embedder_linear_1": "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed_timestep_embedder_linear_2": "time_text_embed.timestep_embedder.linear_2",
    **{name: name for name in ("img_in", "txt_in", "proj_out")},
}
_BLOCKS = "transformer_blocks"
# Words that stay together where a block's underscored names are taken apart; the longer ones first.
_TOGETHER = re.compile(
    r"(?<![^_])(?:to_add_out|add_[qkv]_proj|to_(?:q|k|v|out)|add_[qkv]|(?:txt|img)_(?:mlp|mod))(?![^_])"
)


def modules(keys: Collection[str], release: str = RELEASES[0]) -> dict[str, set[str]]:
    """Name the modules that get a layer, each with the keys it is made of.

    The names are those that diffusers then looks up in the model. Keys that lead nowhere are silently ignored by diffusers. Raises Rejected where ``release``, one of `RELEASES`, raises an error.
    """
    kept = [key for key in keys if "dora_scale" not in key]
    if in_diffusers.goes_through_conversion(kept):
        return _converted(kept)
    return in_diffusers.as_stored(kept)


def _converted(keys: Collection[str]) -> dict[str, set[str]]:
    names = {key: key.removeprefix("diffusion_model.") for key in keys}
    if any(name.startswith("lora_unet_") for name in names.values()):
        names = {key: _apart(name.removeprefix("lora_unet_")) for key, name in names.items()}
    names = {key: name.replace("default.", "") for key, name in names.items()}
    is_kohya = any(re.search(r"\.lora_(?:down|up)\.weight", name) for name in names.values())
    ends = (".lora_down.weight", ".lora_up.weight") if is_kohya else (".lora_A.weight", ".lora_B.weight")
    found: dict[str, set[str]] = {}
    for key, name in names.items():
        if ".alpha" in name:
            continue
        end = next((end for end in ends if name.endswith(end)), None)
        if end is None:
            raise Rejected(f"{quoted(key)} is not understood")
        found.setdefault(name.removesuffix(end), set()).add(key)
    return found


def _apart(name: str) -> str:
    """An underscored name with dots, as the conversion takes it apart: it takes all names outside the known ones for a block's."""
    for flat, dotted in _TOP.items():
        if name == flat or name.startswith(f"{flat}."):
            return dotted + name[len(flat) :]
    base, dot, end = name.rpartition(".")
    inner, dots, tail = base[len(f"{_BLOCKS}_") :].partition(".")
    apart = _TOGETHER.sub(lambda match: match[0].replace("_", "\0"), inner).replace("_", ".").replace("\0", "_")
    return f"{_BLOCKS}.{apart}{dots}{tail}{dot}{end}"
