"""The commands that the harnesses disturb, the files they read, and what each makes when nobody disturbs it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.checkpoint.faults import Content, Seen, content_of, seen, violations
from tests.faults.warm import Ended, Warm

SHAPES = {
    "blocks.0.attn.weight": (96, 128),
    "blocks.0.mlp.weight": (160, 96),
    "blocks.1.attn.weight": (96, 128),
    "norm.weight": (96,),
    "bias": (7,),
}
EXPRESSION = "'alk.safetensors' + 20*('a.safetensors' - 'b.safetensors')"
COMMANDS: dict[str, tuple[str, list[str]]] = {
    "merge": ("out.safetensors", ["merge", EXPRESSION, "--threads", "1"]),
    "folder": ("out", ["merge", EXPRESSION, "--threads", "1", "--shard-size", "60KB"]),
    "diff": (
        "out.safetensors",
        [
            "diff",
            "--base",
            "alk.safetensors",
            "--variant",
            "a.safetensors",
            "--rank",
            "4",
            "--threads",
            "1",
            "--device",
            "cpu",
        ],
    ),
    "lora bake": ("out.safetensors", ["lora", "bake", "alk.safetensors", "lora.safetensors:0.7", "--threads", "1"]),
    "convert": ("out.safetensors", ["convert", "alk.safetensors", "--dtype", "fp16", "--threads", "1"]),
}
"""Name of the command -> name of its output, and its arguments but for the output's."""

OLD_FILE: Content = b"the old checkpoint"
OLD_FOLDER: Content = {"diffusion_pytorch_model.safetensors": b"the old checkpoint", "README.md": b"old"}


def write_inputs(folder: Path, scale: int = 1) -> None:
    """Three fine-tunes of one base in ``folder``, with ``scale`` times as many rows."""
    draw = np.random.default_rng(11)
    base = {
        name: draw.standard_normal((shape[0] * scale, *shape[1:]), dtype=np.float32) for name, shape in SHAPES.items()
    }
    for name in ("alk", "a", "b"):
        tensors = {}
        for key, value in base.items():
            change = 0.05 * draw.standard_normal((value.shape[0], 2)) @ draw.standard_normal((2, SHAPES[key][-1]))
            tensors[key] = (value + change if value.ndim == 2 else value).astype(np.float32)
        save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})


@dataclass(frozen=True, slots=True)
class Case:
    """One command writing one output: its arguments, and the bytes it makes."""

    name: str
    target: str
    arguments: Sequence[str]
    new: Content

    @property
    def old(self) -> Content:
        """What is at the target before, where something is."""
        return OLD_FOLDER if isinstance(self.new, dict) else OLD_FILE

    def command(self, target: Path, *more: object) -> list[object]:
        """The arguments that write ``target``, whatever is there."""
        return [*self.arguments, "-o", target, "--overwrite", *more]


class World:
    """Inputs in a folder, a warm program, and a `Case` a command. ``inputs`` is what the files held at the beginning."""

    def __init__(self, folder: Path, names: Sequence[str] = tuple(COMMANDS), *, scale: int = 1) -> None:
        self.folder = folder
        self.scratch = folder / "scratch"
        self.family = folder / "family"
        self.place = folder / "place"
        for path in (self.scratch, self.family, self.place):
            path.mkdir()
        os.chmod(folder, 0o755)
        write_inputs(self.family, scale)
        # What a command makes is what its first run makes, in another process than those that are disturbed;
        # that it is right, the tests of the engine prove against an oracle.
        lora = [
            "diff",
            "--base",
            "alk.safetensors",
            "--variant",
            "a.safetensors",
            "--rank",
            "2",
            "-o",
            "lora.safetensors",
        ]
        first = [COMMANDS[name][1] + ["-o", str(self.scratch / name / COMMANDS[name][0])] for name in names]
        for name in names:
            (self.scratch / name).mkdir()
        self.program = Warm(self.scratch, self.family, [lora, *first])
        self.cases = {}
        for name in names:
            target, arguments = COMMANDS[name]
            made = self.scratch / name / target
            self.cases[name] = Case(name, target, arguments, content_of(made))
        self.inputs: Seen = seen(sorted(self.family.glob("*.safetensors")))

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.program.close()

    def run(self, case: Case, target: Path, *more: object, **how: Any) -> Ended:
        """Run a command to its end."""
        return self.program.run(case.command(target, *more), cwd=self.family, **how)

    def fresh(self, case: Case, old: Content) -> Path:
        """The target of ``case`` in an otherwise empty folder, where ``old`` is."""
        clear(self.place)
        target = self.place / case.target
        put(target, old)
        return target

    def judge(self, case: Case, target: Path, old: Content, ended: Ended) -> list[str]:
        """What a run that ended like this violated."""
        in_place = "is in place, but" in ended.err or "the work is finished, but" in ended.err
        clean = ended.code > 0
        return violations(
            target,
            old,
            case.new,
            killed=ended.killed,
            succeeded=ended.code == 0 or in_place,
            failed=clean and not in_place,
            inputs=self.inputs,
            errors=ended.err if clean else None,
        )

    def judge_next(self, case: Case, target: Path, *more: object) -> list[str]:
        """What a plain run after a fault violates: it makes the new output and removes what was left."""
        ended = self.run(case, target, *more)
        if ended.code:
            return [f"the run after it failed: {ended.code} {ended.err}"]
        found = violations(target, case.new, case.new, succeeded=True, inputs=self.inputs)
        return [f"the run after it: {text}" for text in found]


def put(target: Path, content: Content) -> None:
    """Make a file or a folder that does not exist yet; nothing for None."""
    if isinstance(content, dict):
        target.mkdir()
        for name, data in content.items():
            (target / name).write_bytes(data)
    elif content is not None:
        target.write_bytes(content)


def clear(folder: Path) -> None:
    """Remove everything in a folder."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
