"""Make the golden files again: ``python -m tests.golden.make``, with mergekit, sd-mecha, peft, diffusers and gguf installed.

Every safetensors release named here and lycoris-lora are installed into a temporary folder by pip. What is in a file is written to
``golden.json`` from the arrays that went in, not from what came out. The files are kept, so that every later version has to read them; this
script is how they came to be, and is not run by tests.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILES = Path(__file__).with_name("files")
RELEASES = ("0.2.8", "0.3.0", "0.3.3", "0.4.0", "0.4.5", "0.5.0", "0.6.2", "0.7.0", "0.8.0")

# Runs under an old release: numpy only, so that no torch of its time is needed.
OLD = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from safetensors.numpy import save_file, save
import safetensors
folder, release = sys.argv[2], sys.argv[3]
dice = np.random.default_rng(3)
first = {
    "layers.0.attention.to_q.weight": dice.standard_normal((6, 4)).astype(np.float32),
    "layers.0.attention.to_k.weight": dice.standard_normal((6, 4)).astype(np.float16),
    "norm.weight": dice.standard_normal(5).astype(np.float64), "scalar": np.array(3.5, np.float32),
    "empty": np.zeros((0, 4), np.float32), "ids": dice.integers(0, 99, (3,)), "mask": np.array([True, False]),
    "bytes": dice.integers(0, 255, (7,)).astype(np.uint8),
}
second = {"é": dice.standard_normal(3).astype(np.float32), "a b": dice.standard_normal(1).astype(np.float16)}
save_file(first, f"{folder}/safetensors-{release}.safetensors", {"format": "np"})
open(f"{folder}/safetensors-{release}-bare.safetensors", "wb").write(save(second))
"""


def arrays_of_old() -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays that the snippet writes."""
    scope: dict[str, Any] = {}
    code = OLD[OLD.index("dice") : OLD.index("save_file(first")]
    exec("import numpy as np\n" + code, scope)
    return scope["first"], scope["second"]


CODES = {
    "float32": "F32",
    "float16": "F16",
    "float64": "F64",
    "int64": "I64",
    "bool": "BOOL",
    "uint8": "U8",
    "bfloat16": "BF16",
}


def described(tensors: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Dtype, shape and SHA-256 of the bytes of every array or tensor."""
    import torch

    found = {}
    for name, value in tensors.items():
        tensor = value if isinstance(value, torch.Tensor) else torch.from_numpy(value.copy())
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        code = CODES[str(tensor.dtype).removeprefix("torch.")]
        found[name] = [code, list(tensor.shape), hashlib.sha256(raw).hexdigest()]
    return found


def of_safetensors(scratch: Path, golden: dict[str, Any]) -> None:
    """Two files of every release: all dtypes with metadata, and odd names without."""
    first, second = arrays_of_old()
    for release in RELEASES:
        place = scratch / release
        _install(place, f"safetensors=={release}")
        subprocess.run([sys.executable, "-c", OLD, str(place), str(FILES), release], check=True)
        golden[f"safetensors-{release}.safetensors"] = {"tensors": described(first)}
        golden[f"safetensors-{release}-bare.safetensors"] = {"tensors": described(second)}


def model() -> Any:
    """A module with the names of a transformer's first layers."""
    import torch

    torch.manual_seed(5)
    attention = torch.nn.ModuleDict({name: torch.nn.Linear(8, 8, bias=False) for name in ("to_q", "to_k", "to_v")})
    layers = torch.nn.ModuleDict({str(i): torch.nn.ModuleDict({"attention": attention}) for i in range(1)})
    built = torch.nn.ModuleDict({"layers": layers})
    built.forward = lambda x: x
    return built.bfloat16()


def of_peft(golden: dict[str, Any]) -> None:
    """PEFT's folders of LoRA (plain, rank-stabilised, DoRA), LoHa and LoKr, and kohya's spelling by diffusers' conversion."""
    import torch
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
    from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file

    targets = ["to_q", "to_k"]
    configs = {
        "lora": LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False),
        "rslora": LoraConfig(r=2, lora_alpha=4, target_modules=targets, use_rslora=True, init_lora_weights=False),
        "pattern": LoraConfig(r=2, lora_alpha=4, target_modules=targets, alpha_pattern={"to_q": 6}, rank_pattern={"to_q": 3}, init_lora_weights=False),
        "dora": LoraConfig(r=2, lora_alpha=4, target_modules=targets, use_dora=True, init_lora_weights=False),
        "loha": LoHaConfig(r=2, alpha=4, target_modules=targets, init_weights=False),
        "lokr": LoKrConfig(r=2, alpha=4, target_modules=targets, init_weights=False, decompose_both=True),
    }  # fmt: skip
    for name, config in configs.items():
        tuned = get_peft_model(model(), config)
        state = {key: value.clone() for key, value in get_peft_model_state_dict(tuned).items()}
        tuned.save_pretrained(FILES / f"peft-{name}")
        (FILES / f"peft-{name}" / "README.md").unlink()
        golden[f"peft-{name}"] = {"tensors": described(state), "lora": 2}
        if name == "lora":
            plain = {key.removeprefix("base_model.model."): value for key, value in state.items()}
            kohya = convert_state_dict_to_kohya({f"unet.{key}": value for key, value in plain.items()})
            kohya = {
                key: value.contiguous() if isinstance(value, torch.Tensor) else torch.tensor(value)
                for key, value in kohya.items()
            }
            save_file(kohya, FILES / "diffusers-kohya.safetensors", {"ss_network_module": "networks.lora"})
            golden["diffusers-kohya.safetensors"] = {"tensors": described(kohya), "lora": 2}


