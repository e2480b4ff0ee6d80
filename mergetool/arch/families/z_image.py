"""Z-Image: one diffusion transformer (Base, Turbo, De-Turbo, Omni), two layouts, one set of parts.

Canonical names are those of diffusers' ``ZImageTransformer2DModel``. The ComfyUI layout (that of Lumina2) stores
q, k and v of a block as one ``attention.qkv.weight``, rows in that order, and calls some modules otherwise.
Names are compared component by component: ``x_embedder.`` is a substring of ``all_x_embedder.2-1.``, and
``layers.1`` of ``layers.10``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, ClassVar

from mergetool import quant
from mergetool.arch.anatomy import Anatomy, Family, Lookalike, Part, Preset, Slice, is_number, natural_key
from mergetool.arch.fused_qkv import HeadRows
from mergetool.arch.prefixes import Names
from mergetool.checkpoint.header import TensorInfo
from mergetool.checkpoint.names import quoted
from mergetool.errors import FamilyError
from mergetool.quant.encoding import Encoding

PAD_TOKENS = frozenset({"x_pad_token", "cap_pad_token", "siglip_pad_token"})

_STACKS = ("noise_refiner", "context_refiner", "siglip_refiner", "layers")
_QKV = ("to_q", "to_k", "to_v")

# Components that differ between the layouts: ComfyUI's -> diffusers'. "2-1" is patch size 2, frame patch 1.
_TOP: dict[str, tuple[str, ...]] = {"x_embedder": ("all_x_embedder", "2-1"), "final_layer": ("all_final_layer", "2-1")}
_ATTENTION: dict[str, tuple[str, ...]] = {"out": ("to_out", "0"), "q_norm": ("norm_q",), "k_norm": ("norm_k",)}

_SECTION_GROUPS: dict[str, tuple[str, ...]] = {  # in canonical order
    "all_x_embedder": ("embedder",),
    "t_embedder": ("embedder",),
    "cap_embedder": ("embedder",),
    "siglip_embedder": ("siglip",),
    "x_pad_token": ("pad",),
    "cap_pad_token": ("pad",),
    "siglip_pad_token": ("siglip", "pad"),
    "noise_refiner": ("refiner", "noise_refiner"),
    "context_refiner": ("refiner", "context_refiner"),
    "siglip_refiner": ("siglip",),
    "layers": ("layers",),
    "norm_final": ("final",),
    "all_final_layer": ("final",),
}
_SECTIONS = tuple(_SECTION_GROUPS)
_BLOCK_GROUPS: dict[str, tuple[str, ...]] = {
    "attention.to_q": ("attention", "q"),
    "attention.to_k": ("attention", "k"),
    "attention.to_v": ("attention", "v"),
    "attention.to_out": ("attention", "out"),
    "attention.norm_q": ("attention", "norm"),
    "attention.norm_k": ("attention", "norm"),
    "feed_forward.w1": ("ffn",),
    "feed_forward.w2": ("ffn",),
    "feed_forward.w3": ("ffn",),
    "attention_norm1": ("norm",),
    "ffn_norm1": ("norm",),
    "attention_norm2": ("norm",),
    "ffn_norm2": ("norm",),
    "adaLN_modulation": ("adaln",),
}
_BLOCK_ORDER = tuple(_BLOCK_GROUPS)
_OTHER_NORMS = frozenset({"cap_embedder.0.weight", "siglip_embedder.0.weight", "norm_final.weight"})


class ZImage(Family):
    """Z-Image of any width and depth, Omni included.

    Groups overlap. ``layers`` means the main layers only; ``attention``, ``q``, ``k``, ``v``, ``out``,
    ``ffn``, ``adaln`` and ``norm`` run over every block, those of the refiners included.

    - ``refiner``: ``noise_refiner`` and ``context_refiner`` together; Omni's siglip_refiner is not in it.
    - ``siglip``: everything Omni adds (siglip_embedder, siglip_refiner, siglip_pad_token).
    - ``attention``: the whole attention module. ``q``, ``k``, ``v``, ``out`` are its projections only: the q and
      k norms are in ``attention`` and ``norm``, not in ``q`` or ``k``.
    - ``adaln``: the blocks' modulations and the final layer's.
    - ``norm``: every RMSNorm weight, so also ``cap_embedder.0.weight``, which is one in spite of its name.
    - ``embedder``: x_embedder, t_embedder, cap_embedder. ``pad``: the pad tokens.
    - ``final``: the final layer, and the unused ``norm_final.weight`` some ComfyUI files carry.
    """

    name = "Z-Image"
    layouts = ("comfyui", "diffusers")
    group_order = (
        *("refiner", "noise_refiner", "context_refiner", "layers"),
        *("attention", "q", "k", "v", "out", "ffn", "adaln", "norm"),
        *("embedder", "pad", "siglip", "final"),
    )
    unused = frozenset({"norm_final.weight"})
    vectors = PAD_TOKENS
    kept = "refiner"
    precise = frozenset({"refiner", "siglip", "norm", "adaln", "embedder", "pad", "final"})
    quantised_layout = "comfyui"  # ComfyUI does not join the scales of q, k and v
    # ``*`` is every tensor, embedders, pad tokens and final layer included; a later setting wins.
    presets = (
        Preset("refiners-kept", ("refiner=0",)),
        Preset("layers-only", ("*=0", "layers=1")),
        Preset("attention-only", ("*=0", "layers.attention=1")),
        Preset("ffn-only", ("*=0", "layers.ffn=1")),
        Preset("early-layers", ("*=0", "layers=linear(1,0)")),
        Preset("late-layers", ("*=0", "layers=linear(0,1)")),
    )
    overflows_fp16 = True
    gains_grow = True
    loads_are_known = True
    transformer = "ZImageTransformer2DModel"
    lookalike = Lookalike(
        name="Lumina-Image 2",
        width=2304,
        own=3840,
        reading=("attention.qkv", "attention.to_q", "feed_forward.w1", "feed_forward.w3"),
        fused="attention.qkv",
        word="lumina",
        own_words=("z-image", "z_image", "zimage"),
    )
    strangers: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("control_layers", "control_all_x_embedder", "control_noise_refiner"),
            "a ControlNet (tensor {tensor}) and not a diffusion transformer; give the transformer's own checkpoint here",
        ),
        "dec_net.cond_embed.weight": "a pixel-space derivative (tensor {tensor}), whose decoder is part of the model and cannot be merged with "
        "latent-space Z-Image; give a latent-space checkpoint here",
    }

    def groups(self, part: str, shape: tuple[int, ...]) -> frozenset[str]:
        """The groups of a part, from its name alone."""
        components = part.split(".")
        found = set(_SECTION_GROUPS.get(components[0], ()))
        found.update(_BLOCK_GROUPS.get(_in_block(components), ()))
        if part in _OTHER_NORMS:
            found.add("norm")
        if components[0] == "all_final_layer" and "adaLN_modulation" in components:
            found.add("adaln")
        return frozenset(found)

    def stored_name(self, part: str, layout: str) -> str:
        """The tensor that holds ``part``: in ``comfyui``, q, k and v share ``attention.qkv.weight``.

        Raises UsageError for another layout.
        """
        self.check_layout(layout)
        return part if layout == "diffusers" else _comfyui_name(part)

    def order(self, part: str) -> tuple[object, ...]:
        """Embedders, pad tokens, refiners, layers, final layer; inside a block as the forward pass reads."""
        components = part.split(".")
        inner = _in_block(components)
        module, _, leaf = part.rpartition(".")
        return (
            _rank(components[0], _SECTIONS),
            natural_key(components[1]) if inner else (),
            _rank(inner, _BLOCK_ORDER),
            natural_key(module),
            _rank(leaf, ("weight", "bias")),
            part,
        )

    def outputs(self, parts: Iterable[str], layout: str) -> list[tuple[str, tuple[str, ...]]]:
        """Stored tensors in canonical order with their parts; a fused ``qkv`` holds exactly q, k and v.

        Raises FamilyError when only some of q, k and v of a block are among ``parts`` and ``layout`` fuses them.
        """
        outputs = super().outputs(parts, layout)
        for tensor, names in outputs:
            wanted = _split_names(tensor) if layout == "comfyui" else None
            if wanted is not None and names != wanted:
                missing = ", ".join(quoted(name) for name in wanted if name not in names)
                raise FamilyError(
                    f"The comfyui layout stores q, k and v of a block as one tensor, but {missing} is missing "
                    f"for {quoted(tensor)}; take the missing tensors from another model, or use the diffusers layout."
                )
        return outputs

    def shows(self, tensors: Mapping[str, TensorInfo]) -> bool:
        """Told by ``cap_embedder.1.weight`` and the first noise refiner's k norm. Lumina2 has both: its caption embedder has 2304 rows and
        its modulation is ``adaLN_modulation.1``.
        """
        caption = tensors.get("cap_embedder.1.weight")
        attention = "noise_refiner.0.attention"
        if caption is None or not {f"{attention}.k_norm.weight", f"{attention}.norm_k.weight"} & tensors.keys():
            return False
        return "noise_refiner.0.adaLN_modulation.1.weight" not in tensors and caption.shape[:1] != (2304,)

    def read(
        self,
        names: Names,
        tensors: Mapping[str, TensorInfo],
        encodings: Mapping[str, Encoding],
        outside: Mapping[str, Part],
        *,
        source: str,
    ) -> Anatomy:
        """Weights that their container pads to whole blocks have their true shapes, which the model's vectors tell."""
        encodings = _unpadded(tensors, encodings, source=source)
        tensors = {
            name: TensorInfo(info.dtype, encodings[name].shape, info.begin, info.end) if name in encodings else info
            for name, info in tensors.items()
        }
        parts: dict[str, Part] = {}
        sides: list[str] = []
        codes = quant.side_tensors(names.own, encodings)
        heads = HeadRows(tensors, "noise_refiner.0.attention", source)
        for stored, name in names.own.items():
            if stored in codes:
                sides.append(stored)
                continue
            for part in _parts_of(stored, name, tensors[name], heads, encodings.get(name)):
                if part.name in parts:
                    raise FamilyError(
                        f'"{source}": tensors {quoted(parts[part.name].stored.tensor)} and {quoted(stored)} both hold '
                        f"{quoted(part.name)}, where one is wanted; the file mixes two layouts, so save it again in one."
                    )
                parts[part.name] = part
        layout = "comfyui" if "noise_refiner.0.attention.k_norm.weight" in tensors else "diffusers"
        return Anatomy(self, layout, names.prefix, parts, outside, tuple(sides))

    def parts_to_depth(self, depth: int, modules: Collection[str]) -> list[str]:
        """As diffusers names them; Omni's, which reads pictures too, where a module is one of those."""
        config = {"n_layers": depth, "n_refiner_layers": depth}
        if any(module.startswith("siglip_") for module in modules):
            config["siglip_feat_dim"] = 1152
        return list(reference_shapes(config, "diffusers"))

    def fp16_witness(self, anatomy: Anatomy) -> str | None:
        """The norm of the last layer but one."""
        name = f"layers.{_depth(anatomy.parts, 'layers') - 2}.ffn_norm1.weight"
        return name if name in anatomy.parts else None

    def config(self, anatomy: Anatomy) -> dict[str, Any] | None:
        """The transformer/config.json that goes with the shapes of ``anatomy``, for diffusers to load it.

        None when tensors that show a size are missing, or for heads of a width that no known model has: the shapes do
        not show how a width divides between the rotary axes.
        """
        shapes = {name: part.shape for name, part in anatomy.parts.items()}
        try:
            dim, patch = shapes["all_x_embedder.2-1.weight"]
            (head_dim,) = shapes["noise_refiner.0.attention.norm_k.weight"]
            (caption,) = shapes["cap_embedder.0.weight"]
            (siglip,) = shapes.get("siglip_embedder.0.weight", (None,))
        except (KeyError, ValueError):
            return None
        if head_dim not in AXES:
            return None
        return {
            "_class_name": self.transformer,
            **REFERENCE_CONFIG,
            "axes_dims": list(AXES[head_dim]),
            "in_channels": patch // 4,
            "dim": dim,
            "n_layers": _depth(shapes, "layers"),
            "n_refiner_layers": _depth(shapes, "noise_refiner"),
            "n_heads": dim // head_dim,
            "n_kv_heads": dim // head_dim,
            "cap_feat_dim": caption,
            "siglip_feat_dim": siglip,
        }


