"""Text encoders of all-in-one files as parts of the merge, in every spelling.

A part is named as ComfyUI saves it: ``text_encoders.NAME.transformer.`` and transformers' own name. `PLACES` says where other files have an encoder, and
`OPEN_CLIP` what OpenCLIP calls its tensors, whose q, k and v are one. Of an encoder in no row, and of a VAE or an EMA, parts have their stored names.

Checked against ComfyUI 0.30 (``model_lora_keys_clip``, ``CheckpointSave``) and diffusers 0.42.1 (``convert_open_clip_checkpoint``).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from mergetool.arch import prefixes
from mergetool.arch.anatomy import Anatomy, Part, Slice
from mergetool.arch.bundled import BundledKind, kind_of
from mergetool.arch.table import Named, NameTable
from mergetool.checkpoint.dtypes import F32
from mergetool.checkpoint.header import TensorInfo
from mergetool.checkpoint.reader import Checkpoint
from mergetool.errors import DataError
from mergetool.quant import weights
from mergetool.quant.encoding import Encoding

ROOT = "text_encoders."
_INNER = ".transformer."
_ORDER = ("clip_l", "clip_h", "clip_g", "t5xxl")
"""The order in which LoRAs count the encoders of a family that does not say."""
_TEXT: tuple[BundledKind, ...] = ("text encoder",)
_GROUPS: Mapping[BundledKind, str] = {"text encoder": "text_encoder", "VAE": "vae", "EMA": "ema"}

_CLIP_MODULE = re.compile(
    r"(?:lora_te(?P<flat>\d?)_|text_encoder(?:_(?P<dotted>\d))?\.)text_model[._]encoder[._]layers[._](?P<layer>\d+)[._]"
    r"(?P<within>self_attn|mlp)[._](?P<leaf>[qkv]_proj|out_proj|fc[12])"
)

OPEN_CLIP = NameTable(
    (
        Named("text_model.embeddings.token_embedding", "token_embedding"),
        Named("text_model.embeddings.position_embedding.weight", "positional_embedding"),
        Named(
            "text_model.encoder.layers.{i}",
            "transformer.resblocks.{i}",
            inside=(
                Named("layer_norm1", "ln_1"),
                *(Named(f"self_attn.{letter}_proj", f"attn.in_proj[{i}]") for i, letter in enumerate("qkv")),
                Named("self_attn.out_proj", "attn.out_proj"),
                Named("layer_norm2", "ln_2"),
                Named("mlp.fc1", "mlp.c_fc"),
                Named("mlp.fc2", "mlp.c_proj"),
            ),
        ),
        Named("text_model.final_layer_norm", "ln_final"),
    ),
    ("comfyui",),
)
"""OpenCLIP's text model. Its ``text_projection`` is the transpose of transformers' ``text_projection.weight``, so that the two do not meet."""


@dataclass(frozen=True, slots=True)
class EncoderPlace:
    """The beginning of an encoder's tensors in single files.

    ``before`` stands there in its own names, and ``table`` renames them.
    """

    prefix: str
    encoder: str
    before: str = ""
    table: NameTable | None = None


PLACES = (
    EncoderPlace("cond_stage_model.transformer.text_model.", "clip_l", before="text_model."),
    EncoderPlace(
        "cond_stage_model.transformer.", "clip_l", before="text_model."
    ),  # written with transformers before 4.30
    EncoderPlace("cond_stage_model.model.", "clip_h", table=OPEN_CLIP),  # Stable Diffusion 2
    EncoderPlace("conditioner.embedders.0.transformer.", "clip_l"),
    EncoderPlace("conditioner.embedders.0.model.", "clip_g", table=OPEN_CLIP),  # SDXL's refiner
    EncoderPlace("conditioner.embedders.1.model.", "clip_g", table=OPEN_CLIP),
)
"""The places of encoders that ComfyUI does not write under `ROOT`; the first row that a name begins with counts."""


def is_encoder(part: str) -> bool:
    """Whether a part is of a text encoder."""
    return kind_of(part) == "text encoder"


def encoder_of(name: str) -> str:
    """The encoder of a part or of a stored tensor by ComfyUI's name, as ``clip_l``.

    It is empty where the tensor's name does not say.
    """
    own = prefixes.own(name)
    if own.startswith(ROOT):
        encoder, dot, _ = own.removeprefix(ROOT).partition(".")
        return encoder if dot else ""
    return place.encoder if (place := _place(own)) else ""


def groups(part: str) -> frozenset[str]:
    """The groups of a part beside the model.

    They are ``text_encoder`` and the encoder's name, ``t5`` of any T5, ``vae``, ``ema``.
    """
    kind = kind_of(part)
    if kind is None or kind not in _GROUPS:
        return frozenset()
    name = encoder_of(part)
    return frozenset({_GROUPS[kind], *([name] if name else []), *(["t5"] if "t5" in name else [])})


def is_transposed(part: str) -> bool:
    """Whether a part is stored as [in, out], where a LoRA's module is [out, in]."""
    return part.startswith(ROOT) and part.endswith(f"{_INNER}text_projection")


def with_parts(
    anatomy: Anatomy, checkpoint: Checkpoint, source: str, kinds: Collection[BundledKind] = _TEXT
) -> Anatomy:
    """Add the tensors of ``kinds`` beside the model to the parts of its ``anatomy``.

    They stay among those outside as well.

    Quantised tensors count as what their codes mean. Raises DataError where they are quantised in a way that is not read.
    """
    known = prefixes.bundled(checkpoint.tensors)
    outside = {name: part for name, part in anatomy.outside.items() if known.get(name) in kinds}
    if not outside:
        return anatomy
    others = [name for name in checkpoint.tensors if name not in outside]
    encodings = weights.quantised(checkpoint, source, others).encodings
    sides = weights.side_tensors(outside, encodings)
    parts: dict[str, Part] = {}
    for stored, part in outside.items():
        if stored not in sides:
            whole = _read(part, encodings.get(stored))
            pieces = _pieces(whole)
            taken = any(piece.name in parts or piece.name in anatomy.parts for piece in pieces)
            parts |= {piece.name: piece for piece in ([whole] if taken else pieces)}
    return replace(anatomy, parts={**anatomy.parts, **parts}, beside=anatomy.beside | parts.keys())


