"""The treatment of a LoRA's keys in diffusers' loaders for UNets.

They make modules of them, or reject the file.

A file of which all keys begin as kohya-type trainers' do is converted, its alphas become the adapter's config; of any other it takes what stands under ``unet.``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from functools import cache

from mergetool.adapters.in_diffusers import Rejected
from mergetool.arch.families import FAMILIES
from mergetool.checkpoint.names import quoted

SDXL, SD1 = "StableDiffusionXLLoraLoaderMixin", "StableDiffusionLoraLoaderMixin"
"""The first renames ComfyUI's blocks by the model's config, the second does not know them."""
_KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
_NATIVE = re.compile(r"lora_unet_(?:(input)_blocks_(\d+)|(middle)_block_(\d+)|(output)_blocks_(\d+))_")
_BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")
_STACKS = ("input", "middle", "output")
_OLD = ("0.36", "0.38")  # they know nothing outside the blocks
_ATTENTION = re.compile(r"\.(?:to_[qkv]|to_out\.0)$")
# Under diffusers' own names with underscores: what the conversion makes other names of, and did until 0.38.
_LOST = re.compile(r"add_embedding\.linear_[12]$")
_LOST_ONCE = re.compile(r"(?:add|time)_embedding\.linear_[12]$|conv_(?:in|out)$")
# Ends that are renamed where the first key of the file has no lora_A, the longest first; what stands before them may be a processor.
_OLD_ENDS = {
    **{f".to_{x}_lora.{way}": (f".to_{x}", letter) for x in "qkv" for way, letter in (("down", "A"), ("up", "B"))},
    **{f".to_out_lora.{way}": (".to_out.0", letter) for way, letter in (("down", "A"), ("up", "B"))},
    ".lora.down": ("", "A"),
    ".lora.up": ("", "B"),
}


def modules(keys: Collection[str], release: str, *, loader: str = SDXL) -> dict[str, set[str]]:
    """The modules that get a layer, each with its keys. They go by the names that are then looked up in the model.

    Keys that lead nowhere are silently ignored by diffusers. Raises Rejected where ``release`` raises an error.
    """
    kept = [key for key in keys if "dora_scale" not in key]
    if all(key.startswith(_KOHYA) for key in kept):
        return _converted(kept, loader, is_old=release in _OLD)
    odd = next((key for key in kept if "lora" not in key), None)
    if odd is not None:
        raise Rejected(f'{quoted(odd)} has no "lora" in it')
    own = [key.removeprefix("unet.") for key in kept if key.startswith("unet.")]
    found: dict[str, set[str]] = {}
    renames = bool(own) and "lora_A" not in own[0]
    for name in own:
        module, letter = _taken_apart(name, renames=renames)
        if letter:
            found.setdefault(module, set()).add(f"unet.{name}")
    if own and not found:
        raise Rejected(f"{quoted('unet.' + own[0])} is not understood")
    return found


def takes_header(keys: Collection[str]) -> bool:
    """Whether a header's config may stand in a file of these keys: not beside alphas."""
    return not any(key.endswith(".alpha") for key in keys)


def alphas_given(own: Mapping[str, float | None]) -> dict[str, float | None]:
    """The alpha that each module of a converted file gets. ``own`` are those in the file, in its order.

    One alpha stands for all. Where there are several the commonest does, and the others are patterns, which are not found for the projections of attentions.
    """
    stated = Counter(alpha for alpha in own.values() if alpha is not None)
    if not stated:
        return dict(own)
    common = stated.most_common(1)[0][0]
    return {name: common if alpha is None or _ATTENTION.search(name) else alpha for name, alpha in own.items()}


def _taken_apart(name: str, *, renames: bool) -> tuple[str, str]:
    """The module of a key without its prefix, and A or B; an empty letter for one that leads nowhere."""
    if renames:
        name = name.replace(".processor.", ".")
        end = next((end for end in _OLD_ENDS if end in name), None)
        if end is not None:
            inner, letter = _OLD_ENDS[end]
            return name.partition(end)[0] + inner, letter
    module, _, letter = name.removesuffix(".weight").rpartition(".lora_")
    return module, letter if letter in ("A", "B") else ""


def _converted(keys: Collection[str], loader: str, *, is_old: bool) -> dict[str, set[str]]:
    if loader == SDXL:
        keys = _in_turn(keys, is_old=is_old)
    there = set(keys)
    downs = [key for key in keys if key.endswith("lora_down.weight")]
    used: set[str] = set()
    found: dict[str, set[str]] = {}
    for down in downs:
        flat = down.partition(".")[0]
        up = f"{flat}.lora_up.weight"
        if up not in there:
            raise Rejected(f"{quoted(down)} has no factor beside it")
        used |= {down, up, f"{flat}.alpha"}
        if flat.startswith("lora_unet_"):
            name = _names(loader).get(flat.removeprefix("lora_unet_"), flat)
            is_native = _NATIVE.match(down) is not None
            lost = (
                not is_native
                and (_LOST_ONCE if is_old else _LOST).search(name)
                and flat.endswith(name.replace(".", "_"))
            )
            found[flat if lost else name] = {down, up}
    odd = next((key for key in keys if key not in used), None)
    if odd is not None:
        raise Rejected(f"{quoted(odd)} is not understood")
    return found


def _in_turn(keys: Collection[str], *, is_old: bool) -> list[str]:
    """The keys in the order in which they are converted: outside ComfyUI's blocks, then by block. Of a file with names of both kinds ComfyUI's are dropped."""
    native = {
        key: match for key in keys if (match := _NATIVE.match(key)) and not key.startswith("lora_unet_input_blocks_0_0")
    }
    other = any(f"{stack}_block" in key for key in keys for stack in ("down", "mid", "up"))
    if not native or other:
        return [key for key in keys if not (other and _is_native(key))]
    outside = [key for key in keys if key not in native]
    odd = next((key for key in outside if key.startswith("lora_unet_")), None)
    if is_old and odd is not None:
        raise Rejected(f"{quoted(odd)} is of no block")
    return [*outside, *sorted(native, key=lambda key: _block(native[key]))]


def _is_native(key: str) -> bool:
    return any(words in key for words in ("input_blocks", "middle_block", "output_blocks"))


def _block(match: re.Match[str]) -> tuple[int, int]:
    stack = next(i for i, name in enumerate(_STACKS) if name in match.groups())
    number = next(group for group in match.groups() if group and group.isdigit())
    return stack, int(number)


@cache
def _names(loader: str) -> Mapping[str, str]:
    """A module with underscores -> as diffusers calls it, by the names that the loader knows."""
    family = next(family for family in FAMILIES if family.loader == loader)
    parts: Iterable[str] = [part for part in family.parts_to_depth(10, []) if part.endswith(".weight")]
    return {
        family.stored_name(part, layout).removesuffix(".weight").replace(".", "_"): part.removesuffix(".weight")
        for part in parts
        for layout in family.layouts
        if loader == SDXL or layout == "diffusers" or not part.startswith(_BLOCKS)
    }
