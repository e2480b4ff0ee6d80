"""The table of the ends of LoRA keys. It tells a LoRA file from a model, and takes its keys apart.

A row is a regular expression for the end of a key, the kind of adapter that has such keys, and the tensor's role in it: None for
kinds that are known and not read. The spellings are those that PEFT, diffusers, kohya-type trainers, LyCORIS, ComfyUI, OneTrainer,
DiffSynth and xlabs write.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mergetool.checkpoint.header import TensorInfo

# PEFT puts an adapter's own name in the middle: lora_A.default.weight.
_NAMED, _WEIGHT = r"(?:\.(?!weight|bias|[\w-]*scale)[\w-]+)?", r"(?:\.weight)?"

_PEFT_ONLY = {
    "oft": "OFT", "boft": "BOFT", "glora": "GLoRA", "ia3": "(IA)3", "vera": "VeRA", "pvera": "PVeRA", "fourierft": "FourierFT",
    "hra": "HRA", "hira": "HiRA", "vblora": "VB-LoRA", "randlora": "RandLoRA", "c3a": "C3A", "shira": "SHiRA", "miss": "MiSS",
    "bone": "Bone", "delora": "DeLoRA", "gralora": "GraLoRA", "waveft": "WaveFT", "psoft": "PSOFT", "tinylora": "TinyLoRA",
    "unilora": "UniLoRA", "xlora": "X-LoRA", "road": "RoAd",
}  # fmt: skip
"""Adapters whose tensors PEFT names after them, as in ``oft_R`` and ``vera_lambda_b``."""

_TABLE: tuple[tuple[str, str, str | None], ...] = (
    (rf"\.lora_A{_NAMED}{_WEIGHT}", "LoRA", "down"),
    (rf"\.lora_B{_NAMED}{_WEIGHT}", "LoRA", "up"),
    (rf"\.lora_B{_NAMED}\.bias", "LoRA", "up_bias"),
    *((rf"(?:[._]lora|\.lora_linear_layer)\.{role}{_WEIGHT}", "LoRA", role) for role in ("down", "up", "mid")),
    *((rf"\.lora_{role}{_WEIGHT}", "LoRA", role) for role in ("down", "up", "mid")),
    *((rf"\.processor\.(?:qkv|proj)_lora[12]?\.{role}{_WEIGHT}", "xlabs LoRA", role) for role in ("down", "up")),
    (rf"\.lora_magnitude_vector{_NAMED}{_WEIGHT}", "DoRA", "dora_scale"),
    (r"\.dora_scale", "DoRA", "dora_scale"),
    *((rf"\.hada_{role}", "LoHa", role) for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *((rf"\.lokr_{role}", "LoKr", role) for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
    (r"\.(?:diff|w_norm)", "whole difference", "diff"),
    (r"\.(?:diff_b|b_norm)", "whole difference", "diff_b"),
    (r"\.set_weight|(?:(?<=\.query_norm)|(?<=\.key_norm))\.scale", "whole weight", "set_weight"),  # the second in BFL's control LoRAs
    (r"\.reshape_weight", "", "reshape_weight"),
    (r"\.oft_(?:blocks|diag)|\.rescale|\.oft_R\.scaled_oft", "OFT", None),
    (r"\.boft_blocks", "BOFT", None),
    (r"\.on_input", "(IA)3", None),
    (r"\.[ab][12]\.weight", "GLoRA", None),
    (rf"\.lora_embedding_[AB]{_NAMED}{_WEIGHT}", "LoRA of an embedding", None),
    *((rf"\.{stem}_(?!blocks|diag)[A-Za-z]\w*{_NAMED}{_WEIGHT}", kind, None) for stem, kind in _PEFT_ONLY.items()),
    (r"\.alpha", "", "alpha"),
)  # fmt: skip
_ENDS = re.compile("(?=[._])(?:" + "|".join(f"({pattern})" for pattern, _, _ in _TABLE) + ")$")
_HINT = re.compile(
    "|".join(("lora", "hada_", "lokr_", *(f"[.]{stem}_" for stem in _PEFT_ONLY)))
    + r"|\.(?:diff|diff_b|[wb]_norm|dora_scale|(?:set|reshape)_weight|alpha|rescale|on_input|[ab][12]\.weight|\w+_norm\.scale)$"
)
"""The common text of all ends: it tells most names of a model apart, without the long search."""
READ = frozenset(kind for _, kind, role in _TABLE if role is not None and kind)
"""The kinds of adapters whose values are read."""
_LONGEST = 80
# Ends that models' own tensors have too: they make no file a LoRA by themselves.
_COMMON = re.compile(r"\.(?:alpha|rescale|on_input|[ab][12]\.weight|(?:query|key)_norm\.scale)$")


@dataclass(frozen=True, slots=True)
class Ending:
    """The end of a LoRA key: its spelling, its kind of adapter, and its tensor's role.

    The kind is empty where every kind may have it; the role is None where such adapters are known and not read.
    """

    suffix: str
    kind: str
    role: str | None


def ending(key: str) -> Ending | None:
    """The longest end of ``key`` that a LoRA key may have; None for any other name."""
    tail = key[-_LONGEST:]
    if not _HINT.search(tail):
        return None
    found = _ENDS.search(tail)
    if found is None or found.lastindex is None:
        return None
    _, kind, role = _TABLE[found.lastindex - 1]
    return Ending(found[0], kind, role)


def decisive(key: str) -> Ending | None:
    """`ending`, without those that the tensors of models have as well."""
    return None if _COMMON.search(key) else ending(key)


def adapter_kind(tensors: Mapping[str, TensorInfo]) -> tuple[str, str] | None:
    """The kind of adapter that a file holds and a key that shows it; None for a model's file.

    A GLoRA is told by the four factors of one module together, and LyCORIS' OFT from its BOFT by their dimensions.
    """
    for key, info in tensors.items():
        found = decisive(key)
        if found is not None:
            is_boft = found.suffix == ".oft_blocks" and len(info.shape) > 3
            return ("BOFT" if is_boft else found.kind), key
        if key.endswith(".a1.weight"):
            stem = key.removesuffix("a1.weight")
            if all(f"{stem}{factor}.weight" in tensors for factor in ("a2", "b1", "b2")):
                return "GLoRA", key
    return None
