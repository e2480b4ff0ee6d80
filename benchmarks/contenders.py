"""The programs that compute alkahest + 20 * (turbo - deturbo), each as something that can be run and measured.

Peers run with their defaults, but for what makes the work the same: the multiplier without normalisation, and
BF16 output. They have no protected groups; mergetool's run protects the refiners, as its users do.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from benchmarks import ceiling
from benchmarks.measure import Usage, measure
from mergetool.checkpoint.reader import Checkpoint

ALPHA = 20
PROTECTED = "refiner"
_PEERS = Path(__file__).with_name("peers")


@dataclass(frozen=True, slots=True)
class Models:
    """The three inputs of alkahest + ALPHA * (turbo - deturbo), single safetensors files."""

    alkahest: Path
    turbo: Path
    deturbo: Path

    @classmethod
    def in_folder(cls, folder: Path) -> Models:
        """The family that `benchmarks.generate family` writes to a folder; they need not exist yet."""
        return cls(*((folder / f"{name}.safetensors").resolve() for name in ("alkahest", "turbo", "deturbo")))

    @property
    def paths(self) -> tuple[Path, Path, Path]:
        """In the order of the expression."""
        return self.alkahest, self.turbo, self.deturbo

    @property
    def moved_bytes(self) -> int:
        """All inputs read once and an output of the first one's size written."""
        return sum(path.stat().st_size for path in self.paths) + self.alkahest.stat().st_size


class Contender(Protocol):
    """Something that makes an output from three models."""

    @property
    def provider(self) -> str:
        """Who: "byte copy", "mergetool", or a peer's name."""

    @property
    def setting(self) -> str:
        """What tells this run from the provider's plain one; empty for that."""

    def run(self, models: Models, out: Path) -> Usage:
        """Make the output inside the empty folder `out`; RuntimeError with its words when it fails."""


@dataclass(frozen=True, slots=True)
class ByteCopy:
    """The machine's ceiling. With `needed_only`, reads of turbo and deturbo just what a merge cannot do without."""

    strategy: ceiling.Strategy
    needed_only: bool = False
    provider: str = "byte copy"

    @property
    def setting(self) -> str:
        """Empty for the copy of everything."""
        return "unprotected bytes" if self.needed_only else ""

    def run(self, models: Models, out: Path) -> Usage:
        """Copy inside this process, so that only the copy is timed; its memory is the buffers of its threads."""
        wanted = unprotected_ranges if self.needed_only else None
        seconds = ceiling.copy(models.paths, out / "copy.bin", self.strategy, wanted=wanted)
        buffers = self.strategy.threads * self.strategy.chunk
        return Usage(seconds=seconds, peak_anon=buffers, peak_rss=buffers)


@dataclass(frozen=True, slots=True)
class Mergetool:
    """The installed console script, in a process of its own."""

    options: tuple[str, ...] = ()
    provider: str = "mergetool"

    @property
    def setting(self) -> str:
        """The options beyond the plain command."""
        return " ".join(self.options)

    def command(self, models: Models, out: Path) -> list[str | Path]:
        """mergetool merge '"A" + 20 * ("B" - "C")' --protect refiner -o OUT"""
        a, b, c = (json.dumps(str(path)) for path in models.paths)
        expression = f"{a} + {ALPHA} * ({b} - {c})"
        target = out / "merged.safetensors"
        return [console_script(), "merge", expression, "--protect", PROTECTED, *self.options, "-o", target]

    def run(self, models: Models, out: Path) -> Usage:
        """Merge with no names registered: an empty config folder stands in for the user's."""
        config = out / "config"
        config.mkdir()
        try:
            return _checked(self.command(models, out), {**os.environ, "MERGETOOL_CONFIG_DIR": str(config)})
        finally:
            shutil.rmtree(config)


@dataclass(frozen=True, slots=True)
class Mergekit:
    """mergekit-pytorch, method linear, weights 1, 20, -20, not normalised; float32 sums, input dtype kept."""

    python: Path
    setting: str = ""
    provider: str = "mergekit"

    def run(self, models: Models, out: Path) -> Usage:
        """The console script beside its interpreter; its YAML config may as well be JSON."""
        weights = zip(models.paths, (1.0, float(ALPHA), -float(ALPHA)), strict=True)
        config = {
            "merge_method": "linear",
            "models": [{"model": str(path), "parameters": {"weight": weight}} for path, weight in weights],
            "parameters": {"normalize": False},
        }
        written = out / "config.yaml"
        written.write_text(json.dumps(config))
        try:
            return _checked([self.python.with_name("mergekit-pytorch"), written, out / "merged"])
        finally:
            written.unlink()


@dataclass(frozen=True, slots=True)
class SdMecha:
    """sd-mecha, add_difference, float32 arithmetic; BF16 output where its default is FP16."""

    python: Path
    setting: str = ""
    provider: str = "sd-mecha"

    def run(self, models: Models, out: Path) -> Usage:
        """It is a library: a short script calls it."""
        script = _PEERS / "sd_mecha_merge.py"
        return _checked([self.python, script, *models.paths, out / "merged.safetensors", "--alpha", str(ALPHA)])


def peers(python: Path) -> list[Contender]:
    """mergekit and sd-mecha from the environment of this interpreter."""
    return [Mergekit(python), SdMecha(python)]


def console_script() -> Path:
    """The mergetool script of the running interpreter's environment; RuntimeError when it is not installed."""
    script = Path(sys.executable).with_name("mergetool")
    if not script.exists():
        raise RuntimeError(f'"{script}" does not exist; install mergetool into this environment: pip install -e .')
    return script


def unprotected_ranges(path: Path) -> list[ceiling.Range]:
    """Byte ranges of the tensors outside the protected group: all that is needed of a model that is subtracted."""
    with Checkpoint.open(path) as checkpoint:
        starts = ((checkpoint.locate(name)[1], info.nbytes, name) for name, info in checkpoint.tensors.items())
        return [(start, start + size) for start, size, name in starts if PROTECTED not in name]


def run_synced(contender: Contender, models: Models, out: Path) -> tuple[Usage, float]:
    """Run in a fresh folder `out`; also the seconds until the output is on the disk.

    mergetool and the byte copy sync before they return. A program that does not leaves gigabytes in the page
    cache when it says it is done; the second number counts the time to write them out.
    """
    out.mkdir()
    usage = contender.run(models, out)
    begin = time.perf_counter()
    for path in output_files(out):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    return usage, usage.seconds + time.perf_counter() - begin


def output_files(out: Path) -> list[Path]:
    """Every file a contender left."""
    return sorted(path for path in out.rglob("*") if path.is_file())


def _checked(command: Sequence[str | Path], env: dict[str, str] | None = None) -> Usage:
    usage = measure(command, env=env)
    if usage.exit_code != 0:
        words = " ".join(map(str, command))
        raise RuntimeError(f"exit code {usage.exit_code} from: {words}\n{usage.output[-2000:]}")
    return replace(usage, output="")
