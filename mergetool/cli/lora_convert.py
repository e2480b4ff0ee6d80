"""``mergetool lora convert``: a LoRA under the names of another program."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergetool.adapters.formats import FORMATS
from mergetool.api.loras import LoraConvert, run_lora_convert
from mergetool.cli import console, loads
from mergetool.cli.parameters import Typed, command
from mergetool.cli.report import CommandEvents

if TYPE_CHECKING:
    from mergetool.adapters.lora_file import LoraFile
    from mergetool.api.loras import LoraConverted

EXAMPLES = f"""\b
Examples:
  mergetool lora convert style.safetensors -o style-default.safetensors
  mergetool lora convert style.safetensors -o style-comfyui.safetensors --key-format comfyui
  mergetool lora convert style.safetensors -o style-peft --key-format peft

\b
{chr(10).join(f"{name:<12}{form.summary}" for name, form in FORMATS.items())}

The report names the values that were rounded and the programs that load the new file, whole or not. mergetool keeps or refuses LoRAs of \
models whose names it does not know.
"""


@command(LoraConvert)
def convert(typed: Typed) -> None:
    """Write a LoRA under another program's names.

    mergetool keeps values bit for bit where the format can hold them.
    """
    with _ConvertReport.shown(typed) as report:
        run_lora_convert(typed.request(LoraConvert), report)


class _ConvertReport(CommandEvents):
    """The report of a conversion, with rounded and skipped modules."""

    def plan(self, plan: LoraFile, memory: int) -> None:
        """Print the memory."""
        self.json["memory"] = memory
        if self.prints and self.typed.given.get("dry_run"):
            console.heading("", f"memory at most {console.size(memory)}")

    def done(self, plan: LoraFile, result: LoraConverted) -> None:
        """Print the result for every module."""
        self.json |= _json(result)
        if self.prints:
            _print(result, verbose=self.typed.verbose)


def _print(result: LoraConverted, *, verbose: bool) -> None:
    done = result.converted
    console.heading("from", result.dialect)
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
    summary = f"{console.plural(done.modules, 'module')}, {lossless}"
    if not result.dry_run:
        size = console.size(_size(result.output))
        console.heading("done", f"{result.output}  {summary}  {size}  {result.seconds:.1f} s")
        loads.print_all(result.loading, verbose=verbose)
    else:
        console.heading("plan", summary)


def _size(output: Path | None) -> int:
    """Bytes of the file, or of the folder's files."""
    assert output is not None
    return sum(path.stat().st_size for path in (output.iterdir() if output.is_dir() else [output]))


def _json(result: LoraConverted) -> dict[str, Any]:
    done = result.converted
    written = (
        {} if result.dry_run else {"bytes_written": _size(result.output), "loading": loads.as_json(result.loading)}
    )
    return {
        "output": None if result.output is None else str(result.output),
        "from": result.dialect,
        "modules": done.modules,
        "tensors": done.tensors,
        "lossless": done.is_lossless,
        "rounded": done.rounded,
        "empty": done.empty,
        "skipped": [{"key": key, "reason": reason} for key, reason in done.unmatched],
    } | written
