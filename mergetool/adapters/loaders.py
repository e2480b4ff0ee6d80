"""The programs that load a LoRA file: diffusers and ComfyUI, release by release. Each spelling counts by itself.

The tests run all of them on every spelling (docs/reference/lora-dialects.md). Of other families nothing is said, since their loaders have maps of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mergetool.adapters import alphas
from mergetool.adapters.adapter import Adapter, Change
from mergetool.adapters.alphas import HEADER
from mergetool.adapters.diffusers_loaders import LOADERS, DiffusersLoader
from mergetool.adapters.formats import FORMATS
from mergetool.adapters.in_diffusers import Rejected
from mergetool.adapters.keys import Spelled, take_apart
from mergetool.adapters.lora_file import LoraFile, open_lora
from mergetool.arch.anatomy import NATIVE, Family
from mergetool.arch.encoders import is_encoder
from mergetool.checkpoint.names import quoted

LoadVerdict = Literal["whole", "partly", "not at all"]

COMFYUI = "0.30"
_FUN = "lora_unet__"  # as VideoX-Fun writes it


@dataclass(frozen=True, slots=True)
class Loading:
    """The treatment of a file by some releases: the parts they load, and why not others.

    A part is loaded where they change it as the file means it.

    ``error`` is what makes them reject the file, where they do. What is dropped otherwise is dropped in silence, or with a line in a log.
    """

    program: str
    releases: tuple[str, ...]
    applied: int
    dropped: dict[str, str]
    error: str | None = None

    @property
    def verdict(self) -> LoadVerdict:
        """Whether the file is loaded."""
        if not self.dropped:
            return "whole"
        return "partly" if self.applied else "not at all"

    @property
    def name(self) -> str:
        """The program with its releases. Example: ``diffusers 0.38, 0.39 and 0.40``."""
        *others, last = self.releases
        return f"{self.program} {', '.join(others)}{' and ' if others else ''}{last}"


def loading(file: LoraFile) -> list[Loading]:
    """The treatment of a LoRA by diffusers' releases, newest first, and ComfyUI.

    Releases that do the same are one entry.

    Text encoders' modules do not count. An empty list for a family of which that is not known.
    """
    file = replace(file, changes={part: held for part, held in file.changes.items() if not is_encoder(part)})
    if file.family.loader is None or not file.changes:
        return []
    loader = LOADERS[file.family.loader]
    found: list[Loading] = []
    for release in reversed(loader.releases):
        one = _in_diffusers(file, loader, release)
        if found and (found[-1].dropped, found[-1].error) == (one.dropped, one.error):
            releases = (release, *found[-1].releases)
            found[-1] = Loading(one.program, releases, one.applied, one.dropped, one.error)
        else:
            found.append(one)
    return [*found, _in_comfyui(file)]


def loading_of(path: Path, family: Family) -> list[Loading]:
    """The `loading` of the file just written for a model of ``family``. Nothing where its names are only looks."""
    if family.keeps_names:
        return []
    with open_lora(path) as written:
        return loading(written)


def _in_diffusers(file: LoraFile, loader: DiffusersLoader, release: str) -> Loading:
    try:
        layers = loader.modules(file.checkpoint.tensors, release)
        if HEADER in file.checkpoint.metadata and not loader.takes_header(file.checkpoint.tensors):
            raise Rejected("scales stand both in the header and in alphas")
    except Rejected as reason:
        return _rejected(file, release, str(reason))
    alpha = next((key for key in file.checkpoint.tensors if key.endswith(".alpha")), None)
    if alpha and not loader.multiplies_alphas and alphas.HEADER in file.checkpoint.metadata:
        return _rejected(file, release, f"{quoted(alpha)} stands beside a config in the header")
    names = {_module(file, part) for part in file.changes}
    if layers and not names & layers.keys():
        return _rejected(file, release, f'it finds no module "{next(iter(layers))}"')
    dropped = {}
    factors = _factors(file, loader, layers, release)
    for part, changes in file.changes.items():
        module = _module(file, part)
        keys = layers.get(module, set())
        loaded = [change for change in changes if keys & set(change.adapter.tensors.values())]
        if not loaded:
            dropped[part] = _why_not_in_diffusers(changes[0])
        elif "dora_scale" in loaded[0].adapter.tensors and not keys & {loaded[0].adapter.tensors["dora_scale"]}:
            dropped[part] = "loaded without its DoRA magnitudes"
        elif len(loaded) < len(changes):
            dropped[part] = f"loaded with {len(loaded)} of its {len(changes)} changes"
        elif loader.exchanged(keys):
            dropped[part] = "loaded with its halves exchanged"
        elif abs(factors[module] - 1) > 1e-6:
            dropped[part] = f"loaded at {factors[module]:.3g} times its scale"
    return Loading("diffusers", (release,), len(file.changes) - len(dropped), dropped)


def _module(file: LoraFile, part: str) -> str:
    """The module of diffusers' that holds a part."""
    layout = "diffusers" if "diffusers" in file.family.layouts else file.family.layouts[0]
    return file.family.stored_name(part, layout).removesuffix(".weight")


