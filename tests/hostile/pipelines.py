"""Row 29: pipeline folders that would make diffusers or transformers load a pickle, run code, leave the folder or use the network.

Links are the user's and are followed, also out of the folder: what they lead to is checked as what lies there is.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergetool import models
from tests.hostile.pickles import Canary
from tests.hostile.tally import Tally
from tests.hostile.warm import Warm

NEVER = (
    "socket.",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "pickle.find_class",
    "ctypes.dlopen",
    "urllib.",
)
CODE = "from pathlib import Path\nPath({!r}).mkdir()\n\nclass Evil:\n    pass\n"


@dataclass(frozen=True)
class Case:
    """What is done to a good pipeline folder, options that name a part of it, and the codes the run may end with."""

    name: str
    spoil: Callable[[Path, Path], Any]
    options: tuple[str, ...] = ()
    codes: tuple[int, ...] = (65, 66)


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _pickled(path: Path, canary: Path) -> None:
    for old in path.parent.glob("*.safetensors"):
        old.unlink()
    path.write_bytes(pickle.dumps(Canary(canary)))


def _index(folder: Path, stem: str, canary: Path, *, beside: bool = False) -> None:
    """An index that leads to a file of the folder above, instead of the weights or beside other ones."""
    weights = next(folder.glob("*.safetensors"))
    shutil.move(weights, folder.parent / "secret.safetensors")
    table = {"metadata": {}, "weight_map": {"w": "../secret.safetensors"}}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(table))
    if beside:
        other = "model" if stem == "diffusion_pytorch_model" else "diffusion_pytorch_model"
        (folder / f"{other}.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "x.safetensors"}}))


def _linked_out(path: Path) -> None:
    target = path.parent.parent.parent / "private.safetensors"
    shutil.move(path, target)
    path.symlink_to(target)


def _linked_to_a_pickle(path: Path, canary: Path) -> None:
    target = path.parent.parent.parent / "private.safetensors"
    target.write_bytes(pickle.dumps(Canary(canary)))
    path.unlink()
    path.symlink_to(target)


def _remote(folder: Path, config: str, canary: Path, **auto_map: object) -> None:
    (folder / "evil.py").write_text(CODE.format(str(canary)))
    _edit(folder / config, auto_map=auto_map, model_type="evil", tokenizer_class="Evil", architectures=["Evil"])


def _template(folder: Path, text: str) -> None:
    (folder / "chat_template.jinja").write_text(text)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


ESCAPE = (
    "{{ cycler.__init__.__globals__.os.system('touch canary') }}{{ messages[0].__class__.__mro__[1].__subclasses__() }}"
)
CASES = [
    Case("text encoder, pickle", lambda f, c: _pickled(f / "text_encoder" / "pytorch_model.bin", c)),
    Case("text encoder, pickle called safetensors", lambda f, c: _pickled(f / "text_encoder" / "model.safetensors", c)),
    Case("text encoder, index out", lambda f, c: _index(f / "text_encoder", "model", c)),
    Case("text encoder, index out beside a harmless one", lambda f, c: _index(f / "text_encoder", "model", c, beside=True)),
    Case("text encoder, link out", lambda f, c: _linked_out(f / "text_encoder" / "model.safetensors"), codes=(0,)),
    Case("text encoder, link to a pickle", lambda f, c: _linked_to_a_pickle(f / "text_encoder" / "model.safetensors", c)),
    Case("text encoder, cut", lambda f, c: _cut(f / "text_encoder" / "model.safetensors")),
    Case("text encoder, code", lambda f, c: _remote(f / "text_encoder", "config.json", c, AutoModel="evil.Evil", AutoConfig="evil.Evil")),
    Case("text encoder, code of another repository", lambda f, c: _remote(f / "text_encoder", "config.json", c, AutoConfig="evil/x--evil.Evil")),
    Case("text encoder, one file, pickle", lambda f, c: _pickled(f / "te.ckpt", c), ("--text-encoder", "te.ckpt", "--tokenizer", "tokenizer")),
    Case("tokenizer, code", lambda f, c: _remote(f / "tokenizer", "tokenizer_config.json", c, AutoTokenizer=["evil.Evil", "evil.Evil"]), codes=(0, 65)),
    Case("tokenizer, template that runs code", lambda f, c: _template(f / "tokenizer", ESCAPE), codes=(0, 65)),
    Case("VAE, pickle", lambda f, c: _pickled(f / "vae" / "diffusion_pytorch_model.bin", c)),
    Case("VAE, pickle called safetensors", lambda f, c: _pickled(f / "vae" / "diffusion_pytorch_model.safetensors", c)),
    Case("VAE, index out", lambda f, c: _index(f / "vae", "diffusion_pytorch_model", c)),
    Case("VAE, link out", lambda f, c: _linked_out(f / "vae" / "diffusion_pytorch_model.safetensors"), codes=(0,)),
    Case("VAE, link to a pickle", lambda f, c: _linked_to_a_pickle(f / "vae" / "diffusion_pytorch_model.safetensors", c)),
    Case("VAE, one file, pickle", lambda f, c: _pickled(f / "vae.pt", c), ("--vae", "vae.pt")),
    Case("VAE, one file, pickle called safetensors", lambda f, c: _pickled(f / "vae.safetensors", c), ("--vae", "vae.safetensors")),
    Case("VAE, address for a name", lambda f, c: _edit(f / "vae" / "config.json", _name_or_path="http://127.0.0.1:9/x"), codes=(0,)),
    Case("transformer, pickle", lambda f, c: _pickled(f / "transformer" / "diffusion_pytorch_model.bin", c), ("--base", ".")),
    Case("transformer, index out", lambda f, c: _index(f / "transformer", "diffusion_pytorch_model", c), ("--base", ".")),
    Case("pipeline of a class of its own", lambda f, c: _edit(f / "model_index.json", _class_name=["evil", "Evil"], vae=["os", "system"]), codes=(0, 65)),
]  # fmt: skip


def run(warm: Warm, folder: Path, *, patched: str | None = None) -> Tally:
    """A picture of one step with every spoilt folder: nothing is unpickled, run or fetched, or read outside it but through a link."""
    tally = Tally("29", "pipeline folders that would run code, through sample", injected=len(CASES))
    good = models.EMBEDDED / "base"
    line = ["sample", "a circle", "--steps", "1", "--overwrite", "-o", str(folder / "x.png"), "--pipeline", "."]
    assert warm.warm_up([*line, "--base", "lab.base"], good).code == 0
    canary = folder / "canary"
    for number, case in enumerate(CASES):
        place = folder / f"case-{number}" / "pipeline"
        shutil.copytree(good, place)
        case.spoil(place, canary)
        more = {"patched": patched} if patched else {}
        base = () if "--base" in case.options else ("--base", "lab.base")
        ran = warm.run([*line, *base, *case.options], place, watched=True, **more)
        bad = [event for event in ran.events if event.startswith(NEVER) or "evil" in event]
        fault = f"did {bad[0]}" if bad else None
        fault = "ran code of the folder" if canary.exists() or (place / "canary").exists() else fault
        if ran.code not in case.codes or (ran.code and ran.err.count("\n") != 1):
            fault = fault or f"exit {ran.code}: {ran.err[-300:]}"
        tally.judge(None if fault is None else f"{case.name}: {fault}")
        shutil.rmtree(canary, ignore_errors=True)
    return tally
