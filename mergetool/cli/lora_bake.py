"""``mergetool lora bake``: one or many LoRAs added to a checkpoint."""

from __future__ import annotations

from mergetool.api.merges import Bake, run_bake
from mergetool.cli.merge_report import MergeReport
from mergetool.cli.parameters import Typed, command

EXAMPLES = """\b
Examples:
  mergetool lora bake z-image style.safetensors -o styled.safetensors
  mergetool lora bake turbo style.safetensors:0.8 detail.safetensors:-0.3 -o turbo-styled.safetensors
  mergetool lora bake turbo-fp8.safetensors style.safetensors:0.7 --quant fp8-scaled -o styled-fp8.safetensors
  mergetool lora bake "alkahest + 20*(tuned - base)" style.safetensors -o styled.safetensors
  mergetool lora bake turbo style.safetensors --set refiner=0 --set layers.20-29=0.5 -o partly.safetensors

LORA is a file or a PEFT folder in any spelling that `mergetool lora inspect` reads, then a colon and its strength (1 without;
negative takes it away). All are added in float32 in one pass, and rounded once. The same is
`mergetool merge "model + 0.8 * lora('style.safetensors')"`, where differences of models can be added too.
"""


@command(Bake)
def bake(typed: Typed) -> None:
    """Add LoRAs to a checkpoint, streaming.

    Of any layout or container, in one pass.
    """
    with MergeReport.shown(typed) as report:
        run_bake(typed.request(Bake), report)
