"""A LoRA file of any spelling as the changes that it makes, by part of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from mergetool.adapters import alphas
from mergetool.adapters.adapter import Adapter, Change, ChangeKind, is_by_columns
from mergetool.adapters.alphas import Alphas
from mergetool.adapters.formats import FLAT, FORMATS
from mergetool.adapters.keys import Modules, Spelled, is_of_text_encoder, naming, take_apart
from mergetool.adapters.origin import families_of, is_lookalike, trainer
from mergetool.arch import Anatomy, Family
from mergetool.arch.families import FAMILIES
from mergetool.arch.generic import GENERIC
from mergetool.arch.stock import Ancestor, ancestor_of
from mergetool.checkpoint.header import TensorInfo
from mergetool.checkpoint.names import quoted
from mergetool.checkpoint.reader import Checkpoint
from mergetool.errors import DataError, MergetoolError

PEFT_FILE = "adapter_model.safetensors"

_ALONE: Mapping[str, ChangeKind] = {"diff_b": "full", "diff": "full", "set_weight": "whole"}
"""Roles of tensors that are a change by themselves, and its kind."""


@dataclass(frozen=True)
class LoraFile:
    """An open LoRA; closes its file as a context manager.

    ``changes`` are by part, in file order, more than one where the file changes a part twice. ``unmatched`` names keys that change
    nothing, with the reason; ``text_encoder`` keys of text encoders that the model does not hold, which are not for it;
    ``unread`` counts modules by a kind of adapter that is known and not read (their keys are unmatched too); ``warnings`` what a
    user should know. ``widens`` are the parts that a control LoRA wants with more columns than the model has, and how many. ``anatomy`` is that of the model it was opened
    with. ``dialect`` is how its keys are spelled, ``trainer`` what wrote it, where that shows.
    """

    name: str
    checkpoint: Checkpoint
    family: Family
    dialect: str
    trainer: str | None
    changes: Mapping[str, tuple[Change, ...]]
    unmatched: tuple[tuple[str, str], ...]
    text_encoder: tuple[str, ...]
    unread: Mapping[str, int]
    warnings: tuple[str, ...]
    widens: Mapping[str, int] = field(default_factory=dict)
    anatomy: Anatomy | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.checkpoint.close()

    @property
    def made_for(self) -> Ancestor | None:
        """The stock model that it was made for, as its metadata or its name tells."""
        return ancestor_of(self.family, None, self.checkpoint.metadata, self.checkpoint.source)

    @property
    def adapters(self) -> list[Adapter]:
        """Every adapter once, in file order."""
        seen = {id(change.adapter): change.adapter for changes in self.changes.values() for change in changes}
        return list(seen.values())


def open_lora(path: str | Path, *, name: str | None = None, anatomy: Anatomy | None = None) -> LoraFile:
    """The LoRA at ``path``: a safetensors file, or a folder as PEFT saves one.

    With an ``anatomy`` modules are looked up among the model's own parts; without one a known family is told by the names, and any other
    file's modules are parts of a generic model. Raises what `Checkpoint.open` raises, and DataError for a file that is no LoRA or
    contradicts itself: a single factor, factors that do not fit together, an unreadable config.
    """
    place = Path(path)
    file = place / PEFT_FILE if place.is_dir() and (place / PEFT_FILE).exists() else place
    checkpoint = Checkpoint.open(file)
    try:
        return _Reading(name or str(path), checkpoint, alphas.stated(file, checkpoint.metadata), anatomy).read()
    except BaseException:
        checkpoint.close()
        raise


def is_lora(path: str | Path) -> bool:
    """Whether most keys of the file at ``path`` are a LoRA's. A folder as PEFT saves one counts too. No tensor is read.

    False for what cannot be opened, which opening it as a model explains.
    """
    place = Path(path)
    if place.is_dir():
        return (place / PEFT_FILE).exists()
    try:
        with Checkpoint.open(place) as checkpoint:
            found = sum(isinstance(take_apart(key), Spelled) for key in checkpoint.tensors)
            return 2 * found > len(checkpoint.tensors)
    except MergetoolError:
        return False


class _Reading:
    def __init__(self, name: str, checkpoint: Checkpoint, stated: Alphas, anatomy: Anatomy | None) -> None:
        self.name = name
        self.checkpoint = checkpoint
        self.stated = stated
        self.anatomy = anatomy
        self.spelled: dict[str, Spelled] = {}
        self.unmatched: list[tuple[str, str]] = []
        self.text_encoder: list[str] = []
        self.unread: Counter[str] = Counter()
        self.warnings: list[str] = []
        self.widens: dict[str, int] = {}
        for key in checkpoint.tensors:
            found = take_apart(key)
            if isinstance(found, Spelled):
                self.spelled[key] = found
            elif is_of_text_encoder(key):
                self.text_encoder.append(key)
            else:
                self.unmatched.append((key, found))
        if not self.spelled:
            raise DataError(f'"{name}" has none of the keys of a LoRA; is it a checkpoint?')
        self._require_scales_understood()
        known = (anatomy.family, list(anatomy.parts)) if anatomy else self._known_family()
        self.family: Family = known[0] if known else GENERIC
        parts = known[1] if known else None
        names = parts if parts is not None else [_parameter(one) for one in self.spelled.values()]
        self.modules = Modules(self.family, names)

    def _known_family(self) -> tuple[Family, list[str]] | None:
        """The known family that the file is for, with its parts; None where it is for another model."""
        strange = None
        shapes = {key: self._info(key).shape for key in self.spelled}
        for found in families_of(self.spelled, shapes):
            other = found[0].lookalike
            if not other or not is_lookalike(other, self.spelled, shapes, self.checkpoint.metadata):
                return found
            strange = f"its names are also {found[0].name}'s, but its shapes or its header are {other.name}'s"
            known = [family for family in FAMILIES if family.name == other.name]
            named = families_of(self.spelled, shapes, known, signs=False)
            if named:
                return named[0]
        if strange:
            self.warnings.append(strange)
        return None

    def _require_scales_understood(self) -> None:
        """Codes of 8 bits beside a scale that is not understood would be read as other values."""
        narrow = any(self._info(key).dtype.bits == 8 for key in self.spelled)
        scale = next((key for key, _ in self.unmatched if "scale" in key.rpartition(".")[2]), None)
        if narrow and scale is not None:
            raise DataError(
                f'"{self.name}": {quoted(scale)} stands beside factors of 8 bits and is not understood, so that their values are not '
                "known; get the LoRA in bf16 or fp16."
            )

    def read(self) -> LoraFile:
        changes: dict[str, list[Change]] = {}
        for (prefix, module), roles in self._modules().items():
            parts = self.modules.find(Spelled(prefix, module, "", ""))
            if not parts:
                self._set_aside(roles.values(), "no such module")
                continue
            adapters = self._adapters(prefix + module, roles, self._in_configs(prefix, module, parts))
            columns = next((prod(adapter.shape[1:]) for adapter in adapters if len(adapter.shape) > 1), None)
            for adapter in adapters:
                for change in self._changes(adapter, parts, columns):
                    changes.setdefault(change.part, []).append(change)
        self._remark(changes)
        return LoraFile(
            self.name,
            self.checkpoint,
            self.family,
            naming(self.spelled),
            trainer(self.checkpoint.metadata),
            {part: tuple(found) for part, found in changes.items()},
            tuple(self.unmatched),
            tuple(self.text_encoder),
            dict(self.unread),
            tuple(self.warnings),
            self.widens,
            self.anatomy,
        )

    def _modules(self) -> dict[tuple[str, str], dict[str, str]]:
        """Role -> key of every module that can be read, by prefix and name."""
        groups: dict[tuple[str, str], dict[str, str]] = {}
        unread: dict[tuple[str, str], list[str]] = {}
        for key, spelled in self.spelled.items():
            place = spelled.prefix, spelled.module
            if spelled.role is None:
                unread.setdefault(place, []).append(key)
                continue
            roles = groups.setdefault(place, {})
            if spelled.role in roles:
                self._refuse(
                    spelled.module, f"is given twice, as {quoted(roles[spelled.role])} and {quoted(key)}", "once"
                )
            roles[spelled.role] = key
        for place, keys in unread.items():
            kind = self._kind(keys[0])
            if not groups.get(place, {}).keys() - {"alpha", "dora_scale"}:  # what stands beside it belongs to it
                keys = [*keys, *groups.pop(place, {}).values()]
            self._set_aside(keys, f"{kind}, which is not read")
            self.unread[kind] += 1
        return groups

    def _kind(self, key: str) -> str:
        kind = self.spelled[key].kind
        return "BOFT" if kind == "OFT" and len(self._info(key).shape) > 3 else kind

    def _set_aside(self, keys: Iterable[str], reason: str) -> None:
        """Set keys aside that are of no module of the model: text encoders' are for another."""
        for key in keys:
            if is_of_text_encoder(key):
                self.text_encoder.append(key)
            else:
                self.unmatched.append((key, reason))

    def _in_configs(self, prefix: str, module: str, parts: Sequence[str]) -> str:
        """A module's names in configs and headers: the file's; diffusers' in its header, and for underscored names."""
        theirs = prefix.startswith(FLAT) or alphas.HEADER in self.checkpoint.metadata
        if not theirs or "diffusers" not in self.family.layouts:
            return prefix + module
        return self.family.stored_name(parts[0], "diffusers").removesuffix(".weight")

    def _adapters(self, module: str, roles: dict[str, str], in_configs: str) -> list[Adapter]:
        """The adapters of one module: that of its weight, and a whole difference of its bias."""
        found = [
            Adapter(module, kind, {role: roles.pop(role)}, (), None) for role, kind in _ALONE.items() if role in roles
        ]
        bias = roles.pop("up_bias", None)
        kinds: list[ChangeKind] = ["lokr"] if any(".lokr_" in key for key in roles.values()) else []
        if any(".hada_" in key for key in roles.values()):
            kinds.append("loha")
        if roles.keys() & {"up", "down", "mid"}:
            kinds.append("lora")
        if len(kinds) > 1:
            self._refuse(module, "has factors of two kinds", "one")
        if kinds:
            found.append(self._product(module, kinds[0], roles, in_configs))
            if bias is not None:  # PEFT scales it with the product
                found.append(Adapter(module, "full", {"diff_b": bias}, (), None, found[-1].scale))
        elif roles.keys() - {"alpha"} or (roles and not found):
            self.unmatched += [(key, "no factors beside it") for key in roles.values()]
        return [self._shaped(adapter) for adapter in found]

    def _product(self, module: str, kind: ChangeKind, roles: dict[str, str], in_configs: str) -> Adapter:
        alpha = roles.pop("alpha", None)
        widens = roles.pop("reshape_weight", None) is not None
        rank = self._rank(module, kind, roles)
        value = alphas.read(self.checkpoint, alpha) if alpha else self.stated.alpha(in_configs, rank)
        scale = 1.0
        if value is not None and rank is not None:
            scale = self.stated.scale(value, rank) if alpha is None else value / rank
        if value is None and module.startswith(FORMATS["kohya"].prefix):
            self.warnings.append(f"{module} states no alpha, where such files do: its scale is taken as 1")
        return Adapter(module, kind, roles, (), rank, scale, value is not None, widens)

    def _rank(self, module: str, kind: ChangeKind, roles: Mapping[str, str]) -> int | None:
        """The inner width; raises DataError where factors are missing or do not fit together."""
        wanted: Sequence[tuple[str, ...]] = [("up", "down")]
        if kind == "loha":
            wanted = [("w1_a", "w1_b", "w2_a", "w2_b")]
        elif kind == "lokr":
            wanted = [("w1",) if "w1" in roles else ("w1_a", "w1_b"), ("w2",) if "w2" in roles else ("w2_a", "w2_b")]
        for role in (role for roles_ in wanted for role in roles_):
            if role not in roles:
                self._refuse(module, f'has no factor "{role}" beside {quoted(next(iter(roles.values())))}', "both")
        if kind == "lora":
            return self._inner(module, roles["up"], roles["down"])
        if kind == "loha":
            ranks = [
                self._inner(module, roles[f"{w}_a"], roles[f"{w}_b"], tucker=t in roles)
                for w, t in (("w1", "t1"), ("w2", "t2"))
            ]
            return ranks[0]
        # LoKr's alpha counts only where a factor is a product itself; trainers write huge ones beside two whole factors.
        for whole, tucker in (("w1", False), ("w2", "t2" in roles)):
            if whole in roles:
                self._shape(module, roles[whole])
            else:
                rank = self._inner(module, roles[f"{whole}_a"], roles[f"{whole}_b"], tucker=tucker)
        return None if {"w1", "w2"} <= roles.keys() else rank

    def _inner(self, module: str, up: str, down: str, *, tucker: bool = False) -> int:
        left, right = self._shape(module, up), self._shape(module, down)
        inner = left[0] if tucker else left[1]
        if inner != right[0] or (prod(left[2:]) != 1 and not tucker):
            self._refuse(module, f"has factors of shapes {list(left)} and {list(right)}", "one inner width")
        return inner

    def _shape(self, module: str, key: str) -> tuple[int, ...]:
        shape, dtype = self._info(key).shape, self._info(key).dtype
        if len(shape) < 2 or 0 in shape:
            self._refuse(module, f"has a factor of shape {list(shape)}", "a matrix, or a convolution's kernel of one")
        if not dtype.blendable:
            self._refuse(module, f"has a factor stored as {dtype.name}", "a float")
        return shape

    def _shaped(self, adapter: Adapter) -> Adapter:
        """The adapter with the shape of its change."""
        shape = {role: self._info(key).shape for role, key in adapter.tensors.items()}
        match adapter.kind:
            case "full" | "whole":
                whole = next(iter(shape.values()))
            case "lora":
                kernel = shape["mid"][2:] if "mid" in shape else shape["down"][2:]
                whole = (shape["up"][0], shape["down"][1], *kernel)
            case "loha":
                kernel = shape["t1"][2:] if "t1" in shape else ()
                whole = (shape["w1_a"][1 if kernel else 0], shape["w1_b"][1], *kernel)
            case "lokr":
                first = shape.get("w1") or (shape["w1_a"][0], shape["w1_b"][1])
                second = shape.get("w2") or (
                    (shape["w2_a"][1], shape["w2_b"][1], *shape["t2"][2:])
                    if "t2" in shape
                    else (shape["w2_a"][0], *shape["w2_b"][1:])
                )
                whole = (first[0] * second[0], first[1] * second[1], *second[2:])
        return replace(adapter, shape=whole)

    def _changes(self, adapter: Adapter, parts: Sequence[str], columns: int | None) -> list[Change]:
        """The changes of an adapter to the parts that its module holds, in row order.

        ``columns`` are those of the module's weight, None where the file does not tell.
        """
        if "diff_b" in adapter.tensors:
            biases = [self.modules.bias(part) for part in parts]
            parts = [bias for bias in biases if bias] if None not in biases else []
        if not parts:
            self.unmatched += [(key, "no such bias") for key in adapter.tensors.values()]
            return []
        if self.family.is_vector(parts[0]):
            self.warnings.append(f"{parts[0]} is changed; ComfyUI takes such keys without applying them")
        if self.anatomy is None and len(parts) == 1 and len(adapter.shape) > 1:
            parts = self.family.alternative(parts[0], adapter.module, adapter.shape[0], adapter.shape[1])
        rows = self._rows(adapter, parts, columns)
        if self.anatomy is not None and len(parts) == 1:
            adapter = replace(adapter, shape=self._model_shape(parts[0]))  # [D] for a pad token of [1, D]
        changes, first = [], 0
        for part, count in zip(parts, rows, strict=True):
            changes.append(Change(adapter, part, first, count))
            first += count
        return changes

    def _rows(self, adapter: Adapter, parts: Sequence[str], columns: int | None) -> list[int]:
        total = adapter.shape[0] if adapter.shape else 1
        if self.anatomy is None:
            try:
                return self.family.divided(parts, total, columns)
            except ValueError as error:
                self._refuse(adapter.module, f"has {total} rows", str(error))
        wide, (first, *_) = adapter.shape[1:], parts
        is_widened = adapter.kind == "lora" and (adapter.widens or first in self.family.widened)
        if is_widened and len(parts) == 1 and len(wide) == 1 and wide > self.anatomy.parts[first].shape[1:]:
            self.widens[first] = wide[0]
        shapes = [self._model_shape(part) for part in parts]
        rows = [shape[0] if shape else 1 for shape in shapes]
        if (sum(rows), prod(shapes[0][1:])) != (total, prod(adapter.shape[1:])) and adapter.shape != shapes[0]:
            if prod(adapter.shape) == prod(shapes[0]) and len(parts) == 1 and adapter.kind in _ALONE.values():
                return rows
            wanted = [sum(rows), *shapes[0][1:]]
            raise DataError(
                f'"{self.name}": {quoted(adapter.module)} changes {list(adapter.shape)} values, where the model has {wanted}; '
                "the LoRA is for a model of another size or family."
            )
        return rows

    def _model_shape(self, part: str) -> tuple[int, ...]:
        """The shape of a part of the model, as wide as the file wants it."""
        assert self.anatomy is not None
        shape = self.anatomy.parts[part].shape
        return (*shape[:-1], self.widens[part]) if part in self.widens else shape

    def _remark(self, changes: Mapping[str, Sequence[Change]]) -> None:
        twice = [part for part, found in changes.items() if len(found) > 1]
        if twice:
            modules = " and ".join(quoted(change.adapter.module) for change in changes[twice[0]])
            self.warnings.append(
                f"{len(twice)} parts are changed twice, {twice[0]} by {modules}: programs differ in which they take"
            )
        dora = [c.adapter for found in changes.values() for c in found if "dora_scale" in c.adapter.tensors]
        if dora:
            self.warnings.append(f"{len(dora)} modules are DoRA: their change depends on the weight it is added to")
            self._remark_magnitudes(dora)
        mine = {id(change.adapter): change.adapter for found in changes.values() for change in found}.values()
        of_text = sum(is_of_text_encoder(next(iter(adapter.tensors.values()))) for adapter in mine)
        if of_text and self.family is GENERIC and self.anatomy is None:
            self.warnings.append(f"{of_text} of {len(mine)} changed modules are of text encoders")
        prefixes = Counter(one.prefix for key, one in self.spelled.items() if not is_of_text_encoder(key))
        if len(prefixes) > 1:
            self.warnings.append(f"keys have different prefixes: {', '.join(map(quoted, prefixes))}")

    def _remark_magnitudes(self, doras: Sequence[Adapter]) -> None:
        """Warn of ComfyUI's treatment of magnitudes by rows, where it reads them."""
        by_rows = [
            key
            for adapter in doras
            if (key := adapter.tensors["dora_scale"]).endswith(".dora_scale")
            and not is_by_columns(key, self._info(key).shape, adapter.shape[0])
        ]
        vectors = [key for key in by_rows if len(self._info(key).shape) < 2]
        if vectors:
            self.warnings.append(
                f"{len(vectors)} magnitudes are vectors, as {vectors[0]}: ComfyUI cannot apply them; lora convert writes a column"
            )
        if by_rows:
            self.warnings.append(
                f"{len(by_rows)} DoRA magnitudes are by rows: ComfyUI divides by the norms of the weight, training by those of the "
                "sum, so that its weights differ"
            )

    def _info(self, key: str) -> TensorInfo:
        return self.checkpoint.tensors[key]

    def _refuse(self, module: str, found: str, wanted: str) -> NoReturn:
        raise DataError(
            f'"{self.name}": {quoted(module)} {found}, where {wanted} is wanted; the file is damaged or for another model.'
        )


def _parameter(spelled: Spelled) -> str:
    """The parameter that a key changes in an unknown model."""
    return f"{spelled.module}.{'bias' if spelled.role in ('diff_b', 'up_bias') else 'weight'}"
