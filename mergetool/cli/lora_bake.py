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
  mergetool lora bake turbo style.safetensors --set refiner=0 --set layers.3-5=0.5 -o partly.safetensors

LORA is a file or a PEFT folder in any spelling that `mergetool lora inspect` reads. A colon and a number set its strength; without them it \
is 1, and a negative one takes the LoRA away. mergetool adds all of them in float32 and rounds once. In an expression, \
"model + 0.8 * lora('style.safetensors')" does the same.
"""


@command(Bake)
def bake(typed: Typed) -> None:
    """Add LoRAs to a model.

    The model may have any layout or container; mergetool reads it once.
    """
    with MergeReport.shown(typed) as report:
        run_bake(typed.request(Bake), report)
