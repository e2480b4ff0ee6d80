"""From checkpoints and folders to the modules that the sampler runs: transformer, text encoder, VAE."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergetool import models, quant
from mergetool.adapters import matching
from mergetool.adapters.reading import open_lora
from mergetool.adapters.rows import anatomy_of
from mergetool.arch import Anatomy, Part
from mergetool.arch.z_image import Z_IMAGE
from mergetool.checkpoint.reader import Checkpoint
from mergetool.checkpoint.shards import INDEX_SUFFIX, SUFFIX
from mergetool.errors import DataError, FamilyError, InputMissing, UsageError
from mergetool.models import OpenedModel
from mergetool.ops.cpu import as_tensor
from mergetool.quant import Encoding

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, ZImageTransformer2DModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# Nothing is fetched, and no code that lies in a model's folder is run, nor is the user asked whether it may be.
_LOCAL: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}


@dataclass(frozen=True, slots=True)
class WeightedLora:
    """A LoRA file and the strength it is added at; any finite number."""

    path: Path
    strength: float

    @classmethod
    def parse(cls, text: str) -> WeightedLora:
        """``PATH`` or ``PATH:STRENGTH``, the strength 1 when left out. Raises UsageError for a strength that is no number."""
        path, colon, strength = text.rpartition(":")
        if not colon or (len(path) == 1 and path.isalpha()):  # no colon, or that of a drive letter
            return cls(Path(text), 1.0)
        try:
            return cls(Path(path), float(strength))
        except ValueError:
            raise UsageError(f'"{text}" is no LoRA with a strength; write PATH:0.8.') from None


def load_transformer(
    model: str, *, dtype: torch.dtype, device: str, loras: Sequence[WeightedLora] = ()
) -> ZImageTransformer2DModel:
    """The Z-Image transformer of a MODEL of any layout, prefix and float dtype, with LoRAs added to its weights.

    Weights are read part by part straight into their place, so memory is the model at ``dtype``. A DoRA's change is that of the stored
    weights. Raises what `models.open_model` and `open_lora` raise, and FamilyError for a model that is not Z-Image or whose tensors are
    not all there, and DataError for a LoRA with keys that change nothing in it.
    """
    from diffusers import ZImageTransformer2DModel

    with models.open_model(model) as opened:
        config = _config(model, opened.checkpoint, opened.anatomy)
        with _quiet(), torch.device("meta"):
            built = ZImageTransformer2DModel.from_config(config)
        wanted = {name: tuple(parameter.shape) for name, parameter in built.state_dict().items()}
        parts = {name: part for name, part in opened.anatomy.parts.items() if name not in opened.anatomy.family.unused}
        _require_equal(model, wanted, parts)
        state = {name: _read(opened.checkpoint, part).to(dtype) for name, part in parts.items()}
        for lora in loras:
            _add_lora(state, lora, opened)
    built.load_state_dict({name: tensor.to(device) for name, tensor in state.items()}, assign=True)
    return built.eval().requires_grad_(False)


def _config(model: str, checkpoint: Checkpoint, anatomy: Anatomy) -> Mapping[str, Any]:
    stored = checkpoint.config
    if stored is not None and stored.get("_class_name") == "ZImageTransformer2DModel":
        return dict(stored)
    if anatomy.family is not Z_IMAGE:
        raise FamilyError(f"{model} is a {anatomy.family.name} model; only Z-Image models are sampled.")
    config = anatomy.family.config(anatomy)
    if config is None:
        raise FamilyError(
            f"{model} does not show the shape of its transformer; put the config.json of its architecture beside it."
        )
    return config


def _require_equal(model: str, wanted: Mapping[str, tuple[int, ...]], parts: Mapping[str, Part]) -> None:
    missing = [name for name in wanted if name not in parts]
    extra = [name for name in parts if name not in wanted]
    if missing or extra:
        what = f'lacks "{missing[0]}"' if missing else f'has "{extra[0]}"'
        count = len(missing) + len(extra) - 1
        raise FamilyError(
            f"{model} {what}{f' and {count} more' if count else ''} "
            f"{'that' if missing else 'which'} a Z-Image transformer {'needs' if missing else 'does not know'}; "
            "it cannot be sampled."
        )
    for name, shape in wanted.items():
        if parts[name].shape != shape:
            raise FamilyError(
                f'tensor "{name}" of {model} is {list(parts[name].shape)}, its config needs {list(shape)}.'
            )


def _read(checkpoint: Checkpoint, part: Part) -> Tensor:
    """A part in its stored dtype, float32 where it is quantised, memory of its own."""
    if part.encoding is not None:
        rows = part.numel // part.encoding.width
        return torch.from_numpy(part.encoding.values(checkpoint.read, part.stored.row, rows)).view(part.shape)
    row_nbytes = checkpoint.tensors[part.stored.tensor].row_nbytes
    raw = checkpoint.read(part.stored.tensor, part.stored.row * row_nbytes, part.nbytes)
    return as_tensor(memoryview(raw), part.dtype).clone().view(part.shape)


def _add_lora(state: dict[str, Tensor], lora: WeightedLora, model: OpenedModel) -> None:
    """Add a LoRA of any spelling at its strength to the weights, in float32 with one rounding."""
    with open_lora(lora.path, anatomy=model.anatomy) as file:
        matching.require_match(file, model.name, skip_unmatched=False)
        for name, part in anatomy_of(file, model.anatomy, model.checkpoint).parts.items():
            weight, rows = state[name], part.encoding
            assert rows is not None
            change = torch.from_numpy(rows.values(file.checkpoint.read)).view(weight.shape)
            state[name] = (weight.float() + lora.strength * change).to(weight.dtype)


def _whole(file: Checkpoint, name: str, encoding: Encoding | None = None) -> Tensor:
    if encoding is not None:
        return torch.from_numpy(encoding.values(file.read)).view(encoding.shape)
    info = file.tensors[name]
    raw = file.read(name)  # by name: the tensor over it does not keep it alive
    return as_tensor(memoryview(raw), info.dtype).clone().view(info.shape)


@dataclass(frozen=True, slots=True)
class Components:
    """Where the parts beside the transformer are: folders as diffusers and transformers save them, or single files of the
    text encoder and the VAE. A single file is read with the config.json beside it, else with that of the real Z-Image's.
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
        """For a MODEL: those named, else those of ``pipeline``, else those beside its transformer, else the embedded ones
        where they fit. Raises InputMissing, saying which is missing and the option that names it.
        """
        folder = (
            pipeline_folder(models.resolve(pipeline).path) if pipeline else pipeline_folder(models.resolve(model).path)
        )
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
            _required(text_encoder, model, "text encoder", "--text-encoder FOLDER or FILE"),
            _required(tokenizer, model, "tokenizer", "--tokenizer FOLDER"),
            _required(vae, model, "VAE", "--vae FILE"),
        )


