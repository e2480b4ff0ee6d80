"""Running a page's commands: `mergetool` in forks of a warm process, everything else in bash."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests import standins
from tests.cli.run import warm
from tests.patience import HANG

_OPERATOR = re.compile(r"""(?P<left>(?:"[^"]*"|'[^']*'|[^"'|>&;])*)(?P<right>[|>].*)?""", re.DOTALL)


@dataclass(frozen=True)
class Finished:
    """What a command left: its exit code, and what a terminal shows of it."""

    code: int
    lines: tuple[str, ...]


class Shell:
    """A terminal in ``folder``, which is the home folder too and is written as ``~`` in what is shown."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.code = 0

    def run(self, command: str) -> Finished:
        """Run a command as it is typed. What `mergetool` prints may go on by ``|`` or ``>``; ``$?`` is the last exit code."""
        command = command.replace("\\\n", " ")
        self.code, text = self._mergetool(command) if command.startswith("mergetool ") else self._bash(command, "")
        lines = text.replace(str(self.folder), "~").splitlines()
        return Finished(self.code, tuple(line.rstrip() for line in lines))

    def _mergetool(self, command: str) -> tuple[int, str]:
        parts = _OPERATOR.fullmatch(command)
        assert parts, f"only | and > are known after mergetool: {command}"
        words = [self._at_home(word) for word in shlex.split(parts["left"], comments=True)[1:]]
        ran = warm().run(words, self.folder, env={"HOME": str(self.folder)})
        if not parts["right"]:
            return ran.code, ran.out + ran.err
        code, text = self._bash(f"cat {parts['right']}", ran.out)
        return ran.code or code, ran.err + text

    def _at_home(self, word: str) -> str:
        return str(self.folder / word[2:]) if word.startswith("~/") else word

    def _bash(self, command: str, fed: str) -> tuple[int, str]:
        env = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "MERGETOOL_CONFIG_DIR": str(self.folder / "config"),
            "HF_HUB_OFFLINE": "1",
            "LC_ALL": "C.UTF-8",
        }
        done = subprocess.run(
            ["bash", "-c", f"(exit {self.code}); {command}"],
            cwd=self.folder,
            env=env,
            input=fed,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=HANG,
        )
        return done.returncode, done.stdout


class ShellWithStandIns(Shell):
    """A terminal where the files exist that a command names; what an earlier command has made there may be made again.

    ``files`` are the page's own, each with its text; what that names exists too.
    """

    def __init__(self, folder: Path, files: Mapping[str, str]) -> None:
        super().__init__(folder)
        self.files = files

    def run(self, command: str) -> Finished:
        words = shlex.split(command.replace("\\\n", " "), comments=True)[1:]
        for before, word in itertools.pairwise(words):
            if before in ("-o", "--output") and (self.folder / word).is_file():
                (self.folder / word).unlink()
        for word in words:
            self._write(word)
            if word.startswith("~/"):
                place = Path(self._at_home(word))
                place.parent.mkdir(parents=True, exist_ok=True)
                standins.provide(place.parent, [place.name])
        standins.provide(self.folder, words)
        return super().run(command)

    def _write(self, name: str) -> None:
        if text := self.files.get(name):
            (self.folder / name).write_text(text, "utf-8")
            standins.provide(self.folder, text.split())
