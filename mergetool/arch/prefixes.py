"""Take wrappers of saving programs off tensor names, and tell bundled tensors apart.

One rule for every family. ComfyUI saves a model under ``model.diffusion_model.``, trainers under ``transformer.`` or ``net.``, and
PyTorch's own wrappers (``torch.compile``, data parallel, FSDP, checkpointing) put components of theirs before a name or into it. Two
files of one model meet once those are taken off.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mergetool.arch.bundled import BundledKind, kind_of
from mergetool.checkpoint.names import quoted
from mergetool.errors import FamilyError, UsageError

IN_COMFYUI = ("model.diffusion_model.", "model.model.", "net.")
"""The prefixes under one of which ComfyUI looks for the model of an all-in-one file: the one that more than `FEW`
names have (its ``model_detection.unet_prefix_from_state_dict``). It then loads nothing else as the model. The first
says so by itself."""
FEW = 5

WRAPPERS = frozenset(
    {"model", "diffusion_model", "net", "transformer", "module", "pipe", "dit", "unet", "control_model"}
)
# Components that wrappers of PyTorch put anywhere in a name; no model calls a module so.
INSERTED = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
_LEAVES = frozenset({"weight", "bias", "scale"})


@dataclass(frozen=True)
class Names:
    """The names of a file: ``own`` maps the model's tensors to their own names, in file order.

    ``prefix`` stands before all of the model's tensors; of a file that mixes several, what they have in common. ``outside`` lists what
    is not of the model: a bundled VAE or text encoder, an EMA, a schedule.
    """

    prefix: str
    own: Mapping[str, str]
    outside: tuple[str, ...]


def read(names: Iterable[str], *, source: str) -> Names:
    """Split a file's names into prefix and own name, and set bundled tensors aside.

    Raises FamilyError for a file that holds two models, or one under two prefixes of which ComfyUI would load one.
    """
    runs = {name: _run(name) for name in names}
    kinds = _bundled(runs)
    found = {name: spelled(name, run) for name, run in runs.items() if name not in kinds}
    _refuse_two(found, {name: spelled(name, runs[name]) for name, kind in kinds.items() if kind == "other"}, source)
    return Names(_common(runs[name] for name in found), found, tuple(kinds))


def whole(names: Names) -> Names | None:
    """Read a file whose wrappers are modules of its model, as in Stable Audio.

    Names keep what not all of them have, there ``transformer.``. None where no more than `FEW` of its tensors have fewer wrappers than others, which is a stray tensor beside a model.
    """
    bare = sum("." in own and _run(stored) == names.prefix for stored, own in names.own.items())
    if not FEW < bare < len(names.own) - FEW:
        return None
    return Names(names.prefix, {stored: spelled(stored, names.prefix) for stored in names.own}, names.outside)


def bundled(names: Iterable[str]) -> dict[str, BundledKind]:
    """The tensors of a file that are bundled with its model, in file order.

    There are none where no model would be left.

    Under a prefix that ComfyUI chooses the model is what has the prefix; in other files the table of `arch.bundled` decides.
    """
    return _bundled({name: _run(name) for name in names})


def check(prefix: str) -> None:
    """Raise UsageError for a prefix without a dot at its end. It would run into the first component of every name."""
    if prefix and not prefix.endswith("."):
        raise UsageError(
            f"`prefix` is {quoted(prefix)}, which does not end in a dot; write `prefix={quoted(prefix + '.')}`."
        )


def is_known(prefix: str) -> bool:
    """Whether reading a file takes ``prefix`` off again."""
    return _run(f"{prefix}x.weight") == prefix


def own(stored: str) -> str:
    """The name of a tensor without any wrapper."""
    return spelled(stored, _run(stored))


def spelled(stored: str, prefix: str) -> str:
    """A tensor's name without its file's prefix and without PyTorch's wrappers."""
    return ".".join(c for c in stored.removeprefix(prefix).split(".") if c not in INSERTED)


def _run(stored: str) -> str:
    """The wrappers before a name: "module.model." of "module.model.blocks.0.weight"; a bare leaf is never all that is left."""
    components = stored.split(".")
    count = 0
    while count < len(components) - 1 and components[count] in WRAPPERS | INSERTED:
        count += 1
    if count == len(components) - 1 and components[-1] in _LEAVES:
        count = max(0, count - 1)
    return "".join(f"{component}." for component in components[:count])


def _bundled(runs: Mapping[str, str]) -> dict[str, BundledKind]:
    """See `bundled`; ``runs`` are the names with the wrappers before each."""
    kinds = {name: kind for name, run in runs.items() if (kind := kind_of(name[len(run) :])) is not None}
    count = Counter(prefix for run in runs.values() if (prefix := _in_comfyui(run)))
    chosen, most = count.most_common(1)[0] if count else ("", 0)
    if most > FEW or chosen == IN_COMFYUI[0]:
        return {name: kinds.get(name, "other") for name, run in runs.items() if _in_comfyui(run) != chosen}
    return kinds if any("." in name for name in runs if name not in kinds) else {}


def _in_comfyui(run: str) -> str:
    bare = "".join(f"{c}." for c in run.split(".")[:-1] if c not in INSERTED and c != "module")
    return next((prefix for prefix in IN_COMFYUI if bare.startswith(prefix)), "")


def _common(runs: Iterable[str]) -> str:
    """The components that all runs begin with."""
    first, *others = dict.fromkeys(runs)
    shared = first.split(".")[:-1]
    for other in others:
        components = other.split(".")[:-1]
        length = next((i for i, (a, b) in enumerate(zip(shared, components, strict=False)) if a != b), None)
        shared = shared[: min(len(shared), len(components)) if length is None else length]
    return "".join(f"{component}." for component in shared)


def _refuse_two(own: Mapping[str, str], beside: Mapping[str, str], source: str) -> None:
    """Two tensors of one name are two models; a tensor beside the model in a module of the model's is a part of it that got lost."""
    held: dict[str, str] = {}
    for name, of_model in own.items():
        if of_model in held:
            raise _two(source, held[of_model], name)
        held[of_model] = name
    modules = {of_model.partition(".")[0]: name for name, of_model in own.items() if "." in of_model}
    for name, of_model in beside.items():
        other = held.get(of_model) or modules.get(of_model.partition(".")[0])
        if other is not None:
            raise _two(source, other, name)


def _two(source: str, first: str, second: str) -> FamilyError:
    prefixes = " and ".join(f'"{_run(name)}"' for name in (first, second))
    return FamilyError(
        f'"{source}" holds tensors of a model under the prefixes {prefixes} ({quoted(first)}, {quoted(second)}), where one is wanted; '
        "save one of them to a file of its own."
    )
