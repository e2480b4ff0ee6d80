"""The process that ComfyUI runs in: reads requests from its standard input until it ends, answers each with one line."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class Kept(logging.Handler):
    """Keeps the warnings and errors that are logged, which is how ComfyUI names what it left out."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def serve(commands: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """Answers requests ``{"command": NAME, ...arguments}`` with the command's result and its log, or with its error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the program prints is not an answer
    kept = Kept()
    logging.getLogger().addHandler(kept)
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        request = json.loads(line)
        kept.lines.clear()
        try:
            answer = commands[request.pop("command")](**request)
        except Exception as error:  # whatever the program raises is its answer
            logging.getLogger().info("raised", exc_info=error)
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps({**answer, "log": list(kept.lines)}) + "\n")
    os._exit(0)  # without the destructors of a program that is half gone


if __name__ == "__main__":
    from tests.oracles import library

    library.load(Path(sys.argv[1]))
    from tests.oracles.commands import COMMANDS

    serve(COMMANDS)
