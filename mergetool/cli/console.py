"""Print lines on stdout, progress and errors on stderr, and one JSON object with ``--json``."""

from __future__ import annotations

import functools
import importlib
import io
import json
import os
import pkgutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, ParamSpec, TypeVar

import typer

from mergetool import options, packages
from mergetool.errors import MergetoolError, PackageError
from mergetool.options import table as table_of_options

P = ParamSpec("P")
R = TypeVar("R")


_BIDI = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C, 0x2028, 0x2029}


def printable(text: str) -> str:
    """``text`` with control characters, line breaks and bidirectional overrides escaped.

    Names and metadata come out of files; printed raw they could move the cursor or disguise themselves.
    """
    return "".join(
        c if (c.isprintable() or c == " ") and ord(c) not in _BIDI else c.encode("unicode_escape").decode()
        for c in text
    )


class _Stdout:
    """The standard output. That it is closed (``| head``) or on a full disk stops no work: what comes later goes nowhere."""

    def __init__(self) -> None:
        self.failure: OSError | None = None
        self.has_json = False

    def print(self, text: str) -> None:
        try:
            print(text)
        except OSError as error:
            self._give_up(error)

    def flush(self) -> None:
        try:
            sys.stdout.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.failure = self.failure or error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


_stdout = _Stdout()


def spelled(text: str) -> str:
    """``text`` with options as they are typed: `` `rank_max=0` `` is ``--rank-max 0``."""
    return table_of_options.spelled(text, _flag)


_asked: type[table_of_options.Table] = table_of_options.Table
"""The request of the command that runs: an option of another may have its name and another spelling."""


def speak_of(request: type[table_of_options.Table]) -> None:
    """Make later sentences spell options as ``request``'s command does."""
    global _asked
    _asked = request


def _flag(name: str, value: str | None) -> str | None:
    row = table_of_options.named(name, _asked) or table_of_options.named(name)
    if row is None:  # in a group of options that this command does not have
        for module in pkgutil.iter_modules(options.__path__, f"{options.__name__}."):
            importlib.import_module(module.name)
        row = table_of_options.named(name)
    if row is None:
        return None
    spelling = row.option.kind.metavar if row.option.argument else row.option.short or row.flag
    return f"{spelling} {value}" if value else spelling


def say(text: str = "") -> None:
    """One line on stdout."""
    _stdout.print(printable(spelled(text)))


def heading(word: str, text: str) -> None:
    """A line under one of the margin words: plan, merge, done, next."""
    say(f"{word:<8}{text}")


def print_json(value: dict[str, Any]) -> None:
    """Print the one JSON object of ``--json``, indented for people who look anyway."""
    _stdout.has_json = True
    _stdout.print(json.dumps(_spelled_in(value), indent=2, ensure_ascii=True))


def _spelled_in(value: Any) -> Any:
    """A value for JSON with every text in it `spelled`."""
    if isinstance(value, dict):
        return {_spelled_in(key): _spelled_in(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_spelled_in(inner) for inner in value]
    return spelled(value) if isinstance(value, str) else value


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> None:
    """Aligned columns under the margin; the first ``left`` are flushed left, the others right."""
    lines = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        say(" " * 8 + "  ".join(cells).rstrip())


def size(count: float) -> str:
    """Bytes in decimal units: 12309817472 is "12.3 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def parameters(count: int) -> str:
    """A parameter count: 6154908736 is "6.15 B"."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return str(count)


def plural(count: int, noun: str) -> str:
    """``count`` and its noun: "1 tensor", "453 tensors"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s" if noun[-1] != "x" else f"{count} {noun[:-2]}ices"


def listed(names: Sequence[str], *, most: int = 4) -> str:
    """Some names and how many more there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


@contextmanager
def progress(
    word: str, total: int, *, shown: bool, unit: str = "B", publishes: bool = False
) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr, and give the function that advances it.

    It counts bytes, or another ``unit``, with their rate and the time left.

    Within the block a signal is acted on only when that function is called: raised anywhere, it could fall between the
    making of a temporary file and the block that removes it. When the block ``publishes`` the command's output, signals that come
    after its end are too late: what is left is to say so.
    """
    _signals.deferred = True
    done = False
    try:
        if not shown or not sys.stderr.isatty():
            yield lambda _: _signals.check()
            done = publishes
            return
        from tqdm import tqdm

        with tqdm(total=total, desc=f"{word:<7}", unit=unit, unit_scale=unit == "B", ascii=" #", leave=True) as bar:

            def advance(moved: int) -> None:
                bar.update(moved)
                _signals.check()

            yield advance
            done = publishes
    finally:
        _signals.deferred = done


class _Ended(BaseException):
    """A signal asked the process to end; carries the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Signals:
    """Signals that ask the process to end; while ``deferred``, they wait for the next ``check``."""

    def __init__(self) -> None:
        self.deferred = False
        self._received: int | None = None

    def receive(self, number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        self._received = number
        if not self.deferred:
            self.check()

    def check(self) -> None:
        """End the command if a signal has come."""
        if self._received is not None:
            raise _Ended(self._received)


_signals = _Signals()


def run(app: Callable[[], object]) -> None:
    """Run the program. Signals that ask it to end stop it cleanly: temporary files go, the code is 128 + the signal.

    They are SIGINT, SIGTERM and SIGHUP, and Windows' SIGBREAK, which Ctrl+Break and a console that is closed send.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # code pages of consoles lack most characters of names
            stream.reconfigure(errors="backslashreplace")
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _signals.receive)
    try:
        with packages.told():
            app()
    except _Ended as ended:  # before or after a command's own work
        sys.exit(128 + ended.number)
    except PackageError as error:  # of importing the command itself
        print(f"mergetool: {printable(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)


def command(function: Callable[P, R]) -> Callable[P, R]:
    """Turn a command's errors into a sentence on stderr and an exit code."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        _stdout.has_json = False
        try:
            with packages.told():
                result = function(*args, **kwargs)
            _stdout.flush()  # here, where its failure can be told
        except MergetoolError as error:
            sentence = _with_notes(str(error), error)
            if kwargs.get("as_json") and not _stdout.has_json:  # a check that says no has printed what it found
                failed = {"type": type(error).__name__, "message": sentence, "exit_code": error.exit_code}
                print_json({"error": failed})
            fail(sentence, error.exit_code)
        except _Ended as ended:
            sentence = "stopped; nothing was written at the output's place."
            fail(_with_notes(sentence, ended), 128 + ended.number)
        except MemoryError:
            fail("the machine is out of memory; lower --threads or close other programs.", 74)
        except OSError as error:  # of a disk that fails under the program's own files, or under what it prints to
            where = f'"{error.filename}"' if error.filename else "a file"
            fail(f"{where} failed with {error.strerror or error}; check the disk it is on and run again.", 74)
        if _stdout.failure is not None and not isinstance(_stdout.failure, BrokenPipeError):
            why = _stdout.failure.strerror
            fail(f"the work is finished, but its report could not be printed ({why}); check where stdout goes.", 74)
        return result

    return wrapped


def _with_notes(sentence: str, error: BaseException) -> str:
    """A sentence and the notes of the error, such as the part kept for --resume."""
    notes: list[str] = getattr(error, "__notes__", [])
    return "; ".join([sentence.removesuffix("."), *notes]) + "." if notes else sentence


def fail(sentence: str, code: int) -> NoReturn:
    """Say why on stderr and end the command."""
    print(f"mergetool: {printable(spelled(sentence))}", file=sys.stderr)
    raise typer.Exit(code)