def _required(place: Path | None, model: str, what: str, option: str) -> Path:
    if place is None or not place.exists():
        found = f'"{place}" does not exist' if place else f"{model} comes without one"
        raise InputMissing(f"no {what}: {found}; name it with {option}, or all parts with --pipeline FOLDER.")
    return place


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
    config = json.loads(path.read_text("utf-8"))
    with models.open_model(model) as opened:
        part = opened.anatomy.parts.get("cap_embedder.1.weight")
    return part is not None and part.shape == (config["dim"], config["cap_feat_dim"])


def load_text_encoder(components: Components, *, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The text encoder and its tokenizer. Raises DataError when the folders do not hold them."""
    from transformers import AutoModel, AutoTokenizer

    with _quiet(), _readable(components.text_encoder, "text encoder"):
        if components.text_encoder.is_dir():
            _examine(components.text_encoder, "model")
            encoder = AutoModel.from_pretrained(components.text_encoder, dtype=dtype, **_LOCAL, use_safetensors=True)
        else:
            encoder = _single_text_encoder(components.text_encoder, dtype)
    with _quiet(), _readable(components.tokenizer, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(components.tokenizer, **_LOCAL)
    if tokenizer.chat_template is None:
        raise DataError(
            f'"{components.tokenizer}" has no chat template; take the tokenizer of the model\'s own repository.'
        )
    return encoder.eval().requires_grad_(False), tokenizer


def _single_text_encoder(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A text encoder of one file under transformers' names, with or without ``model.`` before them."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(_config_folder(path, "text_encoder"), **_LOCAL)
    with torch.device("meta"):
        built = AutoModel.from_config(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
    with Checkpoint.open(path) as file:
        encodings = quant.quantised(file, str(path)).encodings
        names = {name.removeprefix("model."): name for name in file.tensors}
        shapes = {n: (encodings[s] if s in encodings else file.tensors[s]).shape for n, s in names.items()}
        torn = [n for n, shape in wanted.items() if shapes.get(n) != shape]
        if torn:
            raise DataError(
                f'"{path}" lacks "{torn[0]}", or has it in another shape{f", and {len(torn) - 1} more" if torn[1:] else ""}; '
                f"it is not a text encoder of {config.num_hidden_layers} layers and width {config.hidden_size}."
            )
        state = {name: _whole(file, names[name], encodings.get(names[name])).to(dtype) for name in wanted}
    built.load_state_dict(state, assign=True)
    # What is not stored, the rotary frequencies, is computed by the constructor; on "meta" it has no values.
    built.rotary_emb = type(built.rotary_emb)(config=config)
    return built


def _config_folder(path: Path, part: str) -> Path:
    """Where the config.json of a single file is."""
    return path.parent if (path.parent / "config.json").is_file() else Path(__file__).parent / "configs" / part


def load_vae(components: Components, *, dtype: torch.dtype) -> AutoencoderKL:
    """The VAE, from a diffusers folder or a single file. Raises DataError when it is something else."""
    from diffusers import AutoencoderKL

    with _quiet(), _readable(components.vae, "VAE"):
        if components.vae.is_dir():
            _examine(components.vae, "diffusion_pytorch_model")
            vae = AutoencoderKL.from_pretrained(
                components.vae, dtype=dtype, local_files_only=True, use_safetensors=True
            )
        else:
            Checkpoint.open(components.vae).close()  # the library would unpickle what is no safetensors file
            config = _config_folder(components.vae, "vae")
            vae = AutoencoderKL.from_single_file(
                str(components.vae), config=str(config), dtype=dtype, local_files_only=True
            )
    return vae.eval().requires_grad_(False)


def _examine(folder: Path, stem: str) -> None:
    """Refuse a component's folder unless what its library will read is safetensors files inside it.

    The libraries join the names of an index to the folder unchecked, and read a pickle where there is nothing else. Raises what
    `Checkpoint.open` raises.
    """
    found = [name for name in (f"{stem}{SUFFIX}", f"{stem}{SUFFIX}{INDEX_SUFFIX}") if os.path.lexists(folder / name)]
    if not found:
        raise DataError(
            f'"{folder}" is not a readable part of a pipeline: it has no {stem}{SUFFIX}, and pickles are never loaded; '
            "get its safetensors files."
        )
    for name in found:
        Checkpoint.open(folder / name).close()


@contextmanager
def _readable(path: Path, what: str) -> Iterator[None]:
    """Turn what the libraries raise for a folder that holds something else into one sentence."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise DataError(f'"{path}" is not a readable {what} ({reason}).') from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' advice and progress bars on the way."""
    import diffusers.utils.logging
    import transformers.utils.logging

    levels = diffusers.utils.logging.get_verbosity(), transformers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity(logging.ERROR)
    transformers.utils.logging.set_verbosity(logging.ERROR)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers.utils.logging.set_verbosity(levels[0])
        transformers.utils.logging.set_verbosity(levels[1])
