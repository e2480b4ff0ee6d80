"""Recipes damaged at random, read in a process that reports every file, import, socket and program it touches.

    python -m tests.recipe.fuzz COUNT [SEED]

Prints one JSON object: how many were read, how many refused, what was not one sentence with a place, and the events of Python's audit
hook that reading may not cause. The same seed gives the same recipes.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mergetool.checkpoint.names import quoted
from mergetool.errors import RecipeError
from mergetool.methods import registry
from mergetool.options.table import named
from mergetool.recipe import file
from tests.recipe.malformed import MALFORMED, MODELS

PLACE = re.compile(r"r\.yaml:[1-9][0-9]*:[1-9][0-9]*: [^\n\r]+")

HARMLESS = {
    "builtins.id",
    "compile",
    "sys._getframe",
    "sys.unraisablehook",
    "object.__getattr__",
    "object.__setattr__",
    "gc.get_objects",
}
"""``compile`` is how the syntax of an expression is read; nothing is run: that would be ``exec``."""

VALID = [
    MODELS
    + "variables: {m: 20, k: 0.5}\nmerge: a + m*(b - 'z-image')\nprotect: [refiner, 're:^final']\nset: {layers.0-9: '{k}'}\n"
    "output: out-{m}.safetensors\n",
    MODELS
    + "sweep: {m: [5, 10, 20, 40], n: [0, 1.5]}\noutputs:\n  carried:\n    merge: >\n      a +\n      m * (b - 'z-image')\n"
    "    verify: {steps: 8, strength: 0.15, refiner: lab.turbo}\n  both:\n    merge: carried + n*(a - b)\n    quant: fp8-scaled\n"
    "    output: both-{m}-{n}\n    shard_size: 5GB\n  thin:\n    diff: {base: carried, variant: a, rank_thresh: 0.995, exclude: refiner}\n",
    "merge: &e lab.alkahest + 1.25*(lab.striped - lab.base)\nrounding: stochastic\nseed: 3\ndtype: fp8_e4m3\nfrom: lab.base\n",
    "models:\n  style: ./style.safetensors\ndiff:\n  base: lab.base\n  variant: lab.turbo\n  budget: 3MB\noutput: thin.safetensors\n",
    MODELS
    + '# a comment\nmerge: \'a + lora("b")\'\nexclude:\n  - "layers.0"\n  - pad\nlayout: diffusers\nverify: pictures\n',
]

SPLICES = [
    *"{}[]:,-?&*!|>'\"%@`#\t \n~<=+()/.\\\0\x1b\x85\u2028\ufeff\u00e9\U0001f600", "!!python/object/apply:os.system ['touch /tmp/x']", "<<: *e", "&e ", "*e",
    "---\n", "...\n", "%YAML 1.1\n", "{{m}}", "{m}", "{__class__}", "{m.__class__}", "{0}", "$HOME", "~/x", "../", "/etc/passwd",
    "__import__('os')", "lambda: 0", "lab.base", "lora(a)", "ties(a - b, b - a, density=0.5)", "1e999", "-1", ".nan", "0x10", "1_000",
    "null", "true", "9" * 60, "a" * 300, "(" * 250, "[" * 40, "- " * 40, "'", '"\\x41"', '"\\ud800"', "\udcff", "if", "import os",
]  # fmt: skip


def recipes(count: int, seed: int) -> Iterator[bytes]:
    """Damaged recipes: valid and malformed ones with one to eight changes each."""
    draw = random.Random(seed)
    wrong = [(MODELS + text[1:] if text.startswith("+") else text).replace("§", "") for _, text, _ in MALFORMED]
    sources = [text for text in wrong if len(text) < 2000]
    for _ in range(count):
        text = draw.choice(VALID if draw.random() < 0.8 else sources)
        for _ in range(draw.choice([1, 1, 1, 2, 2, 3, 5, 8])):
            text = _changed(text, draw)
        raw = text.encode("utf-8", "surrogateescape" if draw.random() < 0.5 else "replace")
        if draw.random() < 0.05 and raw:
            at = draw.randrange(len(raw))
            raw = raw[:at] + bytes([draw.randrange(256)]) + raw[at + 1 :]
        yield raw


def _changed(text: str, draw: random.Random) -> str:
    at, end = sorted((draw.randrange(len(text) + 1), draw.randrange(len(text) + 1)))
    lines = text.splitlines(keepends=True)
    match draw.randrange(9):
        case 0:
            return text[:at] + draw.choice(SPLICES) + text[at:]
        case 1:
            return text[:at] + text[at + draw.randrange(1, 6) :]
        case 2:
            return text[:at] + chr(draw.randrange(32, 127)) + text[at + 1 :]
        case 3 if lines:
            one = draw.randrange(len(lines))
            return "".join([*lines[:one], lines[draw.randrange(len(lines))], *lines[one:]])
        case 4 if lines:
            draw.shuffle(lines)
            return "".join(lines)
        case 5 if lines:
            one = draw.randrange(len(lines))
            return "".join([*lines[:one], " " * draw.randrange(5) + lines[one].lstrip(), *lines[one + 1 :]])
        case 6:
            return text[:at] + text[at : min(end, at + 40)] * 2 + text[at:]
        case 7:
            words = re.findall(r"\w+|\W", text)
            one, two = draw.randrange(len(words) or 1), draw.randrange(len(words) or 1)
            if words:
                words[one], words[two] = words[two], words[one]
            return "".join(words)
        case _:
            return re.sub(r"\w+", lambda found: draw.choice(SPLICES) if draw.random() < 0.03 else found[0], text)


def run(count: int, seed: int) -> dict[str, object]:
    """Read them all, and say what happened."""
    registry.methods()  # what is imported at first use is imported now: the methods, and plug-ins that are installed
    named("nothing")  # the types of every option, which are texts until they are looked at
    quoted("\x1b")  # the codec of escapes in messages
    for raw in recipes(300, seed=-1):
        _read(raw, Counter(), [])
    events: Counter[str] = Counter()
    watching = True

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if watching and event not in HARMLESS:
            events[f"{event} {str(arguments)[:80]}"] += 1

    sys.addaudithook(hook)
    found: Counter[str] = Counter()
    crashes: list[str] = []
    for raw in recipes(count, seed):
        _read(raw, found, crashes)
    watching = False
    return {**found, "crashes": crashes[:20], "events": dict(events.most_common(20))}


def _read(raw: bytes, found: Counter[str], crashes: list[str]) -> None:
    try:
        file.read(raw, Path("r.yaml"))
        found["read"] += 1
    except RecipeError as error:
        found["refused"] += 1
        if not PLACE.fullmatch(str(error)):
            crashes.append(f"{raw!r}: no place or several lines: {error}")
    except Exception as error:
        crashes.append(f"{raw!r}: {error!r}")


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)))
