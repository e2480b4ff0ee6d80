"""The program under test, started once and forked for every run: 30 ms a run instead of 2 s.

``python -m tests.faults.server`` imports everything, runs the commands it is given once so that nothing is imported later,
and then forks a child for every line of JSON on its standard input. A child is a process like any other: it calls the
program's own `main`, and can be killed, traced, limited and signalled. See `tests.faults.warm` for the other side.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import resource
import select
import signal
import sys
from typing import Any

from tests.forking import take_new_threads

for _threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_threads] = "1"  # a thread of a library would not survive the fork


def _prepare(request: dict[str, Any]) -> None:
    """Become what the request asks for, in the child."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    os.setsid()
    gate = os.open(request["gate"], os.O_RDWR) if request["gate"] else -1
    os.chdir(request["cwd"])
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for fd, path in ((1, request["out"]), (2, request["err"])):
        opened = os.open(path, flags, 0o666)
        os.dup2(opened, fd)
        os.close(opened)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for name, (soft, hard) in request["limits"].items():
        resource.setrlimit(getattr(resource, name), (soft, hard))
    if request["uid"]:
        os.setgroups([])
        os.setgid(request["uid"])
        os.setuid(request["uid"])
    os.umask(request["umask"])
    if gate >= 0:
        os.mkdir(request["gate"] + ".reached", 0o777)
        os.read(gate, 1)  # until the other side is ready: a tracer is attached, other runs stand at their gates
        os.close(gate)


def _short_writes(nth: int, mark: str) -> None:
    """The ``nth`` positioned write does only a part, as a nearly full disk or a signal makes it; ``mark`` is made when it does."""
    pwrite, calls = os.pwrite, iter(range(1, 1 << 60))

    def pwrite_part(fd: int, data: memoryview, offset: int) -> int:
        if next(calls) != nth or len(data) < 2:
            return pwrite(fd, data, offset)
        os.close(os.open(mark, os.O_WRONLY | os.O_CREAT))
        return pwrite(fd, data[: len(data) // 2], offset)

    os.pwrite = pwrite_part  # type: ignore[assignment]


def _run(main: Any, arguments: list[str]) -> int:
    sys.argv = ["mergetool", *arguments]
    try:
        main()
    except SystemExit as ended:
        code = ended.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
        return code or 0
    return 0


def _child(main: Any, request: dict[str, Any]) -> None:
    """Never returns: runs the program, and ends as the interpreter would, but without tearing torch down."""
    code = 70
    try:
        take_new_threads()
        _prepare(request)
        if request["short"]:
            _short_writes(request["short"], request["mark"])
        if request["interval"]:
            from mergetool.checkpoint import journal

            journal.INTERVAL = request["interval"]
        if request["broken"]:
            from tests.faults import broken

            broken.install(request["broken"])
        code = _run(main, request["argv"])
        sys.stdout.flush()
    except BrokenPipeError:
        code = 120
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def _reap(answer: Any) -> None:
    while True:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        print(
            json.dumps({"ended": pid, "status": status, "cpu": usage.ru_utime + usage.ru_stime}),
            file=answer,
            flush=True,
        )


def main() -> None:
    """Warm up with the commands of the first line, then serve."""
    answer = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)

    import typer.main

    typer.main.get_command = functools.cache(typer.main.get_command)
    from mergetool.cli.main import main as program
    from tests.faults import broken  # noqa: F401

    first = json.loads(sys.stdin.buffer.raw.readline())  # type: ignore[attr-defined]
    os.chdir(first["cwd"])
    for arguments in first["warm"]:
        code = _run(program, arguments)
        if code:
            raise SystemExit(f"warming up with {arguments} ended with {code}")
    sys.stdout.flush()
    gc.collect()
    gc.freeze()
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writer)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    print(json.dumps({"ready": os.getpid()}), file=answer, flush=True)
    buffer = b""
    while True:
        ready, _, _ = select.select([0, reader], [], [])
        if reader in ready:
            os.read(reader, 4096)
            _reap(answer)
        if 0 in ready:
            data = os.read(0, 1 << 16)
            if not data:
                return
            buffer += data
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                pid = os.fork()
                if pid == 0:
                    _child(program, json.loads(line))
                print(json.dumps({"started": pid}), file=answer, flush=True)


if __name__ == "__main__":
    main()
