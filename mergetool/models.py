"""Resolve a MODEL argument: an embedded model, a registered name, a path, or a Hub address.

The Hub is that of Hugging Face.

Names are looked up in ``mergetool.toml`` of the working folder, then in the user's ``models.toml``, then in the
built-in catalogue. Both files have one section::

    [models]
    alkahest = "/models/alkahest.safetensors"
    turbo = "hf://Tongyi-MAI/Z-Image-Turbo/transformer"

A relative path counts from the folder of the file it is in.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from mergetool.checkpoint import hub, paths, shards
from mergetool.checkpoint.files import write_file
from mergetool.checkpoint.inputs import InputFile
from mergetool.checkpoint.names import quoted
from mergetool.checkpoint.reader import Checkpoint
from mergetool.errors import DataError, InputMissing, OutputError, UsageError

if TYPE_CHECKING:
    from mergetool.arch import Anatomy

Scope = Literal["here", "user"]
Origin = Literal["here", "user", "catalogue"]

MAX_NAMES_FILE = 1_000_000

EMBEDDED = Path(__file__).parent / "lab" / "data"
"""The pipeline folders of the embedded models; ``lab.base`` is the folder ``base`` in it."""

_HEADING = "# Names for models, kept by: mergetool models add, mergetool models remove\n\n[models]\n"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
FILE_SUFFIXES = (".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin", ".json", ".toml", ".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class Registered:
    """One name: the path or address it stands for, and where that is written."""

    name: str
    path: str
    origin: Origin


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A MODEL argument as the user gave it, and the file or folder it leads to on this disk."""

    name: str
    path: Path


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """An open checkpoint with its anatomy. It closes the checkpoint as a context manager.

    ``notes`` say what is odd about its quantised weights, and name other models of its pipeline, in words that follow its name; ``refused`` is the sentence that says why its values
    are not read, None for a file that is read.
    """

    name: str
    checkpoint: Checkpoint
    anatomy: Anatomy
    notes: tuple[str, ...] = ()
    refused: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.checkpoint.close()


def resolve(model: str) -> ResolvedModel:
    """Find where ``model`` leads: ``lab.NAME``, a registered name, an address, or a path.

    They are tried in this order; an address is ``hf://`` or the model's web page.

    A path may be copied with its quotes or as a ``file://`` address, and begin with ``~``; one that exists as it stands is itself. A model on the Hub is downloaded into Hugging Face's cache unless it is there. Raises InputMissing, with the
    nearest name when a name is unknown, UsageError for a malformed address, DataError for an unreadable names file.
    """
    if model.startswith("lab.") and (model in embedded() or not os.path.lexists(model)):
        return ResolvedModel(model, _embedded(model))
    entry = _registry().get(model)
    if entry is not None:
        return ResolvedModel(model, _local(entry))
    return ResolvedModel(model, _place(model))


def open_model(model: str, *, names_only: bool = False) -> OpenedModel:
    """Resolve, open and recognise ``model``, in any container. Only headers and markers are read.

    Raises what `resolve`, `Checkpoint.open` and `arch.recognise` raise, and DataError for quantised weights that are not
    read (see `quant.weights`) unless ``names_only`` says that only names and stored shapes matter.
    """
    checkpoint = Checkpoint.open(resolve(model).path)
    try:
        opened = recognised(model, checkpoint, names_only=names_only)
        beside = shards.companions(checkpoint.source)
        if beside:
            text = f"is one of {1 + len(beside)} models of its pipeline that denoise; what is done to it is not done to {' and '.join(map(quoted, beside))}"
            return replace(opened, notes=(*opened.notes, text))
        return opened
    except BaseException:
        checkpoint.close()
        raise


def recognised(name: str, checkpoint: Checkpoint, *, names_only: bool = False) -> OpenedModel:
    """Recognise an open checkpoint. Raises what `open_model` says of its content."""
    # Here, since numpy comes with them: names are looked up, and files begin to be read, before it is there.
    from mergetool.arch import bundled, encoders, recognise
    from mergetool.quant.weights import Quantised, quantised

    refused = None
    try:
        found = quantised(checkpoint, name, bundled(checkpoint.tensors))
    except DataError as error:
        if not names_only:
            raise
        found, refused = Quantised({}), str(error)
    anatomy = recognise(
        checkpoint.tensors,
        source=name,
        encodings=found.encodings,
        names_only=refused is not None,
        config=checkpoint.config,
    )
    if refused is None:
        anatomy = encoders.with_readable_parts(anatomy, checkpoint, name)
    return OpenedModel(name, checkpoint, anatomy, found.notes, refused)


