"""``mergetool replay``: the older name of ``mergetool verify --depth bytes --no-images``."""

from __future__ import annotations

from mergetool.api.verifications import Rebuild, run_replay
from mergetool.cli.parameters import Typed, command
from mergetool.cli.verify_report import ReplayReport

EXAMPLES = """\b
Examples:
  mergetool replay out.safetensors
  mergetool replay out.safetensors --input tuned=/models/tuned.safetensors -o again.safetensors
  mergetool replay out-folder --json

Inputs are looked for under the names that the recipe records, then beside OUT; --input says where else one is. The whole file is compared:
header, metadata and tensors, of a folder every file. `mergetool verify` asks less, whether the tensors are right, and looks at pictures.
"""


@command(Rebuild, prints=("as_json", "no_progress"))
def replay(typed: Typed) -> None:
    """Make a merge again, and compare every byte.

    Exit code 1 when the bytes are not the same; a changed input, recipe or version is named.
    """
    with ReplayReport.shown(typed) as report:
        again = run_replay(typed.request(Rebuild), report)
    again.require_same(typed.given["output"])
