"""A program in a process of its own that answers requests: one line of JSON each way, tensors as safetensors files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tests.oracles.fetching import comfyui, comfyui_packages

REPOSITORY = Path(__file__).parents[2]


class RefusedError(Exception):
    """What the other program raised, as ``Class: message``; ``log`` holds the warnings it gave before."""

    def __init__(self, sentence: str, log: Sequence[str]) -> None:
        super().__init__(sentence)
        self.log = list(log)


class Worker:
    """A Python module that runs ``tests.oracles.worker.serve``, started on the first request and kept until ``close``.

    ``path`` goes before everything else on the process's import path. Not to be shared between threads.
    """

    def __init__(self, module: str, arguments: Sequence[str] = (), path: Sequence[Path] = ()) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        self._path = [str(folder) for folder in path]
        self._process: subprocess.Popen[str] | None = None
        self._errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 -- closed by close()

    def ask(self, command: str, **request: Any) -> dict[str, Any]:
        """The answer of ``command`` in the other process, with ``log``, the warnings that were logged meanwhile.

        Paths are sent as text. Raises ``RefusedError`` for what the command raised.
        """
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"command": command, **request}, default=str) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise AssertionError(f"the process ended while it answered {command!r}:\n{self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RefusedError(answer["error"], answer["log"])
        return answer

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdout is not None
            self._process.communicate()  # closes its input, upon which it ends
            self._process = None
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                cwd=REPOSITORY,
                env=self._environment(os.environ),
            )
        return self._process

    def _environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        # The machine's accelerator is not for these: every answer is the processor's.
        return {**inherited, "PYTHONPATH": os.pathsep.join(self._path), "CUDA_VISIBLE_DEVICES": ""}

    def _last_words(self) -> str:
        self._errors.seek(0)
        return self._errors.read()[-4000:]


class ComfyUI(Worker):
    """ComfyUI 0.30.0 as a library on the processor. Fetches it; raises ``OracleMissingError``.

    The commands, with their arguments and answers, are the functions of ``tests/oracles/commands``.
    """

    def __init__(self) -> None:
        super().__init__("tests.oracles.worker", [str(comfyui())], [comfyui_packages()])
