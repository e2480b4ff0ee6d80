"""The table of formats in docs/reference/lora-dialects.md, from the table of formats."""

from __future__ import annotations

from collections.abc import Iterator

from mergetool.adapters.formats import FORMATS, LoraFormat

MODULE = "layers.0.attention.to_q"

ALPHAS = {
    "none": "none: the scale is multiplied in",
    "where needed": "where a scale cannot be folded exactly",
    "always": "`.alpha`",
    "config": "in `adapter_config.json`",
}


def lines() -> Iterator[str]:
    """Each format: what it is, the names of a module's factors, its alpha, what else it carries."""
    yield "| `--key-format` | what it is | factors of a module, in Z-Image | alpha | beside plain LoRAs it carries |"
    yield "|---|---|---|---|---|"
    for name, form in FORMATS.items():
        module = MODULE if form.layout != "comfyui" else "layers.0.attention.qkv"
        factors = " and ".join(f"`{key}`" for key in form.factors(module))
        yield f"| `{name}` | {form.summary} | {factors} | {ALPHAS[form.alpha]} | {_carried(form)} |"


def _carried(form: LoraFormat) -> str:
    words = {"loha": "LoHa", "lokr": "LoKr", "full": "whole differences"}
    found = [words[kind] for kind in words if kind in form.kinds]
    return (
        ", ".join([*(["DoRA"] if form.dora else []), *(["LoCon"] if "lora" in form.kinds else []), *found]) or "nothing"
    )
