"""The coverage-guided fuzzer: ``python -m tests.hostile.fuzz TARGET FOLDER -runs=N [-seed=S]``, libFuzzer's options after the folder.

atheris instruments mergetool, so that inputs which reach new branches are kept and changed further. A verdict that breaks a target's
promise, any exception but MergetoolError, one input that hangs or 1 GiB of memory ends it with a non-zero code and the input in FOLDER.
``--broken NAME`` puts one of `BROKEN` in first: a reader with a known hole, which a run must find.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

from tests.patience import HANG

with atheris.instrument_imports(include=["mergetool"], enable_loader_override=False):
    import mergetool.adapters
    import mergetool.models
    import mergetool.quant.weights
    import mergetool.recipe.expression
    import mergetool.recipe.provenance  # noqa: F401
    from mergetool.checkpoint import header, shards, strict_json
    from tests.hostile import targets
    from tests.hostile.seeds import SEEDS

LIMITS = [f"-timeout={HANG}", "-rss_limit_mb=1024", "-max_len=4096", "-print_final_stats=1", "-verbosity=0"]


class Drawn:
    """A target's choices from the fuzzer's bytes."""

    def __init__(self, raw: bytes) -> None:
        self._from = atheris.FuzzedDataProvider(raw)

    def number(self, most: int) -> int:
        return int(self._from.ConsumeIntInRange(0, most))

    def text(self, most: int) -> str:
        return str(self._from.ConsumeUnicodeNoSurrogates(self.number(most)))

    def rest(self) -> bytes:
        return bytes(self._from.ConsumeBytes(self._from.remaining_bytes()))


def _accept_overlaps() -> None:
    """A header whose tensors may lie over each other."""

    def lax(tensors: dict[str, header.TensorInfo], source: str) -> int:
        return max((info.end for info in tensors.values()), default=0)

    header._require_tiling = lax


def _look_at_slashes_only() -> None:
    """Shard names of which only "/" is looked for."""
    shards.why_not_plain = lambda name, suffix: "it has a slash" if "/" in name or not name.endswith(suffix) else None


def _read_json_as_python_does() -> None:
    """A JSON reader that lets NaN and names given twice pass, and gives up on deep nesting."""
    strict_json.loads = lambda raw, build=None: json.loads(raw, object_pairs_hook=build)


BROKEN: dict[str, Callable[[], None]] = {
    "overlaps": _accept_overlaps,
    "slashes": _look_at_slashes_only,
    "lax JSON": _read_json_as_python_does,
}


def main(arguments: list[str]) -> None:
    """Fuzz; does not return."""
    name, folder, *options = arguments
    if "--broken" in options:
        at = options.index("--broken")
        BROKEN[options[at + 1]]()
        del options[at : at + 2]
    corpus = Path(folder) / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(SEEDS.get(name, [])):
        (corpus / f"seed-{number:04d}").write_bytes(seed)
    scratch = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    target = targets.TARGETS[name]

    def judge(raw: bytes) -> None:
        fault = target(Drawn(raw), scratch)
        if fault is not None:
            raise AssertionError(fault)

    words = _dictionary(Path(folder))
    atheris.Setup([sys.argv[0], *LIMITS, f"-artifact_prefix={folder}/", f"-dict={words}", *options, str(corpus)], judge)
    atheris.Fuzz()


def _dictionary(folder: Path) -> Path:
    """Words of the formats, which chance would take long to spell, in libFuzzer's escapes."""
    words = [
        *('{"', '":', "data_offsets", "dtype", "shape", "__metadata__", "weight_map", ".safetensors", "\\ud800", "F32", "F4", "lora("),
        *("layers", "format", "convrot", "expression", "fingerprint", "null", "NaN", "-0", "1e400", "base=", "[models]", "slerp("),
        *("\\\\", "..", "C:", "CON.", '":"', "[[[[[[[[[[[[[[[[", "__import__", "1e-999999999", "18446744073709551616"),
    ]  # fmt: skip
    escaped = [word.replace("\\", "\\\\").replace('"', '\\"') for word in words]
    path = folder / "words"
    path.write_text("".join(f'"{word}"\n' for word in escaped))
    return path


if __name__ == "__main__":
    main(sys.argv[1:])
