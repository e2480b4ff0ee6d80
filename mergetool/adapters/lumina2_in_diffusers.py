"""diffusers' ``Lumina2LoraLoaderMixin`` as a table: the modules that it makes of keys.

It renames a file with one key under ``diffusion_model.``, where q, k and v are one module of 2304, 768 and 768 rows: every module of every block that occurs must
be there, from the first block on, and no other. Of any other file it takes what stands under ``transformer.``.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from mergetool.adapters.in_diffusers import Rejected, as_stored
from mergetool.checkpoint.names import quoted

RELEASES = ("0.42.1",)
"""The releases that the tests run; mergetool forecasts no others."""

_OWN = "diffusion_model."
_STACKS = ("noise_refiner", "context_refiner", "layers")
_BLOCK = {
    "attention.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attention.out": ("attn.to_out.0",),
    **{f"feed_forward.w{n}": (f"feed_forward.linear_{n}",) for n in (1, 2, 3)},
    "adaLN_modulation.1": ("norm1.linear",),
}


def modules(keys: Collection[str], release: str = RELEASES[0]) -> dict[str, set[str]]:
    """The modules that get a layer, by the names in the model, with the keys of each.

    Raises Rejected where ``release`` raises an error.
    """
    kept = [key for key in keys if "dora_scale" not in key]
    if not any(key.startswith(_OWN) for key in kept):
        return as_stored(kept)
    odd = next((key for key in kept if not key.startswith(_OWN)), None)
    if odd is not None:
        raise Rejected(f"{quoted(odd)} has another prefix than {_OWN}")
    left, found = set(kept), dict[str, set[str]]()
    for stack in _STACKS:
        count = len({match[1] for key in kept if (match := re.search(rf"{stack}\.(\d+)\.", key))})
        for number in range(count):
            for ours, theirs in _BLOCK.items():
                if stack == "context_refiner" and ours == "adaLN_modulation.1":
                    continue
                factors = {f"{_OWN}{stack}.{number}.{ours}.lora_{letter}.weight" for letter in "AB"}
                if not factors <= left:
                    raise Rejected(f"{quoted(min(factors - left))} is missing")
                left -= factors
                found |= {f"{stack}.{number}.{name}": set(factors) for name in theirs}
    if left:
        raise Rejected(f"{quoted(min(left))} is not understood")
    return found
