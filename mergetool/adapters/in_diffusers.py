"""The treatment of a LoRA's keys in ``ZImageLoraLoaderMixin`` of several diffusers releases.

It makes modules of them, or rejects the file.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from mergetool.checkpoint.names import quoted

RELEASES = ("0.36", "0.38", "0.39", "0.40", "0.42.1")
"""The releases that the tests run, oldest first; mergetool forecasts no others."""

NEWEST = RELEASES[-1]

# Where lora_unet_ names are taken apart at every underscore, these stay together or are put together again.
_TOGETHER = re.compile(r"(?:(?<=^)|(?<=_))(to)_(q|k|v|out)(?=_|\.|$)|(?:(?<=^)|(?<=_))(feed)_(forward)(?=_|\.|$)")
_REFINERS = ("context.refiner.", "noise.refiner.")  # since 0.38
_OTHERS = ("adaLN.modulation.", "all.final.layer.", "all.x.embedder.", "cap.embedder.", "t.embedder.")  # since 0.39
_IGNORED = (".lora_A", ".lora_B")  # layers are made for them, which stay zero
_HALF_KNOWN = re.compile(r"(?<!\.to_[qkv])_lora\.")  # the oldest spelling, which had the three projections only
# Ends of keys that need no conversion.
_AS_STORED = (
    *(
        ".lora_A.weight",
        ".lora_B.weight",
        ".lora.down.weight",
        ".lora.up.weight",
        "_lora.down.weight",
        "_lora.up.weight",
    ),
    *(".lora_magnitude_vector", ".lora_magnitude_vector.weight"),
)


class Rejected(Exception):
    """diffusers raises an error, and loads nothing."""


def modules(keys: Collection[str], release: str = NEWEST) -> dict[str, set[str]]:
    """The modules that get a layer, each with its keys. They go by the names that are then looked up in the model.

    Keys that lead nowhere are silently ignored by diffusers. Raises Rejected where ``release``, one of `RELEASES`, raises an error.
    """
    kept = [key for key in keys if "dora_scale" not in key]
    if release == NEWEST and any(".lokr_" in key for key in kept):
        return _lokr(kept)
    if goes_through_conversion(kept):
        return _converted(kept, RELEASES.index(release))
    return as_stored(kept)


def as_stored(keys: Collection[str]) -> dict[str, set[str]]:
    """The modules of a file without conversion: those under ``transformer.``. Raises Rejected for keys that are no LoRA's."""
    odd = next((key for key in keys if "lora" not in key), None)
    if odd is not None:
        raise Rejected(f"{quoted(odd)} is neither LoRA nor LoKr")
    odd = next(
        (key for key in keys if key.startswith("transformer.") and not key.endswith((*_AS_STORED, *_IGNORED))), None
    )
    if odd is not None:
        raise Rejected(f"{quoted(odd)} is not understood after transformer.")
    named = ((key, key.removeprefix("transformer.")) for key in keys if key.startswith("transformer."))
    return _by_module(
        (key, name) for key, name in named if not name.endswith(_IGNORED) and not _HALF_KNOWN.search(name)
    )


def goes_through_conversion(keys: Iterable[str]) -> bool:
    """Whether the file is taken for another program's. Its alphas are then multiplied into the factors."""
    starts = ("lora_unet_", "diffusion_model.")
    return any(key.endswith(".alpha") or key.startswith(starts) or "default." in key for key in keys)


def alphas_are_read(keys: Collection[str], release: str) -> bool:
    """Whether ``.alpha`` tensors count. 0.36 drops those that stand beside ``lora_A`` and ``lora_B``."""
    return release != "0.36" or any(".lora_down.weight" in key for key in keys)


def _lokr(keys: Collection[str]) -> dict[str, set[str]]:
    if not any(key.startswith("diffusion_model.") or key.endswith(".alpha") for key in keys):
        return _by_module((key, key.removeprefix("transformer.")) for key in keys if key.startswith("transformer."))
    odd = next((key for key in keys if ".lokr_" not in key and not key.endswith(".alpha")), None)
    if odd is not None:
        raise Rejected(f"{quoted(odd)} stands in a file with LoKr")
    return _by_module((key, key.removeprefix("diffusion_model.")) for key in keys if ".lokr_" in key)