def listing() -> tuple[Registered, ...]:
    """Every name that can be used here, sorted, each with the meaning that wins."""
    return tuple(sorted(_registry().values(), key=lambda entry: entry.name))


def add(name: str, path: str, scope: Scope = "user") -> None:
    """Let ``name`` stand for ``path``, for this user, or for this folder with scope "here".

    The first is written in the user's config folder, the second in ``./mergetool.toml``.

    A name that is taken there gets the new meaning. The user's names keep absolute paths. Raises UsageError for
    a name that could be a path, InputMissing when there is nothing at the path, OutputError when the names cannot
    be written.
    """
    _require_name(name)
    copied = path if os.path.lexists(path) else paths.typed(path)
    address = copied if copied.startswith(hub.SCHEME) else hub.address_of(copied)
    if address is not None:
        meaning = str(hub.HubAddress.parse(address))
    else:
        place = Path(copied)
        if not os.path.lexists(place):
            raise InputMissing(f"{quoted(path)} does not exist; check the path.")
        meaning = str(place.absolute() if scope == "user" else place)
    names = names_in(names_file(scope))
    _write_names(scope, {**names, name: meaning}, changed=name)


def remove(name: str) -> None:
    """Forget ``name``: in ``./mergetool.toml`` if it is there, else in the user's config folder.

    Raises UsageError for a name that is in neither; those of the catalogue cannot be removed.
    """
    for scope in ("here", "user"):
        names = dict(names_in(names_file(scope)))
        if name in names:
            del names[name]
            _write_names(scope, names, changed=name)
            return
    if name in _catalogue():
        raise UsageError(f'"{name}" is in the built-in catalogue and cannot be removed; a name you add goes before it.')
    near = difflib.get_close_matches(name, _registry(), n=1)
    hint = f'did you mean "{near[0]}"' if near else "see: mergetool models list"
    raise UsageError(f"no model is registered as {quoted(name)}; {hint}.")


def embedded() -> tuple[str, ...]:
    """The names of the embedded models, each with its ``lab.``."""
    return tuple(sorted(f"lab.{path.parent.name}" for path in EMBEDDED.glob("*/model_index.json")))


def _place(text: str) -> Path:
    """The target of an address or a path. Raises what `resolve` raises."""
    if "\0" not in text and os.path.lexists(text):
        return Path(text)
    path = paths.typed(text)
    address = path if path.startswith(hub.SCHEME) else hub.address_of(path)
    if address is not None:
        return hub.fetch(address)
    if "://" in path:
        raise UsageError(f"{quoted(text)} is an address that mergetool does not read; write hf://org/repo.")
    if "\0" in path or not os.path.lexists(path):
        raise InputMissing(_unknown(path))
    return Path(path)


def _embedded(model: str) -> Path:
    if model not in embedded():
        raise InputMissing(f"{quoted(model)} is no embedded model; choose one of {', '.join(embedded())}.")
    return EMBEDDED / model.removeprefix("lab.")


def names_file(scope: Scope = "user") -> Path:
    """The file that keeps the names of a scope."""
    if scope == "here":
        return Path("mergetool.toml")
    folder = os.environ.get("MERGETOOL_CONFIG_DIR")
    if not folder:
        import platformdirs

        folder = platformdirs.user_config_dir("mergetool")
    return Path(folder) / "models.toml"


def _registry() -> dict[str, Registered]:
    """The meaning that wins for every name."""
    registry = {name: Registered(name, path, "catalogue") for name, path in _catalogue().items()}
    for scope in ("user", "here"):
        for name, path in names_in(names_file(scope)).items():
            registry[name] = Registered(name, path, scope)
    return registry


def _catalogue() -> Mapping[str, str]:
    raw = resources.files("mergetool").joinpath("catalogue.toml").read_bytes()
    return _parse_names(raw, "catalogue.toml")


