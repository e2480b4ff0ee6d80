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
  mergetool verify out.safetensors --input tuned=tuned.safetensors --no-images --json
  mergetool verify someone.safetensors --parents base.safetensors --pipeline ./Z-Image --report page.html
  mergetool verify someone.safetensors --parents "0.5*base + 0.5*tuned" --no-images

mergetool looks for the inputs of a merge under the names in its recipe, then beside OUT; --input names another place. It measures a file \
without a recipe against --parents and judges its pictures. With several strengths it judges the first.

"""
EXAMPLES += presets()


@command(Verify, prints=("as_json", "no_progress"))
def verify(typed: Typed) -> None:
    """Check a merge: its tensors and its pictures.

    First mergetool derives every tensor again from the recipe in the file and compares it, and looks for NaN, changed protected tensors and
    unlikely distances from the parents.

    Then it draws the same prompts and seeds with the parents and the merge, in one stage and two, and judges noise, collapse, drift and lost
    prompts. It writes nothing but the report. Exit code 1 says that a check failed.
    """
    with VerifyReport.shown(typed) as report:
        verification = run_verify(typed.request(Verify), report)
    verification.require_passed()
