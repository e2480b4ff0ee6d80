"""Sentences for command lines that cannot be read, each with the next step."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from mergetool.cli import console
from mergetool.errors import UsageError

_CLICK_ERROR: Any = typer.BadParameter.__mro__[1]
"""click's error for a command line, wherever this version of typer has it from."""

MEANT = {
    "add": "lora merge",
    "bake": "lora bake",
    "check": "verify",
    "common": "lora common",
    "extract": "diff",
    "generate": "sample",
    "info": "inspect",
    "interference": "lora interference",
    "orthogonal": "lora orthogonal",
    "quantise": "convert",
    "quantize": "convert",
    "register": "models add",
    "resize": "lora resize",
    "show": "inspect",
    "subtract": "diff",
}
"""Words that people type for a command, and for commands of a group without it."""


@contextmanager
def in_one_sentence(ctx: Any) -> Iterator[None]:
    """End the program with one sentence and exit code 2 where click refuses the command line."""
    try:
        yield
    except _CLICK_ERROR as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        console.fail(sentence(error, error.ctx or ctx), UsageError.exit_code)


def unknown_command(ctx: Any, words: Sequence[str], known: Collection[str]) -> Exception:
    """Make the error for a word that is no command.

    A model or an expression gets the command that takes it.
    """
    word, path = words[0], ctx.command_path
    near = difflib.get_close_matches(word.lower(), known, 1) or [MEANT[word] for _ in [0] if word in MEANT]
    if near:
        meant = f'did you mean "{path} {near[0]}"?'
    elif re.search(r"[-+*(]\s*|\.safetensors$|\.gguf$", word) and len(words) == 1 and path == "mergetool":
        meant = (
            f'a command comes first, as in "mergetool inspect {word}" or "mergetool merge {word} -o OUT.safetensors".'
        )
    else:
        meant = f'its commands are {", ".join(name for name in known)}; "{path} --help" explains them.'
    return _CLICK_ERROR(f'"{path}" has no command "{word}"; {meant}', ctx)  # type: ignore[no-any-return]


def sentence(error: Any, ctx: Any) -> str:
    """Turn click's error into one sentence with the next step."""
    called = ctx.invoked_subcommand if error.ctx is None else None
    path = f"{ctx.command_path} {called}" if called else str(ctx.command_path)
    more = f'"{path} --help" shows how it is used'
    match type(error).__name__:
        case "NoSuchOption":
            return _unknown_option(error, path)
        case "MissingParameter" if error.param is not None:
            example = _example(ctx.command)
            wanted = str(error.param.metavar or error.param.name)
            return (
                f'"{path}" needs {wanted}, as in: {example}; {more}.'
                if example
                else f'"{path}" needs {wanted}; {more}.'
            )
    message = error.format_message()
    if message.startswith(f'"{path}" has no command'):
        return str(message)
    extra = re.match(r"Got unexpected extra argument(?:s|\(s\))? \((.*)\)", message)
    if extra:
        return f'"{path}" does not take "{extra[1]}"; {more}.'
    value = re.match(r"Option '?([^' ]+)'? requires an argument", message)
    if value:
        return f"{value[1]} needs a value; {more}."
    return f"{message[:1].lower()}{message[1:].removesuffix('.')}; {more}."


def _unknown_option(error: Any, path: str) -> str:
    """An option that the command lacks, with the nearest of those it has."""
    name = error.option_name
    known = [flag for param in error.ctx.command.get_params(error.ctx) for flag in param.opts if flag.startswith("--")]
    folded = {flag.replace("_", "-").lower(): flag for flag in known}
    near = difflib.get_close_matches(name.replace("_", "-").lower(), folded, 1, cutoff=0.55)
    meant = f"did you mean {folded[near[0]]}?" if near else f'"{path} --help" lists its options.'
    return f'"{path}" has no option {name}; {meant}'


def _example(command: Any) -> str:
    """The first example of a command's help, in one line."""
    found = re.search(r"^\s*(mergetool .*(?:\\\n.*)*)", command.epilog or "", re.MULTILINE)
    return re.sub(r"\s*\\\n\s*", " ", found[1]) if found else ""
