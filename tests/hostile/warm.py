"""The real commands at 30 ms a run: a process that has imported everything forks once for each.

    with Warm(hash_seed="0") as warm:
        warm.warm_up(["inspect", "a.safetensors"], folder)
        ran = warm.run(["merge", ...], folder, umask=0o077, watched=True)

A run is a fork of its own with working folder, environment, umask and time zone of its own; what it would leave behind in memory ends with
it. A watched run also reports every audit event that would mean that something was imported, executed or contacted.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import locale
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.forking import take_new_threads
from tests.patience import HANG
from tests.windows import imitate_in_fork

ROOT = Path(__file__).parents[2]

FORBIDDEN = (
    *("import", "exec", "socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.", "ctypes.dlopen"),
    *("pickle.find_class", "marshal.", "code.__new__", "urllib.", "http.", "ftplib.", "webbrowser.", "os.startfile", "shutil.", "syslog."),
)  # fmt: skip
"""Audit events (their beginnings) that no run may cause once everything it needs is imported."""


LATE = {
    "diffusers": ("AutoencoderKL", "FlowMatchEulerDiscreteScheduler", "ZImagePipeline", "ZImageTransformer2DModel"),
    "transformers": ("AutoConfig", "AutoModel", "AutoTokenizer", "Qwen2Tokenizer", "Qwen3Model"),
}
"""What the sampler imports when it first draws, which takes four seconds."""


@dataclass(frozen=True)
class Forked:
    """A finished run: exit code, what it printed, and the audit events that were watched for."""

    code: int
    out: str
    err: str
    events: tuple[str, ...] = ()


@dataclass
class Warm:
    """The server, as a context manager. ``environment`` is that of the whole process, where hash seed and locale are decided, ``warnings`` Python's ``-W``."""

    hash_seed: str = "0"
    environment: Mapping[str, str] = field(default_factory=dict)
    warnings: str = "ignore"
    is_warmed: bool = False

    def __enter__(self) -> Self:
        env = {
            **os.environ, "PYTHONHASHSEED": self.hash_seed, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "PYTHONDONTWRITEBYTECODE": "1", **self.environment,
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-W", self.warnings, "-m", "tests.hostile.warm"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=env, text=True,
        )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(HANG)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def warm_up(self, arguments: Sequence[object], folder: Path) -> Forked:
        """Run a command in the server itself, so that what it imports is there for every run after it."""
        return self._ask([arguments], folder, in_server=True)[0]

    def run(self, arguments: Sequence[object], folder: Path, **conditions: Any) -> Forked:
        """Run a command in a fork. ``conditions``: umask, env (a mapping), tz, locale, watched, patched (a function of `PATCHES`)."""
        return self._ask([arguments], folder, **conditions)[0]

    def run_each(self, lines: Sequence[Sequence[object]], folder: Path, **conditions: Any) -> list[Forked]:
        """Run several commands one after the other in one fork, which is most of what a short command costs."""
        return self._ask(lines, folder, **conditions)

    def _ask(self, lines: Sequence[Sequence[object]], folder: Path, **conditions: Any) -> list[Forked]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(
            json.dumps({"lines": [[str(word) for word in line] for line in lines], "cwd": str(folder), **conditions})
            + "\n"
        )
        stdin.flush()
        answer = stdout.readline()
        assert answer, "the warm process has ended"
        return [Forked(**{**found, "events": tuple(found["events"])}) for found in json.loads(answer)]


def _trust_names() -> None:
    """A program that looks a metadata text up as a module, as careless plug-in code does."""
    from mergetool.checkpoint import reader

    opened = reader.Checkpoint.open

    def careless(path: Any, **more: Any) -> Any:
        checkpoint = opened(path, **more)
        for text in checkpoint.metadata.values():
            try:
                __import__(text)
            except Exception:
                continue
        return checkpoint

    reader.Checkpoint.open = careless  # type: ignore[method-assign]


def _load_pickles() -> None:
    """A reader that falls back to ``torch.load``, as other programs do."""
    from mergetool.checkpoint import reader

    opened = reader.Checkpoint.open

    def careless(path: Any, **more: Any) -> Any:
        try:
            return opened(path, **more)
        except Exception:
            import torch

            with contextlib.suppress(Exception):
                torch.load(path, weights_only=False)
            raise

    reader.Checkpoint.open = careless  # type: ignore[method-assign]


def _print_raw() -> None:
    """A console that prints names as they are."""
    from mergetool.cli import console

    console.printable = lambda text: text


def _write_the_folder() -> None:
    """A program that notes in its output where it ran."""
    from mergetool.checkpoint import header

    planned = header.Header.plan

    def telling(entries: Any, metadata: Any = None) -> Any:
        return planned(entries, {**(metadata or {}), "made in": os.getcwd()})

    header.Header.plan = telling  # type: ignore[method-assign]


def _trust_folders() -> None:
    """A loader that hands folders on as they are, and lets them bring code."""
    from mergetool.sampler import load

    load._examine = lambda folder, stem: None
    load._LOCAL = {"local_files_only": True, "trust_remote_code": True}


def _narrow_offsets(bits: int) -> None:
    """A reader that keeps only the low ``bits`` of a place in a file."""
    from mergetool.checkpoint.inputs import InputFile

    read_into, window, kept = InputFile.read_into, InputFile.window, (1 << bits) - 1
    InputFile.read_into = lambda self, buffer, offset: read_into(self, buffer, offset & kept)  # type: ignore[method-assign]
    InputFile.window = lambda self, offset, size: window(self, offset & kept, size)  # type: ignore[method-assign]


