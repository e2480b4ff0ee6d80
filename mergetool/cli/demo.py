"""``mergetool demo``: the whole story on the embedded models."""

from __future__ import annotations

import os
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from mergetool.cli import console
from mergetool.cli.parameters import Typed, command
from mergetool.errors import CheckFailed, OutputError
from mergetool.options.kinds import File
from mergetool.options.running import OverwriteOptions
from mergetool.options.table import Option

EXAMPLES = """\b
Examples:
  mergetool demo
  mergetool demo -o /tmp/story --no-progress

Needs no download and no GPU; a few minutes on two cores. Every command is printed as it can be typed again.
"""

PROMPTS = """\
a red circle on a white background
a blue square on a gold background
a gold cross on a purple background
a pink diamond on a black background
a white triangle on a green background
a purple circle on a pink background
"""

REPORT = "report.html"

STEPS: tuple[tuple[str, str, int], ...] = (
    ("What the bridge model is", "inspect lab.alkahest", 0),
    (
        "Averaging two models whose refiners differ is refused, with what was measured",
        "merge '0.5*lab.turbo + 0.5*lab.base' -o naive.safetensors",
        65,
    ),
    (
        "Forced, it loses what the prompts ask for, and verify says so",
        "merge '0.5*lab.turbo + 0.5*lab.base' --force -o naive.safetensors",
        0,
    ),
    ("", "verify naive.safetensors --strength 0.15 --report naive.html", 1),
    (
        "What two fine-tunes learned, one of base and one of turbo, carried over to the bridge in one pass",
        "merge 'lab.alkahest + 1.25*(lab.striped - lab.base) + 0.5*(lab.hollow - lab.deturbo)' "
        "--protect refiner -o bridge.safetensors",
        0,
    ),
    (
        "Its pictures beside its parents', in one stage and two",
        f"verify bridge.safetensors --strength 0.15,0.4 --report {REPORT}",
        0,
    ),
    (
        "How much a second stage changes: a sweep of strengths",
        "sample --prompts prompts.txt --base bridge.safetensors --guidance 3 --shift 3 --refiner lab.turbo "
        "--strength 0.1,0.15,0.25,0.4,0.6 -o strengths",
        0,
    ),
    (
        "The difference of turbo as a LoRA, and four steps with it",
        "diff --base lab.alkahest --variant lab.turbo --rank-thresh 0.995 --exclude refiner "
        "-o turbo-minus-alkahest.safetensors",
        0,
    ),
    (
        "",
        "sample --prompts prompts.txt --base lab.alkahest --lora turbo-minus-alkahest.safetensors:0.8 --steps 4 --guidance 0 "
        "-o lora",
        0,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Demo(OverwriteOptions):
    """The options of the demo."""

    output: Annotated[Path | str, Option(help="The folder for what is made.", kind=File("DIR"), short="-o")] = (
        "mergetool-demo"
    )


@command(Demo, prints=("no_progress",))
def demo(typed: Typed) -> None:
    """Try all of it on the embedded models.

    They are merged, verified, sampled and a difference LoRA is taken of them; a report says what became of it.

    Exit code 1 when a step does not end as it should.
    """
    asked = typed.request(Demo)
    output = Path(asked.output)
    if output.exists() and not output.is_dir():
        raise OutputError(f'"{output}" is not a folder; choose another place with `output`.')
    if output.is_dir() and any(output.iterdir()) and not asked.overwrite:
        raise OutputError(f'"{output}" is not empty; choose another place with `output`, or use it with `overwrite`.')
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f'the folder "{output}" cannot be made: {error.strerror}.') from None
    started = time.monotonic()
    report = output.absolute() / REPORT
    console.heading("report", f"{report}, when all is done")
    before = Path.cwd()
    os.chdir(output)
    try:
        Path("prompts.txt").write_text(PROMPTS)
        for title, words, wanted in STEPS:
            if title:
                console.say()
                console.say(f"# {title}")
            _run(words, wanted, no_progress=typed.no_progress)
    finally:
        os.chdir(before)
    console.say()
    console.heading("done", f"{report}  {time.monotonic() - started:.0f} s")
    console.heading("", "naive.html is the report of the merge that fails; strengths/ and lora/ hold contact sheets")


def _run(command: str, wanted: int, *, no_progress: bool) -> None:
    """One command in this process, as if it had been typed."""
    from mergetool.cli.main import app

    console.say(f"$ mergetool {command}")
    words = shlex.split(command)
    extra = ["--no-progress"] if no_progress and words[0] != "inspect" else []
    extra += ["--overwrite"] if words[0] != "inspect" else []
    code = app([*words, *extra], standalone_mode=False) or 0
    if code != wanted:
        raise CheckFailed(f"this step ended with exit code {code}, not {wanted}.")