Z_IMAGE = ZImage()


def _unpadded(
    tensors: Mapping[str, TensorInfo], encodings: Mapping[str, Encoding], *, source: str
) -> dict[str, Encoding]:
    """``encodings`` with the true shapes of weights that their container pads to whole blocks; both under the model's own names.

    The model's vectors, which are never quantised, show its sizes. Raises FamilyError for a padded weight that no matrix
    of such a model becomes.
    """
    found = dict(encodings)
    for name, shape in _shapes_by_vectors(tensors).items():
        encoding = encodings.get(name)
        if encoding is None or encoding.shape == shape:
            continue
        if encoding.fits(shape):
            found[name] = encoding.cropped(shape)
        elif encoding.pads:
            raise FamilyError(
                f'"{source}": tensor {quoted(name)} holds {list(encoding.padded)} values as {encoding.label}, where a matrix '
                f"of {list(shape)} is wanted by the model's other tensors; use the unquantised original."
            )
    return found


def _shapes_by_vectors(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every matrix, derived from the vectors of the file; empty where one of them is missing."""
    comfyui = "noise_refiner.0.attention.k_norm.weight" in tensors
    layout, norm = ("comfyui", "k_norm") if comfyui else ("diffusers", "norm_k")
    final = "final_layer" if comfyui else "all_final_layer.2-1"
    vectors = ("cap_embedder.0.weight", f"{final}.linear.bias", "noise_refiner.0.attention_norm1.weight")
    try:
        caption, patch, dim = (tensors[name].shape[0] for name in vectors)
        head = tensors[f"noise_refiner.0.attention.{norm}.weight"].shape[0]
        omni = tensors.get("siglip_embedder.0.weight")
        siglip = None if omni is None else omni.shape[0]
    except (KeyError, IndexError):
        return {}
    if not 0 < head <= dim:
        return {}
    config = {
        "dim": dim,
        "n_heads": dim // head,
        "cap_feat_dim": caption,
        "in_channels": patch // 4,
        "n_layers": _depth(tensors, "layers"),
        "n_refiner_layers": _depth(tensors, "noise_refiner"),
        "siglip_feat_dim": siglip,
    }
    return {name: shape for name, shape in reference_shapes(config, layout).items() if len(shape) == 2}


def _parts_of(stored: str, name: str, info: TensorInfo, heads: HeadRows, encoding: Encoding | None) -> list[Part]:
    split = _split_names(name)
    if split is None:
        shape = (1, *info.shape) if name in PAD_TOKENS and len(info.shape) == 1 else info.shape
        rows = info.shape[0] if info.shape else 1
        return [Part(_canonical_name(name), shape, info.dtype, Slice(stored, 0, rows), encoding)]
    parts, row = [], 0
    for part, rows in zip(split, heads.split(name), strict=True):
        parts.append(Part(part, (rows, *info.shape[1:]), info.dtype, Slice(stored, row, rows), encoding))
        row += rows
    return parts


def _in_block(components: list[str]) -> str:
    """What a tensor is inside its block, e.g. ``attention.to_q``; empty outside the numbered blocks."""
    if len(components) < 4 or components[0] not in _STACKS or not is_number(components[1]):
        return ""
    return ".".join(components[2:4]) if components[2] in ("attention", "feed_forward") else components[2]


def _split_names(name: str) -> tuple[str, ...] | None:
    """The parts of a fused tensor in row order, or None for any other tensor."""
    components = name.split(".")
    if len(components) != 5 or _in_block(components) != "attention.qkv" or components[4] not in ("weight", "bias"):
        return None
    return tuple(".".join([*components[:3], projection, components[4]]) for projection in _QKV)


def _canonical_name(name: str) -> str:
    """The diffusers name of a tensor that either layout may have named; unknown names stay."""
    components = name.split(".")
    if components[0] in _TOP:
        return ".".join([*_TOP[components[0]], *components[1:]])
    if _in_block(components).startswith("attention."):
        return ".".join([*components[:3], *_ATTENTION.get(components[3], components[3:4]), *components[4:]])
    return name


def _comfyui_name(part: str) -> str:
    """The ComfyUI name of a part; of q, k and v the fused tensor they are stored in."""
    components = part.split(".")
    for theirs, ours in _TOP.items():
        if tuple(components[:2]) == ours:
            return ".".join([theirs, *components[2:]])
    if _in_block(components).startswith("attention."):
        if components[3] in _QKV and components[4:] in (["weight"], ["bias"]):
            return ".".join([*components[:3], "qkv", components[4]])
        for theirs, ours in _ATTENTION.items():
            if tuple(components[3 : 3 + len(ours)]) == ours:
                return ".".join([*components[:3], theirs, *components[3 + len(ours) :]])
    return part


def _depth(names: Iterable[str], stack: str) -> int:
    """How many numbered blocks the stack has."""
    paths = (name.split(".", 2) for name in names)
    return len({path[1] for path in paths if len(path) == 3 and path[0] == stack and is_number(path[1])})


def _rank(name: str, order: tuple[str, ...]) -> int:
    return order.index(name) if name in order else len(order)


AXES: Mapping[int, tuple[int, int, int]] = {128: (32, 48, 48), 32: (8, 12, 12)}
"""Head width -> how it divides between the rotary axes: of the real model, and of the embedded ones."""

# transformer/config.json of Z-Image, Z-Image-Turbo and their fine-tunes; Omni has siglip_feat_dim 1152.
REFERENCE_CONFIG: Mapping[str, Any] = {
    "all_patch_size": [2],
    "all_f_patch_size": [1],
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "cap_feat_dim": 2560,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "siglip_feat_dim": None,
}


def reference_shapes(config: Mapping[str, Any], layout: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Z-Image transformer with its shape, in canonical order, without prefix.

    ``config`` is a transformer's config.json; keys it lacks are taken from ``REFERENCE_CONFIG``. Shapes follow
    diffusers' ``ZImageTransformer2DModel``, which gives k and v as many heads as q whatever ``n_kv_heads`` says.

    Example: ``reference_shapes(REFERENCE_CONFIG, "comfyui")`` has 453 entries of together 6,154,908,736 elements.
    Raises UsageError for an unknown layout.
    """
    parts = _reference_parts({**REFERENCE_CONFIG, **config})
    shapes = {}
    for tensor, names in Z_IMAGE.outputs(parts, layout):
        rows = sum(parts[name][0] for name in names)
        shapes[tensor] = (rows, *parts[names[0]][1:])
    return shapes


def _reference_parts(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    dim, caption, siglip = config["dim"], config["cap_feat_dim"], config["siglip_feat_dim"]
    patch = config["all_patch_size"][0] ** 2 * config["all_f_patch_size"][0] * config["in_channels"]
    modulation = min(dim, 256)  # width of the time embedding; 256 and 1024 below are constants of the model's code
    parts: dict[str, tuple[int, ...]] = {
        **_linear("all_x_embedder.2-1", dim, patch),
        **_linear("t_embedder.mlp.0", 1024, 256),
        **_linear("t_embedder.mlp.2", modulation, 1024),
        "cap_embedder.0.weight": (caption,),
        **_linear("cap_embedder.1", dim, caption),
        "x_pad_token": (1, dim),
        "cap_pad_token": (1, dim),
        **_linear("all_final_layer.2-1.linear", patch, dim),
        **_linear("all_final_layer.2-1.adaLN_modulation.1", dim, modulation),
    }
    depths = {"noise_refiner": config["n_refiner_layers"], "context_refiner": config["n_refiner_layers"]}
    if siglip is not None:
        parts |= {"siglip_embedder.0.weight": (siglip,), **_linear("siglip_embedder.1", dim, siglip)}
        parts["siglip_pad_token"] = (1, dim)
        depths["siglip_refiner"] = config["n_refiner_layers"]
    for stack, depth in {**depths, "layers": config["n_layers"]}.items():
        for block in range(depth):
            parts |= _block_parts(f"{stack}.{block}", dim, dim // config["n_heads"])
            if stack in ("noise_refiner", "layers"):
                parts |= _linear(f"{stack}.{block}.adaLN_modulation.0", 4 * dim, modulation)
    return parts


def _block_parts(block: str, dim: int, head_dim: int) -> dict[str, tuple[int, ...]]:
    hidden = int(dim / 3 * 8)
    attention = {f"{block}.attention.{projection}.weight": (dim, dim) for projection in (*_QKV, "to_out.0")}
    norms = {f"{block}.{norm}{n}.weight": (dim,) for norm in ("attention_norm", "ffn_norm") for n in (1, 2)}
    return {
        **attention,
        f"{block}.attention.norm_q.weight": (head_dim,),
        f"{block}.attention.norm_k.weight": (head_dim,),
        f"{block}.feed_forward.w1.weight": (hidden, dim),
        f"{block}.feed_forward.w2.weight": (dim, hidden),
        f"{block}.feed_forward.w3.weight": (hidden, dim),
        **norms,
    }


def _linear(module: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{module}.weight": (rows, columns), f"{module}.bias": (rows,)}
