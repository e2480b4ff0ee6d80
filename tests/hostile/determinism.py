"""Row 12: one digest a command, whatever the number of threads, reader, hash seed, time zone, locale, working folder and umask."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.hostile.models import family
from tests.hostile.tally import Tally
from tests.hostile.warm import Warm

THREADS = (1, 2, 4)
READERS = ("mmap", "pread")
# Hash seed and C locale belong to a process. UTF-8 mode off is what a plain C locale was before Python 3.7.
PROCESSES = (
    ("0", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    ("1", {"LC_ALL": "C.UTF-8"}),
    ("random", {}),
)
PATHS = "'{0}/alk.safetensors' + 20 * ('{0}/a.safetensors' - '{0}/b.safetensors')"
COMMANDS: dict[str, list[str]] = {
    "merge": ["merge", PATHS],
    "merge, stochastic": ["merge", PATHS, "--dtype", "fp8_e4m3", "--rounding", "stochastic", "--seed", "7"],
    "merge, quantised": ["merge", PATHS, "--quant", "fp8-scaled", "--scale-search"],
    "merge, method": ["merge", "slerp('{0}/a.safetensors', '{0}/b.safetensors', t=0.3)"],
    "diff": ["diff", "--base", "{0}/small-alk.safetensors", "--variant", "{0}/small-a.safetensors", "--dtype", "fp32"],
    "lora bake": ["lora", "bake", "{0}/alk.safetensors", "{0}/lora.safetensors:0.7"],
    "convert": ["convert", "{0}/alk.safetensors", "--quant", "int8"],
}
"""Without output, threads and reader. {0} is the folder of the inputs."""
TAKES_READER = {"merge", "merge, stochastic", "merge, quantised", "merge, method", "diff"}


def matrix(
    folder: Path,
    *,
    commands: Sequence[str] = tuple(COMMANDS),
    processes: int = len(PROCESSES),
    patched: str | None = None,
) -> Tally:
    """Every command under every condition; a second digest of a command is a violation."""
    tally = Tally("12", "determinism matrix")
    inputs = family(folder / "inputs")
    elsewhere = folder / "another folder"
    elsewhere.mkdir()
    digests: dict[str, dict[str, str]] = defaultdict(dict)
    languages = locales(folder / "locales")
    for hash_seed, environment in PROCESSES[:processes]:
        with Warm(hash_seed, environment) as warm:
            for name in commands:
                warm.warm_up(_line(name, folder / f"{name}.safetensors", 1, "mmap", inputs=inputs), folder)
            for number, (threads, reader) in enumerate((t, r) for t in THREADS for r in READERS):
                for conditions in _conditions(number, languages):
                    cwd = folder if conditions["umask"] == 0o22 else elsewhere
                    outputs = [cwd / f"{name}-{number % 2}.safetensors" for name in commands]
                    lines = [
                        _line(*both, threads, reader, inputs=inputs) for both in zip(commands, outputs, strict=True)
                    ]
                    more = {"patched": patched} if patched else {}
                    tally.injected += len(lines)
                    for name, output, ran in zip(
                        commands, outputs, warm.run_each(lines, cwd, **conditions, **more), strict=True
                    ):
                        under = f"{name}, {threads} threads, {reader}, hash seed {hash_seed}, {conditions}"
                        if ran.code != 0:
                            tally.judge(f"{under}: exit {ran.code}: {ran.err[:300]}")
                            continue
                        digest = hashlib.sha256(output.read_bytes()).hexdigest()
                        first = next(iter(digests[name]), digest)
                        digests[name].setdefault(digest, under)
                        same = digest == first
                        tally.judge(None if same else f"{under}: another digest than under {digests[name][first]}")
                        output.unlink()
    return tally


def _line(name: str, output: Path, threads: int, reader: str, *, inputs: Path) -> list[str]:
    words = [word.replace("{0}", str(inputs)) for word in COMMANDS[name]]
    words += ["-o", str(output), "--overwrite", "--threads", str(threads)]
    return words + (["--reader", reader] if name in TAKES_READER else [])


def _conditions(number: int, languages: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Four sets of conditions; every pair of a time zone and a language occurs in the whole matrix."""
    zones = ["UTC", "Asia/Kathmandu", "America/St_Johns", "XYZ-13:37"]
    for i in range(4):
        language = languages[(number + i) % len(languages)]
        yield {
            "tz": zones[i], "umask": (0o22, 0o77, 0o0, 0o27)[i], "locale": language,
            "env": {"LANG": language, "HOME": f"/nonexistent/{i}", "USER": f"user{i}", "COLUMNS": str(40 + 40 * i)},
        }  # fmt: skip


def locales(folder: Path) -> list[str]:
    """Locales with a decimal comma and with a dotless i, made from glibc's sources where those are, besides C."""
    folder.mkdir()
    if shutil.which("localedef") is None or not Path("/usr/share/i18n/locales/de_DE").exists():
        return ["C", "C.UTF-8"]
    os.environ["LOCPATH"] = str(folder)  # for the processes started from here
    for name in ("de_DE", "tr_TR"):
        subprocess.run(
            ["localedef", "-i", name, "-f", "UTF-8", folder / f"{name}.UTF-8"], check=True, capture_output=True
        )
    return ["C", "de_DE.UTF-8", "tr_TR.UTF-8"]
