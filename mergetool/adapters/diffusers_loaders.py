"""The classes of diffusers that load LoRAs, by name, and their treatment of keys.

A family's pipelines have the name of the class.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial

from mergetool.adapters import (
    flux2_in_diffusers,
    flux_in_diffusers,
    in_diffusers,
    lumina2_in_diffusers,
    qwen_in_diffusers,
    sd3_in_diffusers,
    unet_in_diffusers,
    wan_in_diffusers,
)


@dataclass(frozen=True, slots=True)
class DiffusersLoader:
    """A class of diffusers, in the ``releases`` that the tests run, oldest first.

    ``modules`` are those that get a layer, with their keys; it raises ``in_diffusers.Rejected``. ``alphas_are_read`` says whether ``.alpha`` tensors count,
    ``takes_header`` whether a file with these keys may state ranks and scales in its header.
    ``alphas_given`` which alpha every module gets where they do, of those that the modules have, in the file's order. A loader that ``multiplies_alphas``
    puts them into the factors; of another they become the config, beside which a header's is an error. ``exchanged`` tells of the keys of a module whether
    it gets its halves in the wrong order.
    """

    releases: tuple[str, ...]
    modules: Callable[[Collection[str], str], dict[str, set[str]]]
    alphas_are_read: Callable[[Collection[str], str], bool]
    takes_header: Callable[[Collection[str]], bool] = lambda keys: True
    alphas_given: Callable[[Mapping[str, float | None]], dict[str, float | None]] = dict
    multiplies_alphas: bool = True
    exchanged: Callable[[Collection[str]], bool] = lambda keys: False


LOADERS: Mapping[str, DiffusersLoader] = {
    "ZImageLoraLoaderMixin": DiffusersLoader(in_diffusers.RELEASES, in_diffusers.modules, in_diffusers.alphas_are_read),
    "FluxLoraLoaderMixin": DiffusersLoader(
        flux_in_diffusers.RELEASES,
        flux_in_diffusers.modules,
        flux_in_diffusers.alphas_are_read,
        flux_in_diffusers.takes_header,
    ),
    "Flux2LoraLoaderMixin": DiffusersLoader(
        flux2_in_diffusers.RELEASES,
        flux2_in_diffusers.modules,
        lambda keys, release: True,
        exchanged=flux2_in_diffusers.exchanged,
    ),
    "QwenImageLoraLoaderMixin": DiffusersLoader(
        qwen_in_diffusers.RELEASES, qwen_in_diffusers.modules, lambda keys, release: True
    ),
    "Lumina2LoraLoaderMixin": DiffusersLoader(
        lumina2_in_diffusers.RELEASES, lumina2_in_diffusers.modules, lambda keys, release: False
    ),
    "SD3LoraLoaderMixin": DiffusersLoader(
        sd3_in_diffusers.RELEASES, sd3_in_diffusers.modules, lambda keys, release: False
    ),
    "StableDiffusionLoraLoaderMixin": DiffusersLoader(
        in_diffusers.RELEASES[-1:],
        partial(unet_in_diffusers.modules, loader=unet_in_diffusers.SD1),
        lambda keys, release: True,
        unet_in_diffusers.takes_header,
        unet_in_diffusers.alphas_given,
        multiplies_alphas=False,
    ),
    "WanLoraLoaderMixin": DiffusersLoader(
        wan_in_diffusers.RELEASES,
        wan_in_diffusers.modules,
        lambda keys, release: True,
        wan_in_diffusers.takes_header,
    ),
    "StableDiffusionXLLoraLoaderMixin": DiffusersLoader(
        in_diffusers.RELEASES,
        unet_in_diffusers.modules,
        lambda keys, release: True,
        unet_in_diffusers.takes_header,
        unet_in_diffusers.alphas_given,
        multiplies_alphas=False,
    ),
}