def _converted(keys: Collection[str], age: int) -> dict[str, set[str]]:
    """Keys that go through its conversion, all of which it must understand; ``age`` is an index of `RELEASES`."""
    flat = any(key.startswith("lora_unet_") for key in keys)
    last = {_renamed(key, age, flat=flat): key for key in keys}  # of two keys that become one, the first is lost
    names = {key: name for name, key in last.items()}
    is_dotted = {key: ".lora.down." in name or ".lora.up." in name for key, name in names.items()}
    # One pair of words in a file: down and up go before A and B, which are then left over.
    words = (
        ("down", "up") if any(re.search(r"\.lora_(down|up)\.weight", name) for name in names.values()) else ("A", "B")
    )
    found: dict[str, set[str]] = {}
    for key, name in names.items():
        module, _, leaf = name.partition(".lora.") if is_dotted[key] else name.rpartition(".lora_")
        if name.endswith(".alpha"):
            continue
        if not module or leaf not in [f"{word}.weight" for word in (("down", "up") if is_dotted[key] else words)]:
            raise Rejected(f"{quoted(key)} is not understood")
        found.setdefault(module, set()).add(key)
    if age == 0:
        if any(is_dotted.values()):  # which is what the ends of underscored names become
            raise Rejected("names that end in lora.down and lora.up are not understood")
        bare = next((module for module in found if f"{module}.alpha" not in names.values()), None)
        if words == ("down", "up"):
            if bare is not None:
                raise Rejected(f"{quoted(bare)} has lora_down without an alpha")
            _require_alphas_used(names, found, set())
        return found
    dotted = {key for key, found_dotted in is_dotted.items() if found_dotted}
    found, unused = _without_fused(found, dotted, splits=age == len(RELEASES) - 1)
    _require_alphas_used(names, found, unused)
    return found


def _without_fused(
    found: dict[str, set[str]], dotted: set[str], *, splits: bool
) -> tuple[dict[str, set[str]], set[str]]:
    """Split qkv of lora_unet_ files in three; releases without ``splits``, or split keys beside it, drop it, and ``out`` likewise.

    And the modules whose alphas go with them.
    """
    result: dict[str, set[str]] = {}
    unused: set[str] = set()
    for module, keys in found.items():
        block, _, last = module.rpartition(".")
        split = [f"{block}.to_{letter}" for letter in "qkv"]
        if not keys & dotted or last not in ("qkv", "out"):
            result[module] = keys
        elif last == "qkv" and not splits:
            unused.add(module)
        elif last == "out" and not splits:
            continue  # its alpha, which was renamed, is left over
        elif last == "qkv" and not found.keys() & set(split):
            result |= dict.fromkeys(split, keys)
        elif last == "out" and f"{block}.to_out.0" not in found:
            result[f"{block}.to_out.0"] = keys
    return result, unused


def _require_alphas_used(names: dict[str, str], found: dict[str, set[str]], unused: set[str]) -> None:
    used = unused | set(found) | {module.replace(".to_q", ".qkv") for module in found}
    for key, name in names.items():
        module = name.removesuffix(".alpha")
        if name.endswith(".alpha") and module not in used:
            raise Rejected(f"{quoted(key)} has no factors that are understood")


def _renamed(key: str, age: int, *, flat: bool) -> str:
    name = key.removeprefix("diffusion_model.")
    if flat:
        base, dot, end = name.removeprefix("lora_unet_").rpartition(".")
        apart = _TOGETHER.sub(lambda m: f"{m[1] or m[3]}\0{m[2] or m[4]}", base).replace("_", ".").replace("\0", "_")
        name = apart + dot + end
    if ".to_out" not in name:
        name = re.sub(r"\.out(?=\.(?:lora_down|lora_up)\.weight$|\.alpha$)", ".to_out.0", name)
    name = name.replace("default.", "")
    for together in (*(_REFINERS if age > 0 else ()), *(_OTHERS if age > 1 else ())):
        words = together[:-1].split(".")
        name = name.replace(together, "_".join(words) + ".")
    return name


def _by_module(named: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for key, name in named:
        module = re.split(r"[._]lora[_.]|\.lokr_", name)[0]
        found.setdefault(module, set()).add(key)
    return found