def _obey_tags() -> None:
    """A reader of recipes that has PyYAML make objects of what it reads."""
    import yaml

    from mergetool.recipe import document

    parsed = document.parse

    def careless(raw: bytes, source: str) -> Any:
        with contextlib.suppress(Exception):
            yaml.unsafe_load(raw)
        return parsed(raw, source)

    document.parse = careless


def _evaluate_texts() -> None:
    """A reader of recipes that tries whether a text is Python."""
    from mergetool.recipe import document

    plain = document.plain

    def careless(text: str, at: Any) -> Any:
        with contextlib.suppress(Exception):
            return eval(text)
        return plain(text, at)

    document.plain = careless


def _expand_environment() -> None:
    """A reader of recipes that puts in what the environment says."""
    from mergetool.recipe import document

    parsed = document.parse
    document.parse = lambda raw, source: parsed(os.path.expandvars(raw), source)


PATCHES = {
    "obey tags": _obey_tags,
    "evaluate texts": _evaluate_texts,
    "expand the environment": _expand_environment,
    "31-bit offsets": functools.partial(_narrow_offsets, 31),
    "32-bit offsets": functools.partial(_narrow_offsets, 32),
    "trust folders": _trust_folders,
    "write the folder": _write_the_folder,
    "trust names": _trust_names,
    "load pickles": _load_pickles,
    "print raw": _print_raw,
    "windows": imitate_in_fork,
}
"""Holes to put in, which the harnesses must notice, and another system."""


class _Watch:
    """The audit hook of one run; it cannot be taken away again, so it is only ever added in a fork."""

    def __init__(self) -> None:
        self.events: list[str] = []
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(FORBIDDEN):
            self.events.append(f"{event} {arguments!r:.200}")


def _serve() -> None:
    out = os.fdopen(os.dup(1), "w")
    sys.modules["__main__"].__package__ = None  # click calls a program that is part of a package by the module's name
    _import_everything()
    _build_commands_once()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryDirectory() as scratch:
            answer = (
                _in_server(request, Path(scratch)) if request.get("in_server") else _in_fork(request, Path(scratch))
            )
        out.write(json.dumps(answer) + "\n")
        out.flush()


def _import_everything() -> None:
    import importlib
    import pkgutil

    import torch

    import mergetool

    torch.set_num_threads(1)
    "\x1b".encode("unicode_escape")  # a codec is imported when it is first used
    for module in pkgutil.walk_packages(mergetool.__path__, "mergetool."):
        if ".lab.training" not in module.name and "__main__" not in module.name:
            importlib.import_module(module.name)
    for name, classes in LATE.items():
        for each in classes:
            getattr(importlib.import_module(name), each)


def _build_commands_once() -> None:
    """typer reads 20 signatures at every call, which is most of the time of a short command."""
    import typer.main

    from mergetool.cli.main import app

    built: Any = typer.main.get_command(app)
    for command in built.commands.values():  # a group builds each when it is looked up
        dict(getattr(command, "commands", {}))
    typer.main.get_command = lambda _: built


def _in_server(request: dict[str, Any], scratch: Path) -> list[dict[str, Any]]:
    before, kept = Path.cwd(), [os.dup(1), os.dup(2)]
    try:
        return _commands(request, scratch, None)
    finally:
        for number, fd in enumerate(kept, 1):
            os.dup2(fd, number)
            os.close(fd)
        os.chdir(before)


def _in_fork(request: dict[str, Any], scratch: Path) -> list[dict[str, Any]]:
    child = os.fork()
    if child == 0:
        code = 70
        try:
            take_new_threads()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # requests are the server's to read
            _set_conditions(request)
            watch = _Watch() if request.get("watched") else None
            (scratch / "answer").write_text(json.dumps(_commands(request, scratch, watch)))
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if (scratch / "answer").exists():
        return list(json.loads((scratch / "answer").read_text()))
    return [
        {"code": os.waitstatus_to_exitcode(status), "out": "", "err": "the run ended without an answer", "events": []}
    ]


def _set_conditions(request: dict[str, Any]) -> None:
    os.environ.update(request.get("env", {}))
    if "tz" in request:
        os.environ["TZ"] = request["tz"]
        time.tzset()
    if "locale" in request:
        locale.setlocale(locale.LC_ALL, request["locale"])
    if "umask" in request:
        os.umask(request["umask"])
    if "patched" in request:
        PATCHES[request["patched"]]()


def _commands(request: dict[str, Any], scratch: Path, watch: _Watch | None) -> list[dict[str, Any]]:
    os.chdir(request["cwd"])
    os.environ["MERGETOOL_CONFIG_DIR"] = f"{request['cwd']}/config"
    answers = []
    for line in request["lines"]:
        for number, name in enumerate(("out", "err"), 1):
            fd = os.open(scratch / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(fd, number)
            os.close(fd)
        code = _command(line)
        events = list(watch.events) if watch else []
        out, err = ((scratch / name).read_bytes().decode("utf-8", "backslashreplace") for name in ("out", "err"))
        answers.append({"code": code, "out": out, "err": err, "events": events})
        if watch:
            watch.events.clear()
    return answers


def _command(line: list[str]) -> int:
    from mergetool.cli.main import main

    sys.argv = ["mergetool", *line]
    try:
        main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 99  # no command may end so
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    _serve()
