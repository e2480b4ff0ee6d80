"""Row 28: strings that steer a terminal, in every name and text that a file can bring along."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.hostile.lines import lines, verdict, warmed
from tests.hostile.models import LAYERS, family, tensors
from tests.hostile.tally import Tally
from tests.hostile.warm import Warm

FORGED = "mergetool-forged-line"

_INVISIBLE = [
    *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200B, 0x200C, 0x200D, 0x200E, 0x200F, 0x061C, 0x2028, 0x2029, 0x00AD, 0xFEFF,
    0x180E, 0x2060, 0xE0041, 0xFFF9,
]  # fmt: skip


def strings() -> list[str]:
    """Every control character, every mark that hides or turns text round, and the sequences that real terminals obey."""
    sequences = [
        "\x1b[2J\x1b[H", "\x1b]0;title\x07", "\x1b]8;;http://evil.example\x1b\\click\x1b]8;;\x1b\\", "\x1b[31mred", "\x1b[8mhidden",
        "\x1b]52;c;cm0gLXJmIC8=\x07", "\x1bP+q544e\x1b\\", "\x1b[6n", "\x1b[?1049h", "\x1bc", "\x9b2J", "\x9d0;t\x9c", "\x1b]1337;File=:\x07",
        "\x1b[1A\x1b[2K", "\r\x1b[K", "\b\b\b\b", "\x0e\x0f", f"\n{FORGED}", f"\r{FORGED}", f"\r\n{FORGED}", f"\x85{FORGED}",
        f"\u2028{FORGED}", f"\x0b{FORGED}", f"\x0c{FORGED}", "a\u0308\u0308\u0308", "\u202etxt.exe", "\u2066a\u2069b", "%s%n{0}{x.__class__}",
        "[bold red]x[/]", "$(touch canary)`touch canary`;touch canary", "\\x1b[2J", "\ud800".encode("utf-8", "replace").decode(),
    ]  # fmt: skip
    controls = [chr(code) for code in (*range(1, 0x20), *range(0x7F, 0xA0))]
    return [*sequences, *(f"x{control}y" for control in controls), *(f"x{chr(code)}y" for code in _INVISIBLE)]


def dangerous(text: str) -> str | None:
    """The first character that must not reach a terminal, or a line that a file wrote."""
    for character in text.replace("\n", ""):
        if not character.isprintable():
            return f"prints {character!a}"
    return "prints a line of the file's own" if any(line.startswith(FORGED) for line in text.split("\n")) else None


def files(folder: Path, string: str) -> Iterator[str]:
    """Files that carry ``string``: a model's tensor names and metadata, a LoRA's modules, a merge's recipe, a config, an index."""
    model = tensors(1, large=False)
    named = {f"{name}{string}" if "norm" in name else name: tensor for name, tensor in model.items()}
    save_file(named, folder / "names.safetensors", {"format": "pt", string: string, "modelspec.title": string})
    yield "names.safetensors"
    factors = {f"{string}.lora_A.weight": torch.ones(2, 96), f"{string}.lora_B.weight": torch.ones(64, 2)}
    module = LAYERS[0].removesuffix(".weight")
    factors |= {f"{module}.lora_A.weight": torch.ones(2, 96), f"{module}.lora_B.weight": torch.ones(64, 2)}
    save_file(
        factors, folder / "factors.safetensors", {"software": json.dumps({"name": string}), "ss_network_module": string}
    )
    yield "factors.safetensors"
    recipe = {"expression": f"a + 2 * (b - {json.dumps(string)})", "protect": [string], "layout": string}
    recorded = [{"name": name, "fingerprint": string} for name in ("a", "b", string)]
    metadata = {"mergetool.recipe": json.dumps(recipe), "mergetool.inputs": json.dumps(recorded)}
    save_file(model, folder / "recipe.safetensors", metadata)
    yield "recipe.safetensors"
    for kind in ("config", "index"):
        place = folder / kind
        place.mkdir(exist_ok=True)
        if kind == "config":
            save_file(model, place / "model.safetensors")
            (place / "config.json").write_text(
                json.dumps({"quantization_config": {"quant_method": string}, string: string})
            )
        else:
            index = {"weight_map": {string: f"{string}.safetensors", "b": "b.safetensors"}}
            (place / "model.safetensors.index.json").write_text(json.dumps(index))
        yield kind
    if "/" not in string and "\0" not in string:
        save_file(model, folder / f"named {string}.safetensors")
        yield f"named {string}.safetensors"


def run(warm: Warm, folder: Path, *, step: int = 1, patched: str | None = None) -> Tally:
    """Every ``step``-th string in every kind of file; each kind meets a fifth of the commands with each string, all in turn."""
    tally = Tally("28", "terminal strings in names, metadata, recipes, configs and indices, through every command")
    family(folder)
    warmed(warm, folder)
    for number, string in enumerate(strings()[::step]):
        asked = [line for name in files(folder, string) for line in lines(name)[number % 5 :: 5]]
        tally.injected += len(asked)
        more = {"patched": patched} if patched else {}
        for line, ran in zip(asked, warm.run_each(asked, folder, watched=True, **more), strict=True):
            fault = verdict(ran.code, ran.out, ran.err) or dangerous(ran.out) or dangerous(ran.err)
            fault = fault or (f"did {ran.events[0]}" if ran.events else None)
            tally.judge(None if fault is None else f"{string!a} in {ascii(' '.join(line))[:90]}: {fault}")
    return tally
