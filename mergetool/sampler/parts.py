"""Find the parts of a pipeline on this disk, and check that they are whole and fit together.

Only headers and configs are read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergetool import models
from mergetool.adapters import unmatched
from mergetool.adapters.lora_file import LoraFile, open_lora
from mergetool.arch import Anatomy
from mergetool.arch.families import FAMILIES
from mergetool.checkpoint.names import quoted
from mergetool.checkpoint.reader import Checkpoint
from mergetool.checkpoint.shards import INDEX_SUFFIX, SUFFIX
from mergetool.engine.inputs import opened as opened_model
from mergetool.errors import DataError, FamilyError, InputMissing, UsageError
from mergetool.quant.encoding import Encoding
from mergetool.quant.weights import is_side_tensor, quantised
from mergetool.recipe.argument import anchor_of
from mergetool.recipe.steps import Input
from mergetool.sampler import architectures

CONFIGS = Path(__file__).parent / "configs"
"""The configs of the published text encoder and VAE, for single files without one."""


@dataclass(frozen=True, slots=True)
class WeightedLora:
    """A LoRA file and the strength it is added at; any finite number."""

    path: Path
    strength: float


@dataclass(frozen=True, slots=True)
class Components:
    """The places of the parts beside the transformer.

    They are folders as diffusers and transformers save them, or single files of the text encoder and the VAE. A single file is read with
    the config.json beside it, else with the published one's.
    """

    text_encoder: Path
    tokenizer: Path
    vae: Path

    @classmethod
    def find(
        cls,
        model: str,
        *,
        pipeline: str | None = None,
        text_encoder: Path | None = None,
        tokenizer: Path | None = None,
        vae: Path | None = None,
    ) -> Components:
        """Find the parts of a MODEL.

        They are those named, else those of ``pipeline``, else those beside its transformer, else the embedded ones where they fit. Raises
        InputMissing, saying which is missing and the option that names it.
        """
        folder = pipeline_of(pipeline or model)
        if pipeline and folder is None:
            raise InputMissing(f'"{pipeline}" is no pipeline folder: it has no model_index.json.')
        if folder is None and not (text_encoder and vae) and _fits_the_embedded(model):
            folder = models.EMBEDDED / "base"
        if text_encoder is not None and tokenizer is None:
            inside = (text_encoder / "tokenizer_config.json").exists()
            tokenizer = text_encoder if inside else text_encoder.parent / "tokenizer"
        if folder is not None:
            text_encoder = text_encoder or folder / "text_encoder"
            tokenizer = tokenizer or folder / "tokenizer"
        if vae is None and folder is not None:
            vae = folder / "vae"
        return cls(
            _required(text_encoder, model, "text encoder", "`text_encoder`"),
            _required(tokenizer, model, "tokenizer", "`tokenizer`"),
            _required(vae, model, "VAE", "`vae`"),
        )

    @property
    def text_config(self) -> architectures.Qwen3:
        """Raises DataError for the config of something else."""
        return architectures.Qwen3.of(config_of(self.text_encoder, "text_encoder"), str(self.text_encoder))

    @property
    def vae_config(self) -> architectures.Vae:
        """Raises DataError for the config of something else."""
        return architectures.Vae.of(config_of(self.vae, "vae"), str(self.vae))

    @property
    def picture_side(self) -> int:
        """Pixels a side of a picture by default."""
        return self.vae_config.sample_size

    @property
    def picture_unit(self) -> int:
        """Pixels that both sides of a picture are multiples of."""
        return 2 * self.vae_config.reduction

    def check(self) -> None:
        """Raises DataError for a part that is not whole.

        Text encoder, tokenizer and VAE are checked, also for tensors that their architecture does not know.
        """
        with opened_text_encoder(self), opened_vae(self):
            pass
        _check_tokenizer(self.tokenizer)


def _required(place: Path | None, model: str, part: str, option: str) -> Path:
    if place is None or not place.exists():
        reason = f'"{place}" does not exist' if place else f"{model} comes without one"
        raise InputMissing(f"the {part} is missing: {reason}; name it with {option}, or all parts with `pipeline`.")
    return place


def pipeline_of(model: str) -> Path | None:
    """The pipeline folder of a MODEL; of an expression its anchor's."""
    return pipeline_folder(models.resolve(anchor_of(model)).path)


def pipeline_folder(path: Path) -> Path | None:
    """The pipeline folder that a model's path is or lies in."""
    for folder in (path, path.parent, path.parent.parent):
        if (folder / "model_index.json").is_file():
            return folder
    return None


def _fits_the_embedded(model: str) -> bool:
    """Whether a model has the widths of the embedded ones, of the captions it reads and of its own."""
    path = models.EMBEDDED / "base" / "transformer" / "config.json"
    if not path.exists():
        return False
    config = json_object(path)
    with opened_model(model, fingerprints=False) as opened:
        part = opened.anatomy.parts.get("cap_embedder.1.weight")
    return part is not None and part.shape == (config["dim"], config["cap_feat_dim"])


