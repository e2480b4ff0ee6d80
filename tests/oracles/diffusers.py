"""Releases of diffusers, each in a process of its own beside the environment's torch, transformers and PEFT."""

from __future__ import annotations

from tests.oracles.fetching import pip_target
from tests.oracles.process import Worker

WHEELS = {
    "0.36": "0.36.0 --hash=sha256:525d42abc74bfc3b2db594999961295c054b48ef40a11724dacf50e6abd1af98",
    "0.38": "0.38.0 --hash=sha256:18e53f9e539096320470f62c6360a6fd5727ff28cffda566265316e13fcdb612",
    "0.39": "0.39.0 --hash=sha256:912aca51b5787365110806e984d5555735bf8a461073bb8459029d0bca7870ef",
    "0.40": "0.40.0 --hash=sha256:5b5da7c3ddb62152fa4afc577f02e050af688c797375c34fb2d01006da3f3541",
    "0.42.1": "0.42.1 --hash=sha256:9154faa704ce00e0b77f568e0d64786064368528aab5fc14eeea92f87d788014",
}
# Releases before 0.42 import httpx for the names of its errors; the environment's huggingface_hub has httpx2.
HTTPX = [
    "httpx==0.28.1 --hash=sha256:d909fcccc110f8c7faf814ca82a9a4d816bc5a6dbfea25d6591d6985b8ba59ad",
    "httpcore==1.0.9 --hash=sha256:2d400746a40668fc9dec9810239072b40b4484b640a8c38fd654a024c7a1bf55",
]


class Diffusers(Worker):
    """One release. Fetches it; raises ``OracleMissingError``. Its command is ``load`` of ``diffusers_worker``."""

    def __init__(self, release: str) -> None:
        wheels = [f"diffusers=={WHEELS[release]}", *([] if release == "0.42.1" else HTTPX)]
        super().__init__("tests.oracles.diffusers_worker", path=[pip_target(f"diffusers-{release}", wheels)])
