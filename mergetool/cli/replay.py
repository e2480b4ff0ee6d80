"""``mergetool replay``: the merge that a file records, done again, and every byte compared."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from mergetool.cli import console
from mergetool.cli.console import JsonOption, NoProgressOption
from mergetool.cli.verify import place
from mergetool.errors import CheckFailed

if TYPE_CHECKING:
    from mergetool.verification.replay import Replay

EXAMPLES = """\b
Examples:
  mergetool replay out.safetensors
  mergetool replay out.safetensors --input tuned=/models/tuned.safetensors -o again.safetensors
  mergetool replay out-folder --json

Inputs are looked for under the names that the recipe records, then beside OUT; --input says where else one is. The whole file is compared:
header, metadata and tensors, of a folder every file. `mergetool verify` asks less, whether the tensors are right, and looks at pictures.
"""


@console.command
def replay(
    output: Annotated[str, typer.Argument(help="A merge that mergetool made.", metavar="OUT")],
    inputs: Annotated[
        list[str] | None, typer.Option("--input", help="Where an input is now. Repeatable.", metavar="NAME=MODEL")
    ] = None,
    write_to: Annotated[
        str | None, typer.Option("--output", "-o", help="Keep what comes out, in this file or folder.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Worker threads [default: all cores]", min=1, max=256)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    as_json: JsonOption = False,
    no_progress: NoProgressOption = False,
) -> None:
    """Rebuild a merge from the recipe in its metadata, and compare every byte.

    Exit code 1 when the bytes are not the same; a changed input, recipe or version is named.
    """
    from mergetool.verification.replay import replay as again

    started = time.monotonic()
    with console.progress("replay", 100, shown=not (no_progress or as_json), unit="%") as bar:
        percent = 0

        def advance(done: int, total: int) -> None:
            nonlocal percent
            bar(100 * done // total - percent)
            percent = 100 * done // total

        found = again(
            output,
            inputs=dict(place(text) for text in inputs or ()),
            write_to=write_to,
            overwrite=overwrite,
            threads=threads,
            progress=advance,
        )
    if as_json:
        console.print_json(
            {
                "same": found.same,
                "expression": found.expression,
                "reasons": found.reasons,
                "difference": found.difference,
                "missing": found.missing,
                "extra": found.extra,
                "differing": found.differing,
                "bytes": found.size,
                "files": found.files,
                "output": None if found.kept is None else str(found.kept.path),
            }
        )
    else:
        _print(found, time.monotonic() - started)
        if found.kept is not None:
            if found.kept.note:
                console.heading("note", found.kept.note)
            console.heading("done", str(found.kept))
    if not found.same:
        raise CheckFailed(f"{output} is not what its recipe makes now.")


def _print(found: Replay, seconds: float) -> None:
    console.heading("recipe", found.expression)
    files = console.plural(found.files, "file")
    if found.same:
        console.heading("same", f"every byte of {files}, {console.size(found.size)}  {seconds:.1f} s")
        return
    for reason in found.reasons:
        console.heading("OTHER", reason)
    if found.difference:
        console.heading("OTHER", found.difference)
    named = [f"{name} (from byte {at})" for name, at in found.differing.items()]
    for what, names in (
        ("missing, or of another shape or dtype", found.missing),
        ("not in the recipe", found.extra),
        ("of other bytes", named),
    ):
        if names:
            console.heading("OTHER", f"{console.plural(len(names), 'tensor')} {what}: {console.listed(names)}")
    if found.differing and not found.reasons:
        console.heading("", "the inputs and the version are those recorded: the recipe was edited, or the tensors were")
