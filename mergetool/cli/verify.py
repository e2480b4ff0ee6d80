"""``mergetool verify``: check that a merge follows its recipe and makes pictures."""

from __future__ import annotations

from mergetool.api.verifications import Verify, run_verify
from mergetool.cli.parameters import Typed, command
from mergetool.cli.presets import presets
from mergetool.cli.verify_report import VerifyReport

EXAMPLES = """\b
Examples:
  mergetool verify out.safetensors
  mergetool verify out.safetensors --depth bytes --no-images
  mergetool verify out.safetensors --pipeline ./Z-Image --refiner ./Z-Image-Turbo --report out.html
  mergetool verify out.safetensors --input tuned=/models/tuned.safetensors --no-images --json
  mergetool verify someone.safetensors --parents base.safetensors --pipeline ./Z-Image --report page.html
  mergetool verify someone.safetensors --parents "0.5*a + 0.5*b" --no-images

A file without recipe is judged by its pictures, and measured against --parents.
Inputs are looked for under the names that the recipe records, then beside OUT; --input says where else one is.
Without --images or --no-images, pictures are made where that takes minutes: on a GPU, or for a small model.
Of several strengths the first is judged.

"""
EXAMPLES += presets()


@command(Verify, prints=("as_json", "no_progress"))
def verify(typed: Typed) -> None:
    """Check the tensors and the pictures of a merge.

    Every tensor is derived again from its recipe; its pictures are looked at beside its parents'.

    Weights first: byte by byte, NaN, protected tensors, distances from the parents; with --depth bytes the whole file. Then the same prompts and
    seeds for the parents and the merge, in one stage and two; noise, collapse, drift and lost prompts are measured and judged.
    Nothing is written but the report. Exit code 1 when a check says no.
    """
    with VerifyReport.shown(typed) as report:
        verification = run_verify(typed.request(Verify), report)
    verification.require_passed()
