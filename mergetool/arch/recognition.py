"""From a file's tensor names to its anatomy: which family it is, or why it is not a model at all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from mergetool.arch import generic, z_image
from mergetool.arch.anatomy import Anatomy
from mergetool.checkpoint.dtypes import F32
from mergetool.checkpoint.header import TensorInfo
from mergetool.checkpoint.names import quoted
from mergetool.errors import FamilyError
from mergetool.quant.encoding import Encoding

# Key endings of the LoRA dialects: PEFT, kohya, diffusers' old one, LoHa, LoKr, full differences, DoRA.
_LORA = re.compile(
    r"""(?: (?:^|[._]) lora_(?:A|B|up|down|mid) (?:\.[^.]+)? (?:\.weight)?
          | [._]lora(?:_linear_layer)?\.(?:up|down)\.weight
          | [._](?:hada_[wt]\d(?:_[ab])? | lokr_[wt]\d(?:_[ab])?)
          | \.(?:diff|diff_b|dora_scale) )$""",
    re.VERBOSE,
)

_CONTROLNET = frozenset({"control_layers", "control_all_x_embedder", "control_noise_refiner"})


def recognise(
    tensors: Mapping[str, TensorInfo], *, source: str, encodings: Mapping[str, Encoding] = MappingProxyType({})
) -> Anatomy:
    """What the tensor names of a file mean: Z-Image in either layout, else the generic family.

    ``tensors`` is a header's table in file order, ``encodings`` its quantised weights (`quant.encodings`); ``source`` names
    the file in messages. Raises FamilyError for a file that is no model to merge (a LoRA, a ControlNet, a pixel-space
    derivative, no tensors at all), and for a Z-Image file whose tensors contradict each other.
    """
    _refuse_other_files(tensors, source)
    values = _values(tensors, encodings)
    prefix = z_image.find_prefix(values, source=source)
    if prefix is None:
        return generic.anatomy_of(values, encodings)
    encodings = z_image.unpadded(values, encodings, prefix, source=source)
    return z_image.anatomy_of(_values(tensors, encodings), prefix, encodings, source=source)


def _values(tensors: Mapping[str, TensorInfo], encodings: Mapping[str, Encoding]) -> dict[str, TensorInfo]:
    """The table with quantised weights as the float32 matrices that their codes stand for."""
    return {
        name: TensorInfo(F32, encodings[name].shape, info.begin, info.end) if name in encodings else info
        for name, info in tensors.items()
    }


def _refuse_other_files(tensors: Mapping[str, TensorInfo], source: str) -> None:
    if not tensors:
        raise FamilyError(f'"{source}" has no tensors, where a model is wanted; check that it is the right file.')
    for stored in tensors:
        if _LORA.search(stored):
            raise FamilyError(
                f'"{source}" is a LoRA file (tensor {quoted(stored)}) and not a model; give a whole checkpoint here.'
            )
        name = _without_prefix(stored)
        if name.split(".")[0] in _CONTROLNET:
            raise FamilyError(
                f'"{source}" is a ControlNet (tensor {quoted(stored)}) and not a diffusion transformer; give the '
                "transformer's own checkpoint here."
            )
        if name == "dec_net.cond_embed.weight":
            raise FamilyError(
                f'"{source}" is a pixel-space derivative (tensor {quoted(stored)}), whose decoder is part of the model '
                "and cannot be merged with latent-space Z-Image; give a latent-space checkpoint here."
            )


def _without_prefix(stored: str) -> str:
    for prefix in z_image.PREFIXES:
        if stored.startswith(prefix):
            return stored.removeprefix(prefix)
    return stored