def of_lycoris(scratch: Path, golden: dict[str, Any]) -> None:
    """LyCORIS' own file of LoRA, LoHa and LoKr."""
    import torch

    _install(scratch / "lycoris", "lycoris-lora==4.1.3", "einops", "toml")
    sys.path.insert(0, str(scratch / "lycoris"))
    from lycoris import LycorisNetwork, create_lycoris

    for algorithm in ("lora", "loha", "lokr"):
        torch.manual_seed(6)
        LycorisNetwork.apply_preset({"target_name": [".*to_.*"]})
        network = create_lycoris(model().float(), 1.0, linear_dim=2, linear_alpha=1.0, algo=algorithm)
        network.apply_to()
        for parameter in network.parameters():
            parameter.data = torch.randn_like(parameter)
        state = {key: value.to(torch.float16).clone() for key, value in network.state_dict().items()}
        network.save_weights(
            str(FILES / f"lycoris-{algorithm}.safetensors"), torch.float16, {"ss_network_module": "lycoris.kohya"}
        )
        golden[f"lycoris-{algorithm}.safetensors"] = {"tensors": described(state), "lora": 3}


def of_mergers(golden: dict[str, Any]) -> None:
    """mergekit's writer, in one file and in shards, and sd-mecha's."""
    import torch
    from mergekit.io.tensor_writer import TensorWriter

    tensors = {name: value.clone() for name, value in model().state_dict().items()}
    for name, size in (("mergekit", 10**9), ("mergekit-shards", 200)):
        writer = TensorWriter(str(FILES / name), max_shard_size=size)
        for key, value in tensors.items():
            writer.save_tensor(key, value)
        writer.finalize()
        golden[name] = {"tensors": described(tensors)}
    from sd_mecha.streaming import OutSafetensorsDict, TensorMetadata

    planned = {key: TensorMetadata(value.shape, torch.bfloat16) for key, value in tensors.items()}
    out = OutSafetensorsDict(FILES / "sd-mecha.safetensors", planned, "recipe", 1 << 20)
    for key, value in tensors.items():
        out[key] = value
    out.close()
    golden["sd-mecha.safetensors"] = {"tensors": described(tensors)}


def of_mergetool(golden: dict[str, Any]) -> None:
    """Outputs of this version: a merge, its shards, FP8 with scales, a LoRA, GGUF read in."""
    from mergetool.engine import job
    from mergetool.options.merging import MergeOptions
    from tests.hostile.models import model as written

    with tempfile.TemporaryDirectory() as folder:
        names = [
            str(written(Path(folder) / f"{name}.safetensors", seed, large=False)) for seed, name in enumerate("abc")
        ]
        text = f"'{names[0]}' + 3 * ('{names[1]}' - '{names[2]}')"
        for name, options, size in (
            ("mergetool-0.1-merge.safetensors", MergeOptions(), None), ("mergetool-0.1-shards", MergeOptions(), 20_000),
            ("mergetool-0.1-fp8.safetensors", MergeOptions(quant="fp8-scaled"), None), ("mergetool-0.1-int8.safetensors", MergeOptions(quant="int8"), None),
        ):  # fmt: skip
            with job.open_merge(text, options) as plan:
                job.run_merge(plan, FILES / name, shard_size=size, overwrite=True)
            golden[name] = {"tensors": _by_library(FILES / name), "recipe": "a + 3*(b - c)"}


def _by_library(path: Path) -> dict[str, list[Any]]:
    import safetensors

    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    views = [view for file in files for view in safetensors.deserialize(file.read_bytes())]
    return {name: [one["dtype"], one["shape"], hashlib.sha256(bytes(one["data"])).hexdigest()] for name, one in views}


def _install(place: Path, *packages: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(place), *packages]
    subprocess.run(command, check=True)


def main() -> None:
    """Write every file and golden.json."""
    golden: dict[str, Any] = {}
    FILES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        of_safetensors(Path(scratch), golden)
        of_peft(golden)
        of_mergers(golden)
        of_mergetool(golden)
        of_lycoris(Path(scratch), golden)
    text = json.dumps(golden, indent=1, sort_keys=True, ensure_ascii=False)
    FILES.with_name("golden.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