def config_of(place: Path, part: str) -> Mapping[str, Any]:
    """Read a part's config.json: of a folder, beside a file, or bundled. Raises DataError."""
    return json_object(config_folder(place, part) / "config.json")


def json_object(path: Path) -> Mapping[str, Any]:
    """Read a JSON file of a pipeline. Raises DataError unless it holds one object."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f'"{path}" cannot be read ({type(error).__name__}); get the file again.') from None
    if not isinstance(value, dict):
        raise DataError(f'"{path}" is no JSON object; get the file again.')
    return value


def config_folder(place: Path, part: str) -> Path:
    """The folder of the config that a component is read with."""
    folder = place if place.is_dir() else place.parent
    return folder if place.is_dir() or (folder / "config.json").is_file() else CONFIGS / part


@dataclass(frozen=True, slots=True)
class ComponentWeights:
    """An open component.

    Its tensors go by the names of the library that runs it; ``names`` maps those to the stored ones.
    """

    file: Checkpoint
    names: Mapping[str, str]
    encodings: Mapping[str, Encoding]


@contextmanager
def opened_text_encoder(components: Components) -> Iterator[ComponentWeights]:
    """The text encoder's tensors by transformers' names. Raises DataError unless they are those of its config."""
    path = components.text_encoder
    with _open(path, "model", "text encoder") as (file, encodings):
        names = {architectures.qwen3_name(name): name for name in file.tensors if not is_side_tensor(name)}
        yield _checked(ComponentWeights(file, names, encodings), components.text_config.shapes(), path, "text_encoder")


@contextmanager
def opened_vae(components: Components) -> Iterator[ComponentWeights]:
    """The VAE's tensors by diffusers' names. Raises DataError unless they are those of its config."""
    path, config = components.vae, components.vae_config
    with _open(path, "diffusion_pytorch_model", "VAE") as (file, encodings):
        if any(re.match(r"((taesd_)?(encoder|decoder)\.)?(layers\.)?\d+\.", name) for name in file.tensors):
            raise DataError(
                f'"{path}" is a tiny autoencoder, which makes previews only: name the model\'s own VAE with `vae`.'
            )
        names = {config.name(name): name for name in file.tensors if not is_side_tensor(name)}
        yield _checked(ComponentWeights(file, names, encodings), config.shapes(), path, "vae")


@contextmanager
def _open(path: Path, stem: str, part: str) -> Iterator[tuple[Checkpoint, Mapping[str, Encoding]]]:
    """Safetensors or GGUF only: a library would follow an index anywhere, and read a pickle where there is nothing else."""
    if path.is_dir():
        places = [path / f"{stem}{suffix}" for suffix in (SUFFIX, f"{SUFFIX}{INDEX_SUFFIX}")]
        present = [file for file in places if os.path.lexists(file)]
        if not present:
            raise DataError(
                f'"{path}" is not a readable {part}: it has no {stem}{SUFFIX}, and pickles are never loaded; '
                "get its safetensors files."
            )
        for other in present[1:]:
            Checkpoint.open(other).close()
        file = Checkpoint.open(present[0])
    else:
        file = Checkpoint.open(path)
    try:
        yield file, quantised(file, str(path)).encodings
    finally:
        file.close()


def _checked(
    weights: ComponentWeights, wanted: Mapping[str, tuple[int, ...]], path: Path, part: str
) -> ComponentWeights:
    names, kind = weights.names, "VAE" if part == "vae" else "text encoder"
    bundled = config_folder(path, part).parent == CONFIGS
    way_out = (
        "there is no config.json beside it, so it is taken for the published one: put its own there, or name another"
        if bundled
        else "get all of its files again, or those of the model's own repository"
    )
    missing = [name for name in wanted if name not in names]
    extra = [stored for name, stored in names.items() if name not in wanted and name not in architectures.IGNORED]
    if missing or extra:
        more = len(missing or extra) - 1
        raise DataError(
            f'the {kind} "{path}" {"lacks" if missing else "has"} {quoted(missing[0] if missing else extra[0])}'
            f"{f' and {more} more' if more else ''}, which {'its config asks for' if missing else 'its config does not know'}"
            f"{f'; it has {quoted(extra[0])}, which is not known' if missing and extra else ''}; "
            f"{way_out}."
        )
    for name, shape in wanted.items():
        stored = names[name]
        stored_shape = (
            weights.encodings[stored] if stored in weights.encodings else weights.file.tensors[stored]
        ).shape
        if architectures.squeezed(stored_shape) != architectures.squeezed(shape):
            raise DataError(
                f'{quoted(stored)} of the {kind} "{path}" is {list(stored_shape)}, its config asks for {list(shape)}; {way_out}.'
            )
    return weights


def _check_tokenizer(folder: Path) -> None:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise DataError(f'"{folder}" is not a readable tokenizer: it has neither tokenizer.json nor vocab.json.')
    stated = folder / "tokenizer_config.json"
    if not stated.is_file():
        raise DataError(
            f'"{folder}" is not a readable tokenizer: it has no tokenizer_config.json; get all of its files.'
        )


def check_model(model: str, loras: Sequence[WeightedLora], components: Components, size: tuple[int, int]) -> None:
    """Raises FamilyError for a model that is no whole transformer of a family that is drawn.

    Raises DataError for a LoRA that does not change it and for a text encoder or VAE of other widths, and UsageError for a ``size``,
    (width, height), that the model has no positions for.
    """
    with opened_model(model, fingerprints=False) as opened:
        config = transformer_config(opened)
        require_whole(opened)
        for lora in loras:
            with open_lora(lora.path, anatomy=opened.anatomy) as file:
                require_lora(file, model)
    channels, width = components.vae_config.latent_channels, components.text_config.hidden_size
    if config.get("in_channels") != channels:
        raise DataError(
            f"{model} works on {config.get('in_channels')} latent channels, the VAE makes {channels}; "
            "they belong to different families: name the model's own with `pipeline` or `vae`."
        )
    if config.get("cap_feat_dim") != width:
        raise DataError(
            f"{model} reads captions of width {config.get('cap_feat_dim')}, the text encoder writes {width}; "
            "they belong to different families: name the model's own with `text_encoder`."
        )

    unit, places = 2 * components.vae_config.reduction, config.get("axes_lens", [])
    most = [unit * int(count) for count in reversed(places[1:])]
    if len(most) == 2 and (size[0] > most[0] or size[1] > most[1]):
        shrunk = min(1.0, most[0] / size[0], most[1] / size[1])
        nearest = [max(unit, int(side * shrunk) // unit * unit) for side in size]
        raise UsageError(
            f"{size[0]}x{size[1]} is more than {model} has positions for, {most[0]}x{most[1]}: the nearest is {nearest[0]}x{nearest[1]}."
        )


def transformer_config(opened: Input) -> Mapping[str, Any]:
    """The config of a transformer: the file beside it, else one derived from its shapes. Raises FamilyError."""
    stored, anatomy = opened.checkpoint.config, opened.anatomy
    drawn = {family.transformer: family.name for family in FAMILIES if family.transformer}
    if stored is not None and stored.get("_class_name") in drawn:
        return dict(stored)
    if anatomy.family.transformer is None:
        known = " and ".join(drawn.values())
        raise FamilyError(f"{opened.name} is a {anatomy.family.name} model; only {known} models are sampled.")
    config = anatomy.family.config(anatomy)
    if config is None:
        raise FamilyError(
            f"{opened.name} does not show the shape of its transformer; put the config.json of its architecture beside it."
        )
    return config


def require_whole(opened: Input) -> None:
    """Raise FamilyError where a block lacks tensors that others of its stack have.

    The rest is compared when the transformer is built.
    """
    missing = uneven(opened.anatomy)
    if missing:
        raise FamilyError(lacking(opened.name, missing, ()))


def uneven(anatomy: Anatomy) -> list[str]:
    """The parts that some blocks of a stack have and others lack, by name."""
    stacks: dict[str, dict[str, set[int]]] = {}
    for name in anatomy.own:
        match = re.fullmatch(r"([a-z_]+)\.(\d+)\.(.+)", name)
        if match:
            stacks.setdefault(match[1], {}).setdefault(match[3], set()).add(int(match[2]))
    absent = []
    for stack, leaves in stacks.items():
        if stack.endswith(("refiner", "layers")):
            every = range(1 + max(index for indices in leaves.values() for index in indices))
            absent += [f"{stack}.{i}.{leaf}" for leaf, has in leaves.items() for i in every if i not in has]
    return absent


def lacking(model: str, missing: Sequence[str], extra: Sequence[str]) -> str:
    """The sentence on a transformer that is not whole, or is something else."""
    fault = f'lacks "{missing[0]}"' if missing else f'has "{extra[0]}"'
    count = len(missing) + len(extra) - 1
    return (
        f"{model} {fault}{f' and {count} more' if count else ''} "
        f"{'that its architecture needs' if missing else 'which its architecture does not know'}; "
        "it cannot be sampled."
    )


def require_lora(file: LoraFile, model: str) -> None:
    """Raises DataError for a LoRA that, or a key of which, changes nothing in a model."""
    if file.unmatched:
        key, reason = file.unmatched[0]
        raise DataError(
            f'"{file.name}" has {quoted(key)}, which changes nothing in {model} ({reason}; {len(file.unmatched)} such keys in all); '
            "it is a LoRA for another model: bake what fits with `mergetool lora bake` and `skip_unmatched`."
        )
    unmatched.require_match(file, model, skip_unmatched=False)
