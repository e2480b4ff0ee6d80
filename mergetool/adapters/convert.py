"""A LoRA under other names: the same tensors, spelled for another program.

Bits are kept wherever they can be. A scale goes into an ``.alpha`` or a config where the format has one; where it has none it is
multiplied into ``up``, which is exact for powers of two, and said where it is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from mergetool.adapters import foreign_names, fused, module, peft_folder, unmatched
from mergetool.adapters import output as lora_output
from mergetool.adapters.adapter import Adapter, Change
from mergetool.adapters.formats import FLAT, KeyFormat, LoraFormat, carrying, format_for, module_name
from mergetool.adapters.lora_file import LoraFile
from mergetool.adapters.module import StoredModule
from mergetool.arch.rows import listed
from mergetool.checkpoint.names import quoted
from mergetool.checkpoint.outputs import Target
from mergetool.checkpoint.stamp import display_names, stamp
from mergetool.errors import DataError

NOT_KEPT = frozenset({"format", "lora_adapter_metadata"})
"""Metadata that a copy does not take over: the second is about alphas, which stand elsewhere after conversion."""


@dataclass
class Converted:
    """The result of a conversion: modules and tensors written, rounded, and left out.

    Modules whose ``up`` was rounded again have its relative error. Left out are modules that change nothing, keys of
    text encoders and, with ``skip_unmatched``, keys that mean nothing.
    """

    modules: int = 0
    tensors: int = 0
    rounded: dict[str, float] = field(default_factory=dict)
    empty: list[str] = field(default_factory=list)
    unmatched: tuple[tuple[str, str], ...] = ()

    @property
    def is_lossless(self) -> bool:
        """Whether every value of every change stayed the same."""
        return not self.rounded and not self.unmatched


def convert(
    file: LoraFile,
    output: Path | Target | None,
    key_format: KeyFormat,
    *,
    overwrite: bool = False,
    skip_unmatched: bool = False,
    names_known: bool = False,
) -> Converted:
    """Write ``file`` in another format, whole or not at all.

    The ``peft`` format is a folder. Without an ``output`` nothing is written, and the result tells the outcome.

    ``names_known`` says that it was opened with the anatomy of its model, so that underscored names of any family are understood.
    Raises DataError for what the format cannot carry, for parts that are changed twice and, unless ``skip_unmatched``, for keys that are
    not understood; NonFiniteError for NaN; UsageError for an output of the wrong kind; OutputError and what writing raises.
    """
    form = format_for(file.family, key_format)
    target = (
        None
        if output is None
        else lora_output.check(output, file.checkpoint.files, overwrite=overwrite, folder=form.is_folder)
    )
    _require_convertible(file, key_format, skip_unmatched=skip_unmatched, names_known=names_known)
    done = Converted(unmatched=unmatched.left_aside(file))
    modules = _modules(file, form, key_format, done)
    tensors: dict[str, Tensor] = {}
    for part, one in modules.items():
        tensors |= _spelled(part, one, form, done)
    if key_format == "default" and file.family.lora_alphas:
        tensors = lora_output.with_alphas_everywhere(tensors)
    if not tensors:
        raise DataError(f'"{file.name}" changes nothing: all its factors are zero; there is nothing to write.')
    done.modules, done.tensors = len(modules), len(tensors)
    if target is None:
        return done
    extra = {}
    if form.is_folder:
        extra[peft_folder.CONFIG] = peft_folder.config(file, {module_name(part): one for part, one in modules.items()})
    lora_output.write(
        target, tensors, _metadata(file, key_format), file.checkpoint.files, overwrite=overwrite, extra_files=extra
    )
    return done


def _require_convertible(file: LoraFile, key_format: KeyFormat, *, skip_unmatched: bool, names_known: bool) -> None:
    if file.unmatched and not skip_unmatched:
        key, reason = file.unmatched[0]
        raise DataError(
            f'"{file.name}": {quoted(key)} cannot be converted ({reason}; {len(file.unmatched)} such keys in all); '
            "`skip_unmatched` leaves them out."
        )
    if not file.changes:
        unmatched.require_match(file, "any model of its names", skip_unmatched=True)
    twice = next((part for part, changes in file.changes.items() if len(changes) > 1), None)
    if twice is not None:
        modules = " and ".join(quoted(change.adapter.module) for change in file.changes[twice])
        raise DataError(
            f'"{file.name}" has two entries for {quoted(twice)}, {modules}; programs disagree on which one counts, '
            "so remove one of them."
        )
    flat = any(adapter.module.startswith(FLAT) for adapter in file.adapters)
    if file.family.keeps_names and flat and key_format == "comfyui" and not names_known:
        raise DataError(
            f'"{file.name}" has names with underscores of an unknown model, so mergetool cannot put their dots back; '
            "name the model with `model`."
        )
    foreign_names.require_known(file, key_format)


def _modules(file: LoraFile, form: LoraFormat, key_format: KeyFormat, done: Converted) -> dict[str, StoredModule]:
    """The modules to be written, by the parameter of the model that each changes, in file order."""
    found: dict[str, StoredModule] = {}
    layout = form.layout_of(file.family)
    for adapter in file.adapters:
        changes = [change for held in file.changes.values() for change in held if change.adapter is adapter]
        whole = _unscaled(module.read(file, adapter), changes[0].part, done)
        _require_carried(file, whole, adapter.module, form, key_format)
        is_wide = adapter.widens or file.family.widened.get(changes[0].part) in adapter.shape[1:]
        if is_wide and "whole" in form.kinds:  # ComfyUI's own names
            whole = whole.with_(reshape_weight=torch.tensor(adapter.shape))
        if len(changes) == 1:
            found[changes[0].part] = whole
            continue
        together = file.family.pieces(changes[0].part, layout)
        if not whole.is_plain and {change.part for change in changes} == set(together):
            joined = module.reordered(whole, changes, together)
            if joined is None:
                raise _inseparable(file, adapter, whole, changes)
            found[file.family.stored_name(changes[0].part, layout)] = joined
            continue
        slices = [module.rows(whole, change) for change in changes]
        kept = [part for part in slices if part is not None]
        if len(kept) < len(slices):
            raise _inseparable(file, adapter, whole, changes)
        for change, part in zip(changes, fused.apart(whole, kept), strict=True):
            if part is None:
                done.empty.append(change.part)
            else:
                found[change.part] = part
    return _stored(file, found, layout, done)


def _inseparable(file: LoraFile, adapter: Adapter, found: StoredModule, changes: Sequence[Change]) -> DataError:
    names = listed([module_name(change.part).rpartition(".")[2].removeprefix("to_") for change in changes])
    layouts = [layout for layout in ("comfyui", "diffusers") if layout in file.family.layouts]
    parts = tuple(change.part for change in changes)
    own = next((layout for layout in layouts if file.family.pieces(parts[0], layout) == parts), None)
    keeps = f"`key_format={own}` keeps it, and " if own == "comfyui" or (own and found.kind == "lora") else ""
    return DataError(
        f'"{file.name}": {quoted(adapter.module)} is {found.what} of {names} together, which cannot be taken apart; '
        f"{keeps}`mergetool lora bake` adds it to a checkpoint."
    )


def _require_carried(file: LoraFile, found: StoredModule, name: str, form: LoraFormat, key_format: KeyFormat) -> None:
    roles = frozenset(found.tensors)
    if form.is_folder and found.is_by_columns:
        raise DataError(
            f'"{file.name}": {quoted(name)} is a DoRA with magnitudes of its inputs, where PEFT has those of outputs only; '
            "`key_format=comfyui` or `key_format=default` keeps them."
        )
    if not form.carries(found.kind, roles):
        raise DataError(
            f'"{file.name}": {quoted(name)} is {found.what}, which `key_format={key_format}` cannot carry; '
            f"`key_format={carrying(found.kind, roles)[0]}` can, and `mergetool lora bake` adds it to a checkpoint."
        )


def _stored(
    file: LoraFile, modules: Mapping[str, StoredModule], layout: str, done: Converted
) -> dict[str, StoredModule]:
    """Modules by the tensors of ``layout``: parts of a fused one together where they are plain LoRAs, else under their own names."""
    family = file.family
    found: dict[str, StoredModule] = {}
    together: dict[str, dict[str, StoredModule]] = {}
    for part, one in modules.items():
        if len(family.pieces(part, layout)) == 1:
            found[family.stored_name(part, layout)] = one
        elif one.is_plain or one.kind in ("full", "whole"):
            stored = family.stored_name(part, layout)
            together.setdefault(stored, {})[part] = one
            found[stored] = one  # its place
        else:
            found[part] = one
    for stored, parts in together.items():
        pieces = family.pieces(next(iter(parts)), layout)
        like = next(iter(parts.values()))
        kinds = {one.kind for one in parts.values()}
        if len(kinds) > 1 or (kinds == {"whole"} and len(parts) < len(pieces)):
            raise DataError(
                f'"{file.name}": {quoted(next(iter(parts)))} is {like.what}, and not all of {quoted(stored)}, which holds it in this format, is '
                "one; `mergetool lora bake` adds it to a checkpoint."
            )
        rows = fused.rows_of(family, pieces, parts, file.anatomy)
        found[stored], error = fused.together([parts.get(piece) for piece in pieces], rows)
        if error:
            done.rounded[stored] = error
    return found


def _unscaled(found: StoredModule, part: str, done: Converted) -> StoredModule:
    """A whole difference with its scale multiplied in: no format has an alpha for it."""
    if found.kind != "full" or found.scale == 1:
        return found
    folded = {role: (tensor.double() * found.scale).to(tensor.dtype) for role, tensor in found.tensors.items()}
    exact = next(iter(found.tensors.values())).double() * found.scale
    error = _relative(next(iter(folded.values())).double(), exact)
    if error:
        done.rounded[part] = error
    return replace(found, tensors=folded, scale=1.0)


def _spelled(part: str, found: StoredModule, form: LoraFormat, done: Converted) -> dict[str, Tensor]:
    """The tensors of a module under the names of a format."""
    scale = found.scale
    if form.alpha in ("none", "where needed") and found.kind == "lora" and scale != 1:
        exact = found.up.double() * scale
        folded = exact.to(found.up.dtype)
        error = _relative(folded.double(), exact)
        if error == 0 or form.alpha == "none":
            found, scale = found.with_(up=folded, scale=1.0), 1.0
            if error:
                done.rounded[part] = error
    name = module_name(part)
    tensors = {form.key(name, found.kind, role): tensor for role, tensor in _ordered(found, form)}
    if found.rank is not None and (form.alpha == "always" or (form.alpha in ("where needed", "none") and scale != 1)):
        tensors[form.key(name, found.kind, "alpha")] = _alpha(scale, found.rank)
    return tensors


def _ordered(found: StoredModule, form: LoraFormat) -> list[tuple[str, Tensor]]:
    order = ("down", "up", "mid")
    tensors = sorted(found.tensors.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order))
    if form.is_folder:  # PEFT's magnitudes are a vector
        return [(role, tensor.reshape(-1) if role == "dora_scale" else tensor) for role, tensor in tensors]
    return tensors


def _alpha(scale: float, rank: int) -> Tensor:
    """scale * rank, in float32 where that gives the scale back exactly."""
    alpha = torch.tensor(scale * rank, dtype=torch.float32)
    return alpha if float(alpha) / rank == scale else torch.tensor(scale * rank, dtype=torch.float64)


def _relative(found: Tensor, exact: Tensor) -> float:
    norm = float(torch.linalg.vector_norm(exact))
    return float(torch.linalg.vector_norm(found - exact)) / norm if norm else 0.0


def _metadata(file: LoraFile, key_format: str) -> dict[str, str]:
    """The file's own metadata, which tell its training, and the record of the conversion."""
    kept = {key: value for key, value in file.checkpoint.metadata.items() if key not in NOT_KEPT}
    name = display_names([file.name])[file.name]
    recipe = {"lora": name, "key_format": key_format}
    return kept | stamp("lora.convert", recipe, [(name, file.checkpoint.fingerprint())])
