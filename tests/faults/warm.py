"""Runs of the real program at 30 ms each: the client of `tests.faults.server`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.patience import HANG

ROOT = Path(__file__).parents[2]
PATIENCE = float(HANG)
"""Seconds after which a run that should have ended is a failure of its own."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run ended: exit code (or minus the signal), what it printed, its CPU seconds."""

    code: int
    out: str
    err: str
    cpu: float

    @property
    def killed(self) -> bool:
        """Whether a signal that cannot be handled ended it, so that it had no chance to clean up."""
        return self.code < 0


@dataclass(slots=True)
class Run:
    """A run that was started; with a gate it waits before its first step until `go`. ``fired``: its short write came."""

    server: Warm
    pid: int
    out: Path
    err: Path
    gate: Path | None
    mark: Path
    fired: bool = False
    ended: Ended | None = field(default=None)

    def at_gate(self) -> None:
        """Wait until the run stands at its gate, with nothing before it but the program's own work."""
        assert self.gate is not None
        reached = self.gate.with_name(self.gate.name + ".reached")
        deadline = time.monotonic() + PATIENCE
        while not reached.exists():
            assert time.monotonic() < deadline, "a run did not reach its gate"
            time.sleep(0.0005)
        reached.rmdir()

    def go(self) -> None:
        """Open the gate, at which the run must stand."""
        assert self.gate is not None
        fd = os.open(self.gate, os.O_RDWR)
        os.write(fd, b"x")
        os.close(fd)

    def kill(self, number: int = signal.SIGKILL) -> bool:
        """Send a signal; False when the run has ended already."""
        if self.ended is not None:
            return False
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True

    def wait(self, seconds: float = PATIENCE) -> Ended:
        """Wait for the end. A run that goes on for longer than ``seconds`` is killed and fails the test."""
        ended = self.wait_for(seconds)
        if ended is None:
            self.kill()
            self.wait_for(PATIENCE)
            raise AssertionError(f"a run did not end within {seconds} s: {self.err.read_text()}")
        return ended

    def wait_for(self, seconds: float) -> Ended | None:
        """How it ended, None when it still runs after ``seconds``."""
        if self.ended is None:
            answer = self.server.ending(self.pid, seconds)
            if answer is None:
                return None
            self.ended = Ended(
                os.waitstatus_to_exitcode(answer["status"]),
                self.out.read_text(errors="backslashreplace") if self.out.is_file() else "",
                self.err.read_text(errors="backslashreplace") if self.err.is_file() else "",
                answer["cpu"],
            )
            self.fired = self.mark.exists()
            for path in (self.out, self.err, self.gate, self.mark):
                if path is not None and path.parent == self.server.scratch:
                    path.unlink(missing_ok=True)
        return self.ended


class Warm:
    """A server in a scratch folder of its own; ``warm`` are commands that it runs once in ``cwd`` before it serves."""

    def __init__(self, scratch: Path, cwd: Path, warm: Sequence[Sequence[str]], **environment: str) -> None:
        self.scratch = scratch
        self.cpu = 0.0
        self._count = 0
        self._endings: dict[int, dict[str, Any]] = {}
        self._started: list[int] = []
        self._buffer = b""
        self._errors = scratch / "server.err"
        environment = {
            **os.environ,
            "MERGETOOL_CONFIG_DIR": str(scratch / "config"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
            # Huge pages: a fork copies fewer page tables, 4 ms instead of 11.
            "PYTHONMALLOC": "malloc",
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
            **environment,
        }
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.server"],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        self._send({"cwd": str(cwd), "warm": [list(arguments) for arguments in warm]})
        self._answer(120.0, lambda answer: "ready" in answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the server; its runs must have ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=PATIENCE)
        self._process.stdout.close()

    def start(
        self,
        arguments: Sequence[object],
        *,
        cwd: Path,
        gated: bool = False,
        umask: int = 0o022,
        limits: Mapping[str, tuple[int, int]] | None = None,
        uid: int = 0,
        short: int = 0,
        interval: int = 0,
        broken: str = "",
        out: Path | None = None,
    ) -> Run:
        """Start the program with ``arguments`` in ``cwd``.

        ``short`` names the positioned write that does only half, ``interval`` the bytes between two entries of a journal, ``broken`` a wrong protocol of `tests.faults.broken`, ``out``
        another place for what it prints.
        """
        self._count += 1
        stem = self.scratch / f"run-{os.getpid()}-{self._count}"
        gate = stem.with_suffix(".gate") if gated else None
        if gate is not None:
            os.mkfifo(gate)
        printed, errors, mark = out or stem.with_suffix(".out"), stem.with_suffix(".err"), stem.with_suffix(".mark")
        self._send(
            {
                "argv": [str(argument) for argument in arguments],
                "cwd": str(cwd),
                "gate": str(gate or ""),
                "out": str(printed),
                "err": str(errors),
                "umask": umask,
                "limits": dict(limits or {}),
                "uid": uid,
                "short": short,
                "interval": interval,
                "mark": str(mark),
                "broken": broken,
            }
        )
        answer = self._answer(PATIENCE, lambda answer: "started" in answer)
        assert answer is not None
        return Run(self, answer["started"], printed, errors, gate, mark)

    def run(self, arguments: Sequence[object], *, cwd: Path, **how: Any) -> Ended:
        """Start the program and wait for its end."""
        return self.start(arguments, cwd=cwd, **how).wait()

    def ending(self, pid: int, seconds: float) -> dict[str, Any] | None:
        """What the server said of the end of ``pid``; None when it said nothing within ``seconds``."""
        if pid not in self._endings:
            self._answer(seconds, lambda answer: answer.get("ended") == pid)
        return self._endings.pop(pid, None)

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        self._process.stdin.flush()

    def _answer(self, seconds: float, wanted: Any) -> dict[str, Any] | None:
        """The first answer that is ``wanted``; endings that come before it are kept."""
        import select

        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        while True:
            *lines, self._buffer = self._buffer.split(b"\n")
            found = None
            for line in lines:
                answer: dict[str, Any] = json.loads(line)
                if "ended" in answer:
                    self._endings[answer["ended"]] = answer
                    self.cpu += answer["cpu"]
                if found is None and wanted(answer):
                    found = answer
            if found is not None:
                return found
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                if time.monotonic() < deadline:
                    continue
                return None
            data = os.read(self._process.stdout.fileno(), 1 << 16)
            if not data:
                raise AssertionError(f"the server ended: {self._errors.read_text()}")
            self._buffer += data