def with_readable_parts(anatomy: Anatomy, checkpoint: Checkpoint, source: str) -> Anatomy:
    """The same for text encoders; they stay outside where their codes are not read."""
    try:
        return with_parts(anatomy, checkpoint, source)
    except DataError:
        return anatomy


def _place(stored: str) -> EncoderPlace | None:
    return next((place for place in PLACES if stored.startswith(place.prefix)), None)


def _read(part: Part, encoding: Encoding | None) -> Part:
    if encoding is None:
        return part
    return Part.whole(part.name, TensorInfo(F32, encoding.shape, 0, 0), encoding)


def _pieces(part: Part) -> list[Part]:
    """A stored tensor as parts under their canonical names; itself where they are not known."""
    stored = prefixes.own(part.name)
    place = _place(stored)
    if place is None:
        return [replace(part, name=stored) if stored.startswith(ROOT) else part]
    own, root = stored.removeprefix(place.prefix), f"{ROOT}{place.encoder}{_INNER}"
    match = place.table.read(own.replace(".in_proj_", ".in_proj."), "comfyui") if place.table else None
    if match is None:
        return [replace(part, name=f"{root}{place.before}{own}")]
    names = [f"{root}{match.name(spot.path)}" for spot in match.spots]
    rows, odd = divmod(part.shape[0] if part.shape else 1, len(names))
    if odd:
        return [part]
    return [
        replace(
            part,
            name=name,
            shape=(rows, *part.shape[1:]) if match.shared else part.shape,
            stored=Slice(part.stored.tensor, i * rows, rows) if match.shared else part.stored,
        )
        for i, name in enumerate(names)
    ]


# -- LoRAs ---------------------------------------------------------------------------------------------------------------------


def lora_names(parts: Iterable[str], order: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The modules of text encoders among ``parts`` as LoRAs call them: module -> its part.

    ``order`` are the family's encoders as LoRAs count them. Names are those of kohya-type trainers (``lora_te1_`` and underscores), of diffusers
    (``text_encoder_2.``), and of ComfyUI, which knows every tensor under its own name.
    """
    weights_ = [part for part in parts if part.startswith(ROOT) and (part.endswith(".weight") or is_transposed(part))]
    numbers = _numbers({encoder_of(part) for part in weights_}, order)
    found: dict[str, tuple[str, ...]] = {}
    for part in weights_:
        encoder, module = encoder_of(part), part.removesuffix(".weight")
        inner = module.partition(_INNER)[2]
        if not inner:
            continue
        if not encoder.startswith("clip_"):
            found.setdefault(f"{ROOT}transformer.{inner}", (part,))
        for number in numbers.get(encoder, ()):
            for name in dict.fromkeys((inner, inner.removeprefix("model."))):
                found.setdefault(f"lora_te{number}_{name.replace('.', '_')}", (part,))
                for start in (f"lora_te{number}", f"te{number}", f"text_encoder_{number}"):
                    found.setdefault(f"{start.removesuffix('_')}.{name}", (part,))
    return found


def takes_factors(part: str) -> bool:
    """Whether programs add a LoRA's factors to a part of a text encoder.

    They do to a module's weight under its canonical name, and not to a table of embeddings.
    """
    is_known = part.startswith(ROOT) and _INNER in part and part.endswith(".weight")
    return is_known and not part.endswith(
        ("embedding.weight", "embed_tokens.weight", "shared.weight", "relative_attention_bias.weight")
    )


def lora_module(part: str, order: Sequence[str], *, flat: bool) -> str:
    """The name of an encoder's module in LoRAs that ComfyUI and diffusers load, prefix included.

    ``flat`` is the spelling of kohya-type trainers.
    """
    encoder, module = encoder_of(part), part.removesuffix(".weight")
    inner = module.partition(_INNER)[2]
    number = order.index(encoder) + 1 if encoder in order and inner else 0
    if flat and number:
        return f"lora_te{number if len(order) > 1 else ''}_{inner.replace('.', '_')}"
    if number and encoder.startswith("clip_"):
        return f"text_encoder{f'_{number}' if number > 1 else ''}.{inner}"
    return module


def in_diffusers(module: str) -> tuple[str, str] | None:
    """Diffusers' name of a LoRA's module of a CLIP: its component's prefix, and the module.

    There is no ``text_model.`` in it, which transformers 5 no longer has.
    None for a module of another encoder.
    """
    match = _CLIP_MODULE.fullmatch(module)
    if match is None:
        return None
    number = match["flat"] or match["dotted"] or ""
    start = "text_encoder." if number in ("", "1") else f"text_encoder_{number}."
    return start, f"encoder.layers.{match['layer']}.{match['within']}.{match['leaf']}"


def _numbers(present: Collection[str], order: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """How LoRAs number the encoders; the first has no number in most. ComfyUI reads a T5 that is the second as the third as well."""
    others = [name for name in _ORDER if name in present] + sorted(set(present).difference(_ORDER))
    counted = tuple(order) or tuple(others)
    found: dict[str, tuple[str, ...]] = {name: (str(i),) if i > 1 else ("", "1") for i, name in enumerate(counted, 1)}
    return found | ({"t5xxl": ("2", "3")} if counted[1:2] == ("t5xxl",) else {})
