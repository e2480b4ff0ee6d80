"""``mergetool doctor``: the state of the installation, with the commands that mend it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergetool.api.events import Events
from mergetool.api.installation import Doctor, run_doctor
from mergetool.cli import console
from mergetool.cli.parameters import Typed, command
from mergetool.errors import CheckFailed

if TYPE_CHECKING:
    from mergetool.installation.diagnosis import Diagnosis

EXAMPLES = """\b
Examples:
  mergetool doctor
  mergetool doctor --json
"""


@command(Doctor, prints=("as_json",))
def doctor(typed: Typed) -> None:
    """Check the installation, and say how to mend it.

    Python, packages, compiled kernels, GPUs, ComfyUI folders, disks, memory: each line is ok, a note or a problem, with the command that mends it.
    Exit code 1 when something is broken. Nothing is written.
    """
    lines = run_doctor(typed.request(Doctor), Events())
    problems = [line.topic for line in lines if line.verdict == "problem"]
    if typed.as_json:
        checks = [
            {
                "topic": line.topic,
                "verdict": line.verdict,
                "text": line.text,
                "remedy": line.remedy or None,
                **line.facts,
            }
            for line in lines
        ]
        console.print_json({"ok": not problems, "checks": checks})
    else:
        _show(lines)
    if problems:
        raise CheckFailed(
            f"{console.plural(len(problems), 'problem')}: {', '.join(problems)}; the lines above say what mends them."
        )


def _show(lines: Sequence[Diagnosis]) -> None:
    width = max(len(line.topic) for line in lines)
    for line in lines:
        console.say(f"{line.verdict:<8}{line.topic:<{width}}  {line.text}")
        if line.remedy:
            console.say(f"{'':<8}{'':<{width}}  {line.remedy}")
