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
from mergetool.options.kinds import File, Flag
from mergetool.options.running import OverwriteOptions
from mergetool.options.table import Option

EXAMPLES = """\b
Examples:
  mergetool demo
  mergetool demo --quick
  mergetool demo -o story --no-progress

The demo needs no download and no GPU, and takes minutes. It prints every command so that you can type it again.
"""

PROMPTS = """\
a red circle on a white background
a blue square on a gold background
a gold cross on a purple background
a pink diamond on a black background
a white triangle on a green background
a purple circle on a pink background
a black square on a red background
a green cross on a blue background
a gold diamond on a white background
a red triangle on a gold background
a blue circle on a black background
a white cross on a purple background
"""

REPORT = "report.html"
SECONDS, QUICK_SECONDS = 40, 15
"""The time of the story on two idle cores of an AMD EPYC 9005."""

QUICK_PROMPTS = 3
QUICK_STEPS = 10


@dataclass(frozen=True, slots=True)
class Told:
    """One command of the story, the sentence before it, and its expected exit code.

    It also says whether the quick story has it.
    """

    title: str
    command: str
    code: int = 0
    quick: bool = True


STEPS = (
    Told("What the bridge model is", "inspect lab.alkahest", quick=False),
    Told(
        "Two models with different refiners cannot be averaged: mergetool measures them and refuses",
        "merge '0.5*lab.turbo + 0.5*lab.base' -o naive.safetensors",
        code=65,
    ),
    Told(
        "Forced, the merge loses what prompts ask for, and verify says so",
        "merge '0.5*lab.turbo + 0.5*lab.base' --force -o naive.safetensors",
        quick=False,
    ),
    Told(
        "",
        "verify naive.safetensors --prompts prompts.txt --strength 0.15 --report naive.html",
        code=1,
        quick=False,
    ),
    Told(
        "The bridge takes over what two fine-tunes learned, one of base and one of turbo, in one pass",
        "merge 'lab.alkahest + 1.25*(lab.striped - lab.base) + 0.5*(lab.hollow - lab.deturbo)' "
        "--protect refiner -o bridge.safetensors",
    ),
    Told(
        "Its pictures beside its parents', in one stage and two",
        f"verify bridge.safetensors --prompts prompts.txt --strength 0.15,0.4 --report {REPORT}",
    ),
    Told(
        "A sweep of strengths shows how much a second stage changes",
        "sample --prompts prompts.txt --base bridge.safetensors --guidance 3 --shift 3 --refiner lab.turbo "
        "--strength 0.1,0.15,0.25,0.4,0.6 -o strengths",
        quick=False,
    ),
    Told(
        "The difference of turbo becomes a LoRA, and alkahest draws in four steps with it",
        "diff --base lab.alkahest --variant lab.turbo --rank-thresh 0.995 --exclude refiner "
        "-o turbo-minus-alkahest.safetensors",
    ),
    Told(
        "",
        "sample --prompts prompts.txt --base lab.alkahest --lora turbo-minus-alkahest.safetensors:0.8 --steps 4 --guidance 0 "
        "-o lora",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Demo(OverwriteOptions):
    """The options of the demo."""

    output: Annotated[
        Path | str, Option(help="Write everything into this folder.", section="Output", kind=File("DIR"), short="-o")
    ] = "mergetool-demo"
    quick: Annotated[
        bool,
        Option(help="Tell a shorter story, with fewer pictures of fewer steps.", section="Pictures", kind=Flag()),
    ] = False


@command(Demo, prints=("no_progress",))
def demo(typed: Typed) -> None:
    """Run the whole story on small models.

    mergetool merges, verifies and samples its embedded models, saves a difference as a LoRA and writes a report.

    Exit code 1 says that a step failed.
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
    _tell(output, quick=asked.quick, no_progress=typed.no_progress)


def _tell(output: Path, *, quick: bool, no_progress: bool) -> None:
    """Run the story in the folder ``output``, each command as if it had been typed there."""
    started = time.monotonic()
    report = output.absolute() / REPORT
    steps = [step for step in STEPS if step.quick or not quick]
    console.heading("demo", f"{len(steps)} commands, about {QUICK_SECONDS if quick else SECONDS} s on two idle cores")
    console.heading("report", f"{report}, at the end")
    before = Path.cwd()
    os.chdir(output)
    try:
        Path("prompts.txt").write_text(
            "".join(PROMPTS.splitlines(keepends=True)[: QUICK_PROMPTS if quick else None]), "utf-8"
        )
        for step in steps:
            if step.title:
                console.say()
                console.say(f"# {step.title}")
            began = time.monotonic()
            _run(_quick(step.command) if quick else step.command, step.code, no_progress=no_progress)
            console.heading("took", f"{time.monotonic() - began:.1f} s")
    finally:
        os.chdir(before)
    console.say()
    console.heading("done", f"{report}  {time.monotonic() - started:.0f} s")
    if not quick:
        console.heading("", "naive.html reports the merge that fails; strengths/ and lora/ hold contact sheets")


def _quick(command: str) -> str:
    """The command with fewer steps where it verifies."""
    return f"{command} --steps {QUICK_STEPS}" if command.startswith("verify") else command


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
