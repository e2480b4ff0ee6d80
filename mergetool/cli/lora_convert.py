"""``mergetool lora convert``: a LoRA under the names of another program."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergetool.cli import console, loads
from mergetool.cli.console import JsonOption, NoProgressOption, SkipUnmatchedOption, VerboseOption

if TYPE_CHECKING:
    from mergetool.adapters.loaders import Loading
    from mergetool.lora.convert import Converted

EXAMPLES = """\b
Examples:
  mergetool lora convert style.safetensors -o style-default.safetensors
  mergetool lora convert style.safetensors -o style-comfyui.safetensors --key-format comfyui
  mergetool lora convert style.safetensors -o style-peft --key-format peft

\b
default     diffusion_model. and diffusers' names, lora_A and lora_B: for diffusers and ComfyUI
diffusers   transformer. and the same names; a scale is multiplied in
comfyui     ComfyUI's own names, q, k and v as one; also carries whole differences (.diff)
kohya       lora_unet_, underscores and alphas, as musubi-tuner has them: for diffusers since 0.39
peft        a folder: adapter_model.safetensors and adapter_config.json

Values are kept bit for bit where the format can say them; what was rounded is named. Which releases load the file that was written,
whole or not, is said at the end. Of a model that is not Z-Image a LoRA keeps its names, or is refused.
"""


@console.command
def convert(
    lora: Annotated[str, typer.Argument(help="A LoRA in any spelling: a file or a PEFT folder", metavar="LORA")],
    output: Annotated[str, typer.Option("--output", "-o", help="FILE.safetensors; a folder for peft.")],
    key_format: Annotated[
        str, typer.Option("--key-format", help="default, diffusers, comfyui, kohya or peft.")
    ] = "default",
    model: Annotated[
        str | None,
        typer.Option(help="The model it is for, to look its names up in [default: Z-Image is known]", metavar="MODEL"),
    ] = None,
    skip_unmatched: SkipUnmatchedOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    as_json: JsonOption = False,
    no_progress: NoProgressOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Write a LoRA under the names of another program, losslessly where that is possible."""
    from mergetool.adapters.loaders import loading_of
    from mergetool.cli.lora_inspect import opened
    from mergetool.lora.convert import convert as write
    from mergetool.lora.spelling import KEY_FORMATS

    wanted = console.choice("--key-format", key_format, KEY_FORMATS)
    target = console.lora_output(output, shown=not as_json, folder=wanted == "peft")
    started = time.monotonic()
    with opened(lora, model) as file:
        shown = not (no_progress or as_json)
        with console.progress("convert", 1, shown=shown, unit="file", publishes=True) as advance:
            known = model is not None
            advance(1)
            done = write(file, target, wanted, overwrite=overwrite, skip_unmatched=skip_unmatched, names_known=known)
        dialect = file.dialect
        found = loading_of(target, file.family)
    size = sum(path.stat().st_size for path in (target.iterdir() if target.is_dir() else [target]))
    if as_json:
        console.print_json(_json(done, target, size, dialect, found))
    else:
        _print(done, target, size, dialect, found, time.monotonic() - started, verbose=verbose)


def _print(
    done: Converted, output: Path, size: int, dialect: str, found: list[Loading], seconds: float, *, verbose: bool
) -> None:
    console.heading("from", dialect)
    most = 1000 if verbose else 4
    if done.rounded:
        worst = max(done.rounded.values())
        modules = console.listed(list(done.rounded), most=most)
        console.heading(
            "rounded",
            f"{console.plural(len(done.rounded), 'module')} by up to {worst:.2g} of its norm, for a scale that had to be "
            f"multiplied in: {modules}",
        )
    if done.empty:
        console.heading(
            "empty", f"{len(done.empty)} left out that change nothing: {console.listed(done.empty, most=most)}"
        )
    if done.unmatched:
        names = [f"{key} ({reason})" for key, reason in done.unmatched]
        console.heading("skipped", f"{len(names)} keys: {console.listed(names, most=most)}")
    lossless = "every value as it was" if done.is_lossless else "not every value as it was"
    console.heading(
        "done",
        f"{output}  {console.plural(done.modules, 'module')}, {lossless}  {console.size(size)}  {seconds:.1f} s",
    )
    loads.print_all(found, verbose=verbose)


def _json(done: Converted, output: Path, size: int, dialect: str, found: list[Loading]) -> dict[str, Any]:
    return {
        "output": str(output),
        "bytes_written": size,
        "from": dialect,
        "modules": done.modules,
        "tensors": done.tensors,
        "lossless": done.is_lossless,
        "rounded": done.rounded,
        "empty": done.empty,
        "skipped": [{"key": key, "reason": reason} for key, reason in done.unmatched],
        "loading": loads.as_json(found),
    }
