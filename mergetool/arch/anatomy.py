"""A checkpoint's anatomy: its parts, their places in the file, and the family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from mergetool.arch.prefixes import spelled
from mergetool.arch.sampling import SamplingDefaults
from mergetool.arch.signs import Fp16, Stock
from mergetool.checkpoint.dtypes import DType
from mergetool.checkpoint.header import TensorInfo
from mergetool.errors import UsageError
from mergetool.quant.encoding import Encoding


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows ``[row, row + rows)`` of dimension 0 of the stored tensor ``tensor``.

    A whole tensor is ``row=0, rows=shape[0]`` of its *stored* shape, and ``rows=1`` for a scalar.
    """

    tensor: str
    row: int
    rows: int


@dataclass(frozen=True, slots=True)
class Part:
    """The smallest thing a merge or a LoRA addresses: one parameter under its canonical name.

    ``name`` is the diffusers name without prefix (q, k and v apart). ``shape`` is the canonical shape: a pad
    token is [1, D] even where the file stores [D]; the bytes are the same. ``encoding`` is that of the whole stored
    weight where it is quantised; ``dtype`` is then what its values are read as, float32.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    stored: Slice
    encoding: Encoding | None = None

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Stored bytes, with the scales of a quantised weight; the format admits whole bytes only."""
        if self.encoding is not None:
            return sum(span.size for span in self.encoding.spans(0, self.numel // self.encoding.width))
        return self.numel * self.dtype.bits // 8

    @classmethod
    def whole(cls, stored: str, info: TensorInfo, encoding: Encoding | None = None) -> Part:
        """A stored tensor under its own name."""
        return cls(stored, info.shape, info.dtype, Slice(stored, 0, info.shape[0] if info.shape else 1), encoding)


@dataclass(frozen=True)
class Anatomy:
    """The meaning of one file's tensor names; made by ``recognise``.

    ``prefix`` stands before every model tensor in the file; of several it is what they have in common. ``parts`` maps canonical
    names to parts, in file order. ``outside`` maps the stored tensors that are not of the model, a bundled VAE or text encoder, to
    each as a whole; see `arch.bundled`. ``sides`` lists the markers and scales of the quantised weights. ``beside`` names the parts that
    are not of the model: text encoders', once `arch.encoders` made them parts.
    """

    family: Family
    layout: str
    prefix: str
    parts: Mapping[str, Part]
    outside: Mapping[str, Part] = field(default_factory=dict)
    sides: tuple[str, ...] = ()
    beside: frozenset[str] = frozenset()

    @property
    def own(self) -> Mapping[str, Part]:
        """The model's parts, without those beside it."""
        return (
            {name: part for name, part in self.parts.items() if name not in self.beside} if self.beside else self.parts
        )

    def alone(self) -> Anatomy:
        """The same without the parts beside the model."""
        return replace(self, parts=self.own, beside=frozenset()) if self.beside else self

    def stored_parts(self, *, beside: bool = False) -> dict[str, tuple[str, ...]]:
        """Stored tensor name -> its parts in row order, those of the model or those ``beside`` it.

        Tensors are in file order, prefix included.
        """
        rows: dict[str, list[Part]] = {}
        for part in (part for name, part in self.parts.items() if (name in self.beside) == beside):
            rows.setdefault(part.stored.tensor, []).append(part)
        return {
            tensor: tuple(part.name for part in sorted(parts, key=lambda part: part.stored.row))
            for tensor, parts in rows.items()
        }

    def outputs(self, layout: str) -> list[tuple[str, tuple[str, ...]]]:
        """Stored tensors of ``layout`` in canonical order, each with its parts.

        Names have no prefix; parts that the model never reads are in none.

        Raises UsageError for a layout the family does not have, FamilyError when a tensor would be incomplete.
        """
        found = self.family.outputs((name for name in self.own if name not in self.family.unused), layout)
        if not self.family.keeps_names:
            return found
        return [(spelled(self.parts[parts[0]].stored.tensor, self.prefix), parts) for _, parts in found]


@dataclass(frozen=True, slots=True)
class Preset:
    """``preset:NAME`` and its ``settings``, in order, each as ``multipliers`` takes it.

    Those with the same ``kind`` are listed together, by name.
    """

    name: str
    settings: tuple[str, ...]
    kind: str = ""


NATIVE = ("diffusion_model.", "lora_unet_")
"""Prefixes of LoRAs' keys behind which ComfyUI knows its own names, in every family."""


@dataclass(frozen=True, slots=True)
class Lookalike:
    """A family whose LoRAs have the same names as another's.

    Its LoRAs are told by the ``widths`` of its main stream, not ``own``, and by words in the header.

    ``reading`` are the ends of modules that read the main stream; ``fused`` is one that has not ``ratio`` times as many rows as columns there.
    """

    name: str
    widths: frozenset[int]
    own: int
    reading: tuple[str, ...]
    fused: str
    ratio: int
    word: str
    own_words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class InputEmbedder:
    """The weight ``part`` embeds a model's input: a plain model's channels come first.

    They lie along dimension 1. Models for inpainting, editing or control have those of a mask or of other pictures behind. A plain model has as many as ``output``, the
    weight that makes its result, has rows for each of ``patch`` places.
    """

    part: str
    output: str
    patch: int = 1


class Family(ABC):
    """An architecture: its layouts, its groups, and the names of its parts in each layout.

    Families hold no state; there is one instance of each, so ``a.family is b.family`` compares them.
    """

    name: str
    layouts: tuple[str, ...]
    group_order: tuple[str, ...]
    unused: frozenset[str] = frozenset()  # parts some files carry that the model never reads
    main: str = ""  # the group of the main blocks, which tell relatives from strangers; all parts where there is none
    untrained: str = ""  # the group of tables that strangers have in common
    kept: str = ""  # the group that merges keep of one model, and that totals of a comparison leave out
    quantised: frozenset[str] = frozenset({"attention", "ffn"})  # groups whose matrices may be quantised
    precise: frozenset[str] = frozenset(
        {"refiner", "norm", "adaln", "embedder", "pad", "final"}
    )  # those whose never are
    unquantised: frozenset[str] = frozenset()  # parts that never are, since programs read a size off their stored shape
    quantised_layout: str | None = None  # the layout that a quantised file must have
    presets: tuple[Preset, ...] = ()
    caveat = ""  # what is not known of its models, for those who see one
    fp16: Fp16 = "computed"  # what the programs that run its models do with fp16
    stock: tuple[Stock, ...] = ()  # published models that others build on; of several whose words a name has the first
    gains_grow = False  # whether training moves the gains of norms away from 1, which tells a parent from its child
    keeps_names = False  # whether a tensor is written under the name it has: a family without a table of names
    loader: str | None = None  # diffusers' class that loads its LoRAs, where what that does is known and tested
    encoders: tuple[str, ...] = ()  # its text encoders, as ComfyUI calls them, in the order in which LoRAs count them
    component = "transformer"  # what diffusers' pipelines call the model, and its LoRAs put before names
    lora_prefix = "diffusion_model."  # what stands before names in files that diffusers and ComfyUI both load whole: diffusers' own, and kohya-type
    # trainers' behind "lora_unet_"
    lora_layout: Literal["diffusers", "comfyui"] = "diffusers"  # whose names those are
    lora_alphas = (
        True  # whether such files may hold alphas: diffusers takes that of one module for others whose names end alike
    )
    in_comfyui: frozenset[str] = (
        frozenset()
    )  # prefixes before which ComfyUI knows diffusers' names; its own have two in every family
    # parts of which control LoRAs have so many columns, more than models: programs add zeros
    widened: ClassVar[Mapping[str, int]] = MappingProxyType({})
    sign_of_control: str | None = None  # a key by which ComfyUI knows a control LoRA whose names are its own, bare
    sign_of_fun: str | None = None  # a key by which ComfyUI knows a LoRA of VideoX-Fun, whose prefix it mends
    flat_layout = "comfyui"  # the layout of the names that kohya-type trainers write, with underscores
    # one of these, or all of one tuple, is in names of every LoRA of the family, where other families share the rest
    lora_signs: tuple[str | tuple[str, ...], ...] = ()
    lora_widths: frozenset[int] = frozenset()  # columns that show such a LoRA too
    transformer: str | None = None  # diffusers' class of the model, where the sampler draws with it
    sampling: tuple[
        SamplingDefaults, ...
    ] = ()  # how pipelines of diffusers draw with it; the first that fits is a folder's
    lookalike: Lookalike | None = None  # another family whose LoRAs have the same names
    strangers: ClassVar[Mapping[str, str]] = {}  # first components, and whole names, of other files: what those are

    # kinds of files that steer its models, with the names or first components that tell each; the first that fits is a file's
    controls: tuple[tuple[str, tuple[str, ...]], ...] = ()
    copy_of: Family | None = None  # the family of whose model's encoder its own began as a copy, under the same names
    input_embedder: InputEmbedder | None = None  # where models with other inputs are wider

    def is_vector(self, part: str) -> bool:
        """Whether a part is neither a weight nor a bias of a module. No program applies a LoRA's change to it."""
        return False

    @abstractmethod
    def groups(self, part: str, shape: tuple[int, ...]) -> frozenset[str]:
        """The groups a part belongs to. Groups overlap."""

    @abstractmethod
    def stored_name(self, part: str, layout: str) -> str:
        """The tensor that holds ``part`` in ``layout``, without prefix.

        Raises UsageError for a layout the family does not have.
        """

    @abstractmethod
    def order(self, part: str) -> tuple[object, ...]:
        """Sort key of a part in the canonical order of the family; a total order on names."""

    def outputs(self, parts: Iterable[str], layout: str) -> list[tuple[str, tuple[str, ...]]]:
        """Stored tensors of ``layout`` in canonical order, each with its parts in row order.

        Every part appears exactly once, and the result does not depend on the order of ``parts``. Raises
        UsageError for a layout the family does not have, FamilyError when a tensor would be incomplete.
        """
        return list(self.held(parts, layout).items())

    def held(self, parts: Iterable[str], layout: str) -> dict[str, tuple[str, ...]]:
        """Stored tensors of ``layout`` that hold any of ``parts``, in canonical order.

        Each comes with those that it holds, in row order.

        Raises UsageError for a layout the family does not have.
        """
        stored: dict[str, list[str]] = {}
        for part in sorted(set(parts), key=self.order):
            stored.setdefault(self.stored_name(part, layout), []).append(part)
        return {tensor: tuple(names) for tensor, names in stored.items()}

    def pieces(self, part: str, layout: str) -> tuple[str, ...]:
        """The parts, in row order, of the tensor that holds ``part`` in ``layout``.

        It is ``part`` alone where it is not fused.
        """
        return (part,)

    def rows_by_columns(self, part: str, columns: int | None) -> int | None:
        """The rows of a piece of a fused weight of so many ``columns``; None if unknown."""
        return None

    def rows_beside(self, part: str, rows: Mapping[str, int]) -> int | None:
        """The rows of a piece of a fused tensor of which others have ``rows``; None if unknown."""
        return next(iter(rows.values()), None)

    def alternative(self, part: str, module: str, rows: int, columns: int) -> tuple[str, ...]:
        """The parts, in row order, that a LoRA's ``module`` changes by its rows and columns.

        They are others than ``part`` where a block has another tensor of its name.
        """
        return (part,)

    def aliases(self, parts: Collection[str]) -> dict[str, tuple[str, ...]]:
        """Other names of modules of ``parts`` in LoRAs: module -> parts in row order.

        A module may also be some of a part's rows.
        """
        return {}

    def modules_in_comfyui(self, part: str, prefix: str) -> list[str]:
        """ComfyUI's module names for ``part`` behind a LoRA's ``prefix``.

        They are its own names behind two prefixes, diffusers' behind ``in_comfyui``.
        """
        own, native = (self.stored_name(part, layout) for layout in ("diffusers", "comfyui"))
        aliases = [name for name, held in self.aliases([part]).items() if part in held]
        theirs = [own, *(name for name in aliases if name.split(".")[0] == part.split(".")[0])]
        ours = [native, *(name for name in aliases if name not in theirs)]
        return [*(ours if prefix in NATIVE else ()), *(theirs if prefix in self.in_comfyui else ())]

    def divided(self, parts: Collection[str], rows: int, columns: int | None) -> list[int]:
        """Divide a LoRA's ``rows`` of a fused tensor among its ``parts``, in row order.

        ``columns`` are those of its weight, None where they are unknown.

        This works as far as no model is needed.

        Raises ValueError, saying what was wanted, where they do not come out.
        """
        share, odd = divmod(rows, len(parts))
        if odd:
            raise ValueError(f"equal numbers of {len(parts)} parts")
        return [share] * len(parts)

    def group_names(self, anatomy: Anatomy) -> tuple[str, ...]:
        """The groups with a part of ``anatomy``: the family's in its order, others by name."""
        present = {group for part in anatomy.parts.values() for group in self.groups(part.name, part.shape)}
        known = [group for group in self.group_order if group in present]
        return (*known, *sorted(present.difference(known), key=natural_key))

    def block_of(self, part: str) -> tuple[str, int] | None:
        """The stack and number of a part's block, by its first numbered component; None without one.

        Example: ``layers.3.attention.to_q.weight`` gives ``("layers", 3)``.
        """
        components = part.split(".")
        for i, component in enumerate(components[:-1]):
            if i and is_number(component) and len(component) <= 9:
                return ".".join(components[:i]), int(component)
        return None

    def block_name(self, part: str) -> str | None:
        """The name of a part's block in block-weight tools, as ``IN04``; None without such tools."""
        return None

    def parts_to_depth(self, depth: int, modules: Collection[str]) -> list[str]:
        """The parts of a model with ``depth`` blocks a stack, as far as ``modules`` need them.

        There are none where the family does not say.
        """
        return []

    def markers(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Name the empty tensors that stand in a single file for entries of diffusers' ``config``."""
        return ()

    def variant(self, anatomy: Anatomy, config: Mapping[str, Any] | None = None) -> str | None:
        """Name the family's model that it is, ``schnell`` or ``Klein 4B``; None where nothing tells.

        ``config`` is the config.json beside it.
        """
        return None

    def in_fp16(self, anatomy: Anatomy) -> Fp16:
        """The way of programs with such a model in fp16."""
        return self.fp16

    def fp16_witness(self, anatomy: Anatomy) -> str | None:
        """The part that ComfyUI looks at before it computes in fp16."""
        return None

    def config(self, anatomy: Anatomy) -> dict[str, Any] | None:
        """The config.json that goes with the shapes of ``anatomy``; None where they do not tell."""
        return None

    def lora_module(self, part: str) -> str:
        """The module a LoRA for ``part`` addresses: its canonical name without ``.weight``.

        Example: ``layers.3.attention.to_q.weight`` gives ``layers.3.attention.to_q``. Raises ValueError for
        a bias, a pad token, or anything else that is not a module's weight.
        """
        if not part.endswith(".weight"):
            raise ValueError(f'"{part}" is not a module\'s weight, so a LoRA cannot address it')
        return part.removesuffix(".weight")

    def check_layout(self, layout: str) -> None:
        """Raise UsageError, listing the choices, unless the family has ``layout``."""
        if layout not in self.layouts:
            known = " or ".join(self.layouts)
            raise UsageError(f'The {self.name} family has no layout "{layout}"; choose {known}.')


@dataclass(frozen=True, slots=True)
class GroupSize:
    """The size of a group in a file: stored tensors it touches, parameters, bytes."""

    name: str
    tensors: int
    parameters: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Description:
    """Sizes of a whole model and of each of its groups. Groups overlap, so they do not sum to the total."""

    total: GroupSize
    groups: tuple[GroupSize, ...]


def describe(anatomy: Anatomy) -> Description:
    """Measure the model and each of its groups; text encoders count in no total.

    A tensor counts once for a group however many of its parts are in it: the fused ``qkv`` is one tensor of
    ``attention`` and one of ``q``; of its parameters only the q rows count for ``q``.
    """
    family = anatomy.family
    members: dict[str, list[Part]] = {group: [] for group in family.group_names(anatomy)}
    for part in anatomy.parts.values():
        for group in family.groups(part.name, part.shape):
            members[group].append(part)
    return Description(
        total=_size(family.name, anatomy.own.values()),
        groups=tuple(_size(group, parts) for group, parts in members.items()),
    )


def _size(name: str, parts: Iterable[Part]) -> GroupSize:
    chosen = list(parts)
    return GroupSize(
        name=name,
        tensors=len({part.stored.tensor for part in chosen}),
        parameters=sum(part.numel for part in chosen),
        nbytes=sum(part.nbytes for part in chosen),
    )


def is_number(component: str) -> bool:
    """True for a path component of ASCII digits only."""
    return component.isascii() and component.isdigit()


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts ``layers.2`` before ``layers.10``: components, numbers by value."""
    # Numbers compare by length and then by digits: int() refuses more than 4300 digits, and a name is untrusted.
    return tuple(
        (0, len(c.lstrip("0")), c.lstrip("0") + "/" + c) if is_number(c) else (1, 0, c) for c in name.split(".")
    )
