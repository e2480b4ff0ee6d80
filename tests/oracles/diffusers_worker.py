"""The process that one release of diffusers runs in: loads LoRAs onto a transformer or a UNet of zeros, so that fusing leaves their change."""

from __future__ import annotations

import ast
import inspect
import re
import warnings
from functools import lru_cache
from typing import Any

import diffusers
import torch
import transformers
from safetensors.torch import save_file

from tests.oracles.worker import serve

LAYER = re.compile(r"\.lora_A\.|\.lokr_")
MAGNITUDES = ".lora_magnitude_vector."


def load(lora: str, name: str, out: str, pipeline: str, model: str, config: dict[str, Any]) -> dict[str, Any]:
    """Loads the file ``name`` in the folder ``lora`` and writes the change of every module that got a layer, as ``MODULE.weight`` and ``MODULE.bias``.

    ``version`` is the release's own word; ``magnitudes`` are modules whose DoRA magnitudes were loaded. Raises what diffusers raises.
    """
    transformer = zeroed(model, repr(config))
    made_by = getattr(diffusers, pipeline)
    pipe = made_by(**components(made_by, transformer))
    try:
        pipe.load_lora_weights(lora, weight_name=name)
    except BaseException:
        zeroed.cache_clear()  # with half a LoRA in it
        raise
    names = [parameter for parameter, _ in transformer.named_parameters()]
    layers = sorted({LAYER.split(parameter)[0] for parameter in names if LAYER.search(parameter)})
    magnitudes = sorted({parameter.split(MAGNITUDES)[0] for parameter in names if MAGNITUDES in parameter})
    if layers:
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    state = transformer.state_dict()
    biases = [f"{layer}.bias" for layer in layers if f"{layer}.bias" in state and state[f"{layer}.bias"].any()]
    changed = [*(f"{layer}.weight" for layer in layers), *biases]
    save_file({name: state[name].clone() for name in changed}, out)
    for name in changed:
        state[name].zero_()
    return {"version": diffusers.__version__, "magnitudes": magnitudes}


def load_encoders(
    lora: str, name: str, out: str, pipeline: str, model: str, config: dict[str, Any], sizes: list[dict[str, Any]]
) -> dict[str, Any]:
    """The same for a pipeline with text encoders of CLIP's class and these ``sizes``: writes their changes, under ``text_encoder.`` and ``text_encoder_2.``."""
    made_by = getattr(diffusers, pipeline)
    given = components(made_by, zeroed(model, repr(config)))
    names = [name for name in given if name.startswith("text_encoder")]
    made = {name: _encoder(size, projects=i > 0) for i, (name, size) in enumerate(zip(names, sizes, strict=True))}
    try:
        pipe = made_by(**{**given, **made})
        pipe.load_lora_weights(lora, weight_name=name)
        pipe.fuse_lora(components=["unet" if "unet" in given else "transformer", *names])
        pipe.unload_lora_weights()
    finally:
        zeroed.cache_clear()
    changed = {
        f"{name}.{part}": value.clone()
        for name, encoder in made.items()
        for part, value in encoder.state_dict().items()
        if value.any()
    }
    save_file(changed, out)
    return {"version": diffusers.__version__}


def _encoder(size: dict[str, Any], *, projects: bool) -> Any:
    kind = transformers.CLIPTextModelWithProjection if projects else transformers.CLIPTextModel
    found = kind(transformers.CLIPTextConfig(**size)).requires_grad_(False)
    for parameter in found.parameters():
        parameter.zero_()
    return found


def components(pipeline: Any, transformer: Any) -> dict[str, Any]:
    """A pipeline's arguments: nothing but the transformer, or the UNet."""
    wanted = inspect.signature(pipeline.__init__).parameters
    models = ("transformer", "unet")
    return {
        name: transformer if name in models else None
        for name, parameter in wanted.items()
        if name in models or (name != "self" and parameter.default is inspect.Parameter.empty)
    }


@lru_cache(maxsize=1)
def zeroed(model: str, config: str) -> Any:
    """A transformer of a class and config (its ``repr``) whose parameters are all zero."""
    with torch.device("meta"):
        found = getattr(diffusers, model).from_config(ast.literal_eval(config))
    found = found.to_empty(device="cpu").requires_grad_(False)
    for parameter in found.parameters():
        parameter.zero_()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    serve({"load": load, "load_encoders": load_encoders})
