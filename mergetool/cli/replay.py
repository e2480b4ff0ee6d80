"""``mergetool replay``: the older name of ``mergetool verify --depth bytes --no-images``."""

from __future__ import annotations

from mergetool.api.verifications import Rebuild, run_replay
from mergetool.cli.parameters import Typed, command
from mergetool.cli.verify_report import ReplayReport

EXAMPLES = """\b
Examples:
  mergetool replay out.safetensors
  mergetool replay out.safetensors --input tuned=tuned.safetensors -o again.safetensors
  mergetool replay out-folder --json

mergetool looks for the inputs under the names in the recipe, then beside OUT; --input names another place. It compares the whole file, or \
every file of a folder: header, metadata and tensors. `mergetool verify` compares the tensors alone, and draws pictures.
"""


@command(Rebuild, prints=("as_json", "no_progress"))
def replay(typed: Typed) -> None:
    """Make a merge again and compare every byte.

    Exit code 1 says that bytes differ; the message names the input, recipe or version that changed.
    """
    with ReplayReport.shown(typed) as report:
        again = run_replay(typed.request(Rebuild), report)
    again.require_same(typed.given["output"])
