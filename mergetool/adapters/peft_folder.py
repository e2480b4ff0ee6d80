"""The folder of a PEFT adapter: adapter_model.safetensors and adapter_config.json. The latter has ranks and alphas."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import TypeVar

from mergetool.adapters.lora_file import LoraFile
from mergetool.adapters.module import StoredModule
from mergetool.errors import DataError

_Number = TypeVar("_Number", int, float)

CONFIG = "adapter_config.json"


def config(file: LoraFile, modules: Mapping[str, StoredModule]) -> bytes:
    """adapter_config.json for modules by their names in the model.

    The rank and alpha that most have stand for all, the others in patterns. Raises DataError where some modules are DoRAs and some are
    not, which one config cannot say.
    """
    doras = sum("dora_scale" in module.tensors for module in modules.values())
    if doras not in (0, len(modules)):
        raise DataError(
            f'"{file.name}" has {doras} DoRAs among {len(modules)} modules, where a PEFT folder has either; '
            "`key_format=default` keeps both."
        )
    ranks = {name: len(module.down) for name, module in modules.items()}
    alphas = {name: _number(module.scale * ranks[name]) for name, module in modules.items()}
    rank, alpha = _most(ranks), _most(alphas)
    found = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": doras > 0,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(modules),
    }
    return (json.dumps(found, indent=2, sort_keys=True) + "\n").encode()


def _most(found: Mapping[str, _Number]) -> _Number:
    return Counter(found.values()).most_common(1)[0][0]


def _number(value: float) -> float:
    return int(value) if value.is_integer() else value
