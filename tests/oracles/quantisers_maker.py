"""The process that other libraries quantise in: writes every case of ``quantisers`` into the folder that is its argument."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.oracles.quantisers import CASES
from tests.quant.files import weight

Made = tuple[dict[str, torch.Tensor], torch.Tensor]


def bitsandbytes_4bit(matrix: torch.Tensor, how: dict[str, Any]) -> Made:
    """What ``Linear4bit`` saves of a matrix, quantised by bitsandbytes' CPU kernels."""
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(matrix, **how)
    sides = {f"weight.{leaf}": tensor for leaf, tensor in state.as_dict(packed=True).items()}
    return {"weight": codes, **sides}, functional.dequantize_4bit(codes, state)


def bitsandbytes_int8(matrix: torch.Tensor, how: dict[str, Any]) -> Made:
    """What ``Linear8bitLt`` saves of a matrix."""
    import bitsandbytes
    from bitsandbytes import functional

    layer = bitsandbytes.nn.Linear8bitLt(matrix.shape[1], matrix.shape[0], bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": matrix})
    stored = dict(layer.to("cpu").state_dict())
    return stored, functional.int8_vectorwise_dequant(stored["weight"], stored["SCB"])


def sdnq(matrix: torch.Tensor, how: dict[str, Any]) -> Made:
    """What a layer that SDNQ quantised saves, and what it turns back into."""
    from sdnq import SDNQConfig, sdnq_quantize_layer

    layer = torch.nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    layer.load_state_dict({"weight": matrix})
    config = SDNQConfig(minimum_allowed_numel=1, minimum_allowed_channel_size=1, **how)
    layer, _ = sdnq_quantize_layer(layer, config, torch_dtype=torch.float32, param_name="a.weight")
    stored = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    return stored, layer.dequantize().weight.detach()


def main(out: Path) -> None:
    """Make all cases. A library that is not used is not imported."""
    for number, case in enumerate(CASES.values()):
        stored, value = globals()[case["by"]](weight(tuple(case["shape"]), seed=number), case["how"])
        save_file({f"a.{leaf}": tensor.contiguous() for leaf, tensor in stored.items()}, out / f"{number}.safetensors")
        save_file({"value": value.float().contiguous()}, out / f"{number}-value.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
