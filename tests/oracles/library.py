"""ComfyUI imported as a library on the processor, in a process of its own: no server, no torchvision, no torchaudio."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Packages that ComfyUI imports for sound and video only; PyPI's wheels of the first two do not import beside a CPU torch."""

    NAMES: tuple[str, ...] = ("torchvision", "torchaudio", "av")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.NAMES else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        def attribute(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module = types.ModuleType(spec.name)
        module.__path__ = []
        module.__getattr__ = attribute  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def load(root: Path) -> None:
    """Makes ``import comfy`` mean the source in ``root``, on the processor, for models of any width."""
    sys.meta_path.insert(0, Stubs())
    sys.path.append(str(root))  # last: ComfyUI has folders "tests" and "utils" of its own
    import comfy.options

    comfy.options.args_parsing = False
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import torch

    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    allow_small()


def allow_small() -> None:
    """Lets ComfyUI take Z-Image, Lumina-Image 2, SD1.5, SDXL, Qwen-Image and Chroma of any size: widths and numbers of blocks from the file, the rest as it sets it.

    ComfyUI tells Z-Image from Lumina 2 by the width alone, and asks for a time embedder of min(width, 1024) where Z-Image's has 1024. SDXL is a table's
    row of widths and depths; Qwen-Image always has 24 heads, and Chroma's approximator one size. At the published widths nothing is changed.
    """
    import comfy.ldm.lumina.model as lumina
    import comfy.model_detection as detection
    import comfy.supported_models as supported

    original, embedder = detection.detect_unet_config, lumina.TimestepEmbedder

    def detect(sd: dict[str, Any], prefix: str, metadata: Any = None) -> dict[str, Any] | None:
        found = original(sd, prefix, metadata=metadata)
        if found and found.get("image_model") == "lumina2" and found["dim"] not in (2304, 3840):
            found.update(_small({name.removeprefix(prefix): tensor.shape for name, tensor in sd.items()}))
        if found and found.get("image_model") == "qwen_image":
            dim, context = sd[f"{prefix}txt_in.weight"].shape
            found.update({"num_attention_heads": dim // 128, "joint_attention_dim": context} if dim != 3072 else {})
        if found and found.get("image_model") == "chroma" and found["hidden_size"] != 3072:
            inner = len(sd[f"{prefix}distilled_guidance_layer.in_proj.bias"])
            layers = {name.split(".")[-3] for name in sd if name.endswith(".in_layer.bias")}
            found.update({"out_dim": found["hidden_size"], "hidden_dim": inner, "n_layers": len(layers)})
        return found

    matches = supported.ZImage.matches.__func__
    any_unet = supported.SDXL.matches.__func__

    def is_z_image(cls: Any, config: dict[str, Any], *args: Any, **how: Any) -> bool:
        if cls is supported.ZImage:
            is_other = config.get("dim") == 2304 or "z_image_modulation" not in config
            config = {**config, "dim": 2304 if is_other else 3840}
        return bool(matches(cls, config, *args, **how))

    def is_sdxl(cls: Any, config: dict[str, Any], *args: Any, **how: Any) -> bool:
        if cls is supported.SDXL and config.get("model_channels") != 320:
            config = {**config, **{key: cls.unet_config[key] for key in ("model_channels", "transformer_depth")}}
        if cls is supported.SD15 and config.get("context_dim") == 768:
            config = {**config, "model_channels": 320}
        return bool(any_unet(cls, config, *args, **how))

    def embed(hidden: int, output_size: int | None = None, **how: Any) -> Any:
        return embedder(1024, output_size=min(output_size, hidden), **how) if output_size else embedder(hidden, **how)

    detection.detect_unet_config = detect
    supported.ZImage.matches = classmethod(is_z_image)
    supported.SDXL.matches = supported.SD15.matches = classmethod(is_sdxl)
    lumina.TimestepEmbedder = embed


def _small(shapes: dict[str, Any]) -> dict[str, Any]:
    (head,) = shapes["noise_refiner.0.attention.k_norm.weight"]
    (dim,) = shapes["noise_refiner.0.attention_norm1.weight"]
    if "noise_refiner.0.adaLN_modulation.1.weight" in shapes:
        return {
            "n_heads": dim // head,
            "n_kv_heads": (shapes["noise_refiner.0.attention.qkv.weight"][0] - dim) // 2 // head,
            "axes_dims": [head // 4, head * 3 // 8, head * 3 // 8],
            "axes_lens": [300, 512, 512],
            "rope_theta": 10000.0,
            "ffn_dim_multiplier": 4.0,
        }
    return {
        "n_refiner_layers": len({name.split(".")[1] for name in shapes if name.startswith("noise_refiner.")}),
        "n_heads": dim // head,
        "n_kv_heads": dim // head,
        "axes_dims": [head // 4, head * 3 // 8, head * 3 // 8],
        "axes_lens": [1536, 512, 512],
        "rope_theta": 256.0,
        "ffn_dim_multiplier": 8 / 3,
        "multiple_of": 1,
        "z_image_modulation": True,
        "time_scale": 1000.0,
        **({"pad_tokens_multiple": 32} if "cap_pad_token" in shapes else {}),
    }
