"""The real ComfyUI 0.30.0 server with the node pack in it, started headless, and what its page does: queue, look, interrupt."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import mergetool.comfyui
from tests.oracles import comfyui, comfyui_packages, pip_target
from tests.patience import HANG

REPOSITORY = Path(__file__).parents[2]
NODES = Path(mergetool.comfyui.__file__).parent
# What the server imports beside ComfyUI as a library, without the page, its templates, the database's migrations and film.
PACKAGES = [
    "aiohappyeyeballs==2.7.1",
    "aiohttp==3.14.5",
    "aiosignal==1.4.0",
    "attrs==26.1.0",
    "blake3==1.0.11",
    "frozenlist==1.8.0",
    "multidict==7.2.1",
    "propcache==0.5.4",
    "pydantic-settings==2.16.3",
    "python-dotenv==1.2.4",
    "simpleeval==1.0.8",
    "sqlalchemy==2.1.9",
    "torchsde==0.2.6",
    "trampoline==0.1.2",
    "yarl==1.25.1",
]

Prompt = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """What became of a workflow that was queued: ComfyUI's own record of it."""

    status: str
    messages: dict[str, dict[str, Any]]
    outputs: dict[str, dict[str, Any]]

    @property
    def cached(self) -> set[str]:
        """The nodes that did not run again."""
        return set(self.messages["execution_cached"]["nodes"])

    @property
    def error(self) -> dict[str, Any]:
        """What the page shows at the node that failed."""
        return self.messages["execution_error"]

    def text(self, node: str) -> str:
        """The text that a node shows."""
        return "\n".join(self.outputs[node]["text"])


class Server:
    """A server over ``base``, its folder of models, outputs and custom nodes, on a free port of this machine alone.

    ``Server(base).start()`` fetches what it needs; raises ``OracleMissingError``. Ends with the ``with`` block.
    """

    def __init__(self, base: Path) -> None:
        self.base = base
        self._log = base / "server.log"
        self._url = ""
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        for name in ("models/diffusion_models", "models/loras", "input", "output", "user", "custom_nodes", "page"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        (self.base / "page" / "index.html").touch()
        (self.base / "custom_nodes" / "mergetool-nodes").symlink_to(NODES)
        (self.base / "custom_nodes" / "tests.py").write_text("from tests.comfyui.pack import NODE_CLASS_MAPPINGS\n")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        packages = [comfyui_packages(), pip_target("comfyui-server-packages", PACKAGES)]
        flags = ["--cpu", "--disable-api-nodes", "--disable-auto-launch", "--listen", "127.0.0.1", "--port", str(port)]
        folders = ["--base-directory", str(self.base), "--front-end-root", str(self.base / "page")]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.comfyui.serve", str(comfyui()), *flags, *folders],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=REPOSITORY,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(str(folder) for folder in packages),
                    "CUDA_VISIBLE_DEVICES": "",
                    "MERGETOOL_CONFIG_DIR": str(self.base / "config"),
                    "OMP_NUM_THREADS": "1",
                },
            )
        self.until(self._answers, "the server to answer")
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @property
    def log(self) -> str:
        """All that the server has printed."""
        return self._log.read_text("utf-8", errors="replace")

    def post(self, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and answer, read as JSON."""
        data = b"" if body is None else json.dumps(body).encode()
        return self._request(urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"}))

    def get(self, path: str) -> Any:
        """The answer, read as JSON."""
        return self._request(urllib.request.Request(self._url + path))[1]

    def refused(self, prompt: Prompt) -> list[tuple[str, str, str]]:
        """Node, kind and detail of everything for which ComfyUI does not run an output; the others it does run."""
        status, answer = self.post("/prompt", {"prompt": prompt})
        errors = answer["node_errors"]
        if status == 200:
            ran = self.ended(answer["prompt_id"])
            assert not set(errors) & set(ran.outputs)
        else:
            assert status == 400, answer
        return [(node, one["type"], one["details"]) for node, found in errors.items() for one in found["errors"]]

    def queue(self, prompt: Prompt) -> str:
        """Queue a workflow, as the page does; its id."""
        status, answer = self.post("/prompt", {"prompt": prompt, "client_id": "tests"})
        assert status == 200, answer
        assert answer["node_errors"] == {}
        return str(answer["prompt_id"])

    def ended(self, prompt_id: str) -> Run:
        """The record of a queued workflow, when it has ended."""
        record = self.until(lambda: self.get(f"/history/{prompt_id}").get(prompt_id), "the workflow to end")
        status = record["status"]
        return Run(status["status_str"], dict(status["messages"]), record["outputs"])

    def run(self, prompt: Prompt) -> Run:
        """Queue a workflow and wait for its end."""
        return self.ended(self.queue(prompt))

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Within the block a node that shows progress stops in the middle of its work until it is interrupted."""
        hold, held = self.base / "hold", self.base / "held"
        held.unlink(missing_ok=True)
        hold.touch()
        try:
            yield
        finally:
            hold.unlink()

    def wait_held(self) -> None:
        """Wait until a node has stopped there."""
        self.until((self.base / "held").exists, "a node that shows progress")

    def events(self) -> list[tuple[str, dict[str, Any]]]:
        """All messages that the page was sent."""
        return [tuple(json.loads(line)) for line in (self.base / "events.jsonl").read_text("utf-8").splitlines()]

    def until(self, found: Callable[[], Any], what: str) -> Any:
        """The first true answer of ``found``; fails when the server has ended, or after minutes."""
        end = time.monotonic() + HANG
        while not (answer := found()):
            assert self._process is not None
            assert self._process.poll() is None, f"the server ended:\n{self.log[-4000:]}"
            assert time.monotonic() < end, f"waited {HANG} s for {what}:\n{self.log[-4000:]}"
            time.sleep(0.02)
        return answer

    def _answers(self) -> bool:
        try:
            return bool(self.get("/queue"))
        except OSError:
            return False

    def _request(self, request: urllib.request.Request) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(request, timeout=HANG) as answer:
                body = answer.read()
                return answer.status, json.loads(body) if body else None
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())