def names_in(path: Path) -> Mapping[str, str]:
    """Read a file of names, {} where there is none. Raises DataError, and InputMissing where it may not be read."""
    if not os.path.lexists(path):
        return {}
    with InputFile.open(path) as file:
        if file.size > MAX_NAMES_FILE:
            raise DataError(f'"{path}" has {file.size} bytes, but the limit for a file of names is {MAX_NAMES_FILE}.')
        return _parse_names(file.read(0, file.size), str(path))


def _parse_names(raw: bytes, source: str) -> Mapping[str, str]:
    try:
        root = tomllib.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: broken TOML, or not UTF-8
        detail = str(error) if isinstance(error, tomllib.TOMLDecodeError) else "not UTF-8, or nested too deeply"
        hint = "; a path with backslashes stands in single quotes" if b"\\" in raw else ""
        raise DataError(f'"{source}" is not valid TOML ({detail}){hint}; correct it by hand.') from None
    unknown = next((section for section in root if section != "models"), None)
    names = root.get("models", {})
    if unknown is not None or not isinstance(names, dict):
        shown = "models" if unknown is None else unknown
        raise DataError(f'"{source}" has {quoted(shown)}, where only a section [models] may stand; correct it by hand.')
    for name, path in names.items():
        if not isinstance(path, str) or not _NAME.fullmatch(name) or not path or "\0" in path:
            raise DataError(
                f'"{source}" gives the name {quoted(name)} no path in quotes, or the name has other characters than '
                'letters, digits, ".", "-" and "_" (one with dots needs quotes); correct it by hand.'
            )
    return names


def _local(entry: Registered) -> Path:
    copied = paths.typed(entry.path)
    address = copied if copied.startswith(hub.SCHEME) else hub.address_of(copied)
    if address is not None:
        return hub.fetch(address)
    source = names_file("here" if entry.origin == "here" else "user")
    path = source.parent / entry.path
    path = path if os.path.lexists(path) else source.parent / copied
    if not os.path.lexists(path):
        raise InputMissing(
            f'"{entry.name}" stands for "{path}" in "{source}", but that does not exist; '
            f"register it again with: mergetool models add {entry.name} PATH."
        )
    return path


def _unknown(model: str) -> str:
    if not _NAME.fullmatch(model) or model.lower().endswith(FILE_SUFFIXES):
        return f"{quoted(model)} does not exist; {_nearest_file(model)}check the path."
    near = difflib.get_close_matches(model, _registry(), n=1)
    hint = f'did you mean "{near[0]}"' if near else "see: mergetool models list"
    return f"no model or file is named {quoted(model)}; {hint}."


def _nearest_file(path: str) -> str:
    """A guess at the meaning of a path to nothing: a file of nearly the same name, or one on another system; empty for no guess."""
    if os.name != "nt" and re.match(r"[A-Za-z]:[\\/]|\\\\", path):
        return "it is a path of Windows, and this is another system (in WSL C:\\ is /mnt/c/); "
    folder, name = os.path.split(path)
    try:
        near = difflib.get_close_matches(name, os.listdir(folder or "."), n=1, cutoff=0.8)
    except (OSError, ValueError):
        return ""
    return f"did you mean {quoted(os.path.join(folder, near[0]))}? Else " if near else ""


def _require_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise UsageError(
            f'{quoted(name)} cannot be a name; use letters, digits, ".", "-" and "_", starting with a letter or digit.'
        )
    if name.lower().endswith(FILE_SUFFIXES):
        raise UsageError(f'"{name}" looks like a file; leave its ending out of the name.')
    if name.startswith("lab."):
        raise UsageError(f'"{name}" cannot be a name: those starting with "lab." are the embedded models.')


def _write_names(scope: Scope, names: Mapping[str, str], *, changed: str) -> None:
    """Write ``names``, of which ``changed`` is new, other or gone, and keep the rest of the file as it was."""
    import tomlkit  # for writing alone: reading is the standard library's

    path = names_file(scope)
    document = tomlkit.parse(path.read_text("utf-8") if os.path.lexists(path) else _HEADING)
    section = document.setdefault("models", tomlkit.table())
    if changed in names:
        section[changed] = names[changed]
    else:
        del section[changed]
    try:
        data = document.as_string().encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"{quoted(names[changed])} is not a path that text can spell; rename the file.") from None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f'"{path.parent}" cannot be made ({error.strerror}); set MERGETOOL_CONFIG_DIR.') from None
    write_file(path, data, overwrite=True)