def _factors(file: LoraFile, loader: DiffusersLoader, layers: dict[str, set[str]], release: str) -> dict[str, float]:
    """The factors by which a release multiplies each module's change, beside the file's meaning.

    A conversion multiplies ``.alpha`` in, and then the header's config counts too. Where there is none, modules get an alpha that is
    their rank, and until 0.39 the first module's rank.
    """
    tensors = file.checkpoint.tensors
    downs = [key for keys in layers.values() for key in keys if getattr(take_apart(key), "role", "") == "down"]
    first = tensors[downs[0]].shape[0] if downs else None
    adapters = {
        _module(file, part): change.adapter
        for part, changes in file.changes.items()
        for change in changes
        if layers.get(_module(file, part), set()) & set(change.adapter.tensors.values())
    }
    ranks = {module: adapters[module].rank for module in layers if module in adapters}
    header = alphas.in_header(file.checkpoint.metadata, file.name)
    reads_alphas = loader.alphas_are_read(tensors, release)
    own = {
        module: one.scale * one.rank if reads_alphas and one.rank and f"{one.module}.alpha" in tensors else None
        for module, one in adapters.items()
    }
    given = loader.alphas_given(own)
    found = {}
    for module, rank in ranks.items():
        adapter = adapters[module]
        if not rank or not first or adapter.kind != "lora" or not adapter.scale:
            found[module] = 1.0
            continue
        alpha = given[module]
        scale = 1.0 if alpha is None else alpha / rank
        if header is not None:
            stated = header.alpha(module, rank)
            scale *= header.scale(_PEFT_ALPHA if stated is None else stated, rank)
        elif release in _FIRST_RANK and (alpha is None or loader.multiplies_alphas):
            scale *= first / rank
        found[module] = scale / adapter.scale
    return found


_PEFT_ALPHA = 8.0  # of a config that states none
_FIRST_RANK = ("0.36", "0.38", "0.39")


def _rejected(file: LoraFile, release: str, reason: str) -> Loading:
    return Loading("diffusers", (release,), 0, dict.fromkeys(file.changes, "the whole file is rejected"), reason)


def _why_not_in_diffusers(change: Change) -> str:
    spelled = _spelled(change.adapter)
    if spelled.prefix.startswith(FORMATS["peft"].prefix):
        return "raw PEFT names match nothing"
    if not spelled.prefix:
        return "names without a prefix match nothing"
    if spelled.module.endswith((".attention.qkv", ".attention.out")):
        return "ComfyUI's fused names match nothing"
    return f'no module is found under "{spelled.prefix}"'


def _in_comfyui(file: LoraFile) -> Loading:
    dropped = {}
    for part, changes in file.changes.items():
        reasons = [_why_not_in_comfyui(file, change) for change in changes]
        why = next((reason for reason in reasons if reason is not None), None)
        if why is not None:
            dropped[part] = why if len(reasons) == 1 else f"loaded with only some of its {len(reasons)} changes: {why}"
        elif len({(change.row, change.adapter.shape[0]) for change in changes}) < len(changes):
            dropped[part] = (
                f"loaded with only some of its {len(reasons)} changes: of those of the same rows, the last is kept"
            )
    return Loading("ComfyUI", (COMFYUI,), len(file.changes) - len(dropped), dropped)


def _why_not_in_comfyui(file: LoraFile, change: Change) -> str | None:
    adapter, part = change.adapter, change.part
    spelled = _spelled(adapter)
    family = file.family
    if spelled.prefix == _FUN and family.sign_of_fun in file.checkpoint.tensors:
        spelled = replace(spelled, prefix=_FUN.removesuffix("_"))
    if not spelled.prefix and family.sign_of_control in file.checkpoint.tensors:
        spelled = replace(spelled, prefix=NATIVE[0])
    if spelled.prefix not in (*NATIVE, *family.in_comfyui):
        return f'the prefix "{spelled.prefix}" is not mapped'
    if family.is_vector(part):
        return "what is neither a weight nor a bias is taken without being applied"
    known = family.modules_in_comfyui(part, spelled.prefix)
    modules = (name.removesuffix(".weight").removesuffix(".bias").removesuffix(".scale") for name in known)
    if spelled.module not in [name.replace(".", "_") if spelled.is_flat else name for name in modules]:
        which = "diffusers' names" if spelled.prefix in NATIVE else "ComfyUI's own names"
        return f'{which} are not mapped under "{spelled.prefix}"'
    is_wide = family.widened.get(part) in adapter.shape[1:]
    if is_wide and not (adapter.widens or family.sign_of_control in file.checkpoint.tensors):
        return "it has more columns than the model, and no reshape_weight that says so"
    if "magnitude_vector" in adapter.tensors.get("dora_scale", ""):
        return "loaded without its DoRA magnitudes"
    if _alpha_is_outside(file, adapter):
        return f"loaded at scale 1 instead of {adapter.scale:g}: no alpha beside the factors"
    return None


def _alpha_is_outside(file: LoraFile, adapter: Adapter) -> bool:
    """Whether a scale comes from the header or a config, and matters."""
    return adapter.has_alpha and adapter.scale != 1 and f"{adapter.module}.alpha" not in file.checkpoint.tensors


def _spelled(adapter: Adapter) -> Spelled:
    found = take_apart(next(iter(adapter.tensors.values())))
    assert isinstance(found, Spelled)
    return found
