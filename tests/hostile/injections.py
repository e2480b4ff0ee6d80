"""Texts that another program might run, import or fetch: in expressions, metadata, recipes, configs and names. Nothing comes of them."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.hostile import recipes
from tests.hostile.lines import lines, verdict, warmed
from tests.hostile.models import LAYERS, family, tensors
from tests.hostile.tally import Tally
from tests.hostile.warm import Warm

TEXTS = [
    "__import__('os').system('touch canary')", "__import__('pty').spawn('sh')", "eval('1')", "exec('import this')", "open('canary', 'w')",
    "a.__class__.__mro__[1].__subclasses__()", "(lambda: a)()", "[a for a in (1,)]", "f'{a}'", "a if a else b", "(a := b)", "*a", "a[0]",
    "a @ b", "a ** 999999999", "9**9**9**9", "a and b", "not a", "`touch canary`", "$(touch canary)", "a; import os", "a\nimport os",
    "lora(__import__('os'))", "lora('x', 'y')", "lora(open('canary', 'w'))", "slerp(a, b, t=__import__('os'))", "slerp(*a)", "slerp(**a)",
    "os.system(a)", "antigravity", "this", "idlelib.idle", "builtins.exec", "subprocess", "torch.hub.load(a)", "{{ cycler.__init__ }}",
    "{% import os %}", "${jndi:ldap://127.0.0.1/x}", "!!python/object/apply:os.system ['touch canary']", "${env:HOME}", "~/x", "%PATH%",
    "http://127.0.0.1:9/x.safetensors", "file:///etc/passwd", "ftp://127.0.0.1/x", "//127.0.0.1/share/x", "\\\\127.0.0.1\\share\\x",
    "hf://evil/model", "hf://../../etc", "../../../../etc/passwd", "/etc/passwd", "/proc/self/environ", "|touch canary", "-rf", "--help",
]  # fmt: skip


def _model(path: Path, metadata: dict[str, str]) -> str:
    save_file(tensors(2, large=False), path, metadata)
    return path.name


def files(folder: Path, text: str) -> Iterator[str]:
    """Files that carry ``text`` where readers look for names, classes, addresses and recipes."""
    yield _model(
        folder / "metadata.safetensors", {"format": text, text: text, "ss_network_module": text, "_class_name": text}
    )
    recipes = [
        {"expression": text, "protect": [text], "from": text, "dtype": text},
        {"expression": "a + 2 * (b - c)", "set": [f"{text}=1"], "layout": text, "rounding": text},
        {"expression": f"a + ({json.dumps(text)} - b)"},
    ]
    for number, recipe in enumerate(recipes):
        inputs = [{"name": name, "fingerprint": text} for name in ("a", "b", text)]
        metadata = {"mergetool.recipe": json.dumps(recipe), "mergetool.inputs": json.dumps(inputs)}
        yield _model(folder / f"recipe-{number}.safetensors", metadata)
    module = LAYERS[0].removesuffix(".weight")
    factors = {f"{module}.lora_A.weight": torch.ones(2, 96), f"{module}.lora_B.weight": torch.ones(64, 2)}
    adapter = {
        "lora_alpha": text,
        "auto_mapping": {"base_model_class": text, "parent_library": text},
        "base_model_name_or_path": text,
    }
    peft = folder / "peft"
    peft.mkdir(exist_ok=True)
    save_file(
        factors,
        peft / "adapter_model.safetensors",
        {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": text})},
    )
    (peft / "adapter_config.json").write_text(json.dumps(adapter | {"peft_type": text}))
    yield "peft"
    place = folder / "folder"
    place.mkdir(exist_ok=True)
    _model(
        place / "model.safetensors",
        {"_quantization_metadata": json.dumps({"layers": {LAYERS[0].removesuffix(".weight"): text}})},
    )
    config = {
        "_class_name": text,
        "auto_map": {"AutoModel": text},
        "_diffusers_version": text,
        "quantization_config": {"x": text},
    }
    (place / "config.json").write_text(json.dumps(config))
    yield "folder"
    marker = torch.tensor(list(json.dumps({"format": text}).encode()), dtype=torch.uint8)
    save_file(tensors(2, large=False) | {f"{module}.comfy_quant": marker}, folder / "marker.safetensors")
    yield "marker.safetensors"


def asked(folder: Path, text: str, number: int) -> list[list[str]]:
    """The text as an expression and as an argument, and every file with it through a third of the commands."""
    found = [line for name in files(folder, text) for line in lines(name)[number % 3 :: 3]]
    found += [["verify", f"recipe-{i}.safetensors", "--no-images"] for i in range(3)]
    if not text.startswith("-"):
        found.append(["merge", text, "--dry-run"])
    found.append(["merge", f"a + ({text} - b)", "--dry-run"])
    return [
        line for line in found if "hf://" not in " ".join(line)
    ]  # the user's own hf:// may be fetched; a file's may not


def run(
    warm: Warm,
    folder: Path,
    *,
    step: int = 1,
    thin: int = 5,
    patched: str | None = None,
    carriers: Collection[str] = ("files", "recipes"),
) -> Tally:
    """Every ``step``-th text in every place, and in every ``thin``-th place of a recipe; any import, exec, socket or process, any new file, any network name is a violation."""
    tally = Tally("audit", "texts that would run, import or fetch, through every command")
    folder = family(folder / "inside")  # so that what is around it is nobody else's
    for name in "abc":
        _model(folder / f"{name}.safetensors", {})
    conditions = {"patched": patched} if patched else {}
    if "files" in carriers:
        warmed(warm, folder)
        for number, text in enumerate(TEXTS[::step]):
            _judge(tally, warm, folder, asked(folder, text, number), text, **conditions)
    if "recipes" in carriers:
        (folder / recipes.FOLDER).mkdir()
        codes = [warm.warm_up(line, folder).code for line in recipes.sound(folder)]
        assert codes == [0] * 6 + [2] * 4, codes  # else the runs could all fail for another reason
        conditions |= {"env": {"HOME": recipes.HOME}}
        for number, text in enumerate(TEXTS[::step]):
            _judge(tally, warm, folder, recipes.asked(folder, text, number, thin), text, **conditions)
        _judge(tally, warm, folder, recipes.of_yaml(folder), "YAML", **conditions)
    return tally


def _judge(tally: Tally, warm: Warm, folder: Path, commands: list[list[str]], text: str, **conditions: Any) -> None:
    tally.injected += len(commands)
    before = _around(folder)
    for line, ran in zip(commands, warm.run_each(commands, folder, watched=True, **conditions), strict=True):
        fault = f"did {ran.events[0]}" if ran.events else verdict(ran.code, ran.out, ran.err)
        fault = fault or ("says what the environment says" if recipes.HOME in ran.out + ran.err else None)
        tally.judge(None if fault is None else f"{text!a} in {ascii(' '.join(line))[:90]}: {fault}")
    made = {path for path in _around(folder) - before if not path.startswith("out")}
    if made:
        tally.violations.append(f"{text!a} made {sorted(made)[0]!a}")


def _around(folder: Path) -> set[str]:
    """What is in the working folder and in the one around it; outputs have names or a folder of their own."""
    return {*os.listdir(folder), *(f"../{name}" for name in os.listdir(folder.parent))}
