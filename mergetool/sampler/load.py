"""Load the sampler's modules from checkpoints and folders: transformer, text encoder, VAE."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergetool.adapters.lora_file import open_lora
from mergetool.adapters.rows import anatomy_of
from mergetool.adapters.whole import WholeRows
from mergetool.arch import Part
from mergetool.checkpoint.reader import Checkpoint
from mergetool.engine.computed import ComputedCheckpoint
from mergetool.engine.inputs import opened as opened_model
from mergetool.errors import DataError, FamilyError
from mergetool.ops.tensors import as_tensor
from mergetool.options.merging import MergeOptions
from mergetool.quant.encoding import Encoding
from mergetool.recipe.expression import parse
from mergetool.recipe.plan import plan_merge
from mergetool.recipe.quotes import quote
from mergetool.recipe.steps import Input
from mergetool.sampler.parts import (
    Components,
    ComponentWeights,
    WeightedLora,
    config_folder,
    lacking,
    opened_text_encoder,
    opened_vae,
    require_lora,
    require_whole,
    transformer_config,
)
from mergetool.sampler.pipeline_folder import PipelineFolder

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, ZImageTransformer2DModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# Nothing is fetched, and no code that lies in a model's folder is run, nor is the user asked whether it may be.
_LOCAL: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def load_transformer(
    model: str, *, dtype: torch.dtype, device: str, loras: Sequence[WeightedLora] = ()
) -> ZImageTransformer2DModel:
    """Load a MODEL's transformer, with LoRAs added to its weights.

    It may be of any layout, prefix and float dtype, or an expression.

    Weights are read part by part straight into their place, so memory is the model at ``dtype``. A DoRA's change is that of the stored
    weights. Raises what opening them raises, and FamilyError for a model of a family that is not drawn, or whose tensors are
    not all there, and DataError for a LoRA with keys that change nothing in it.
    """
    from diffusers import ZImageTransformer2DModel

    with opened_model(model) as opened:
        config = transformer_config(opened)
        require_whole(opened)
        with quiet(), torch.device("meta"):
            built = ZImageTransformer2DModel.from_config(config)
        parts = {name: part for name, part in opened.anatomy.own.items() if name not in opened.anatomy.family.unused}
        _require_equal(model, built.state_dict(), {name: part.shape for name, part in parts.items()})
        state = {name: _read(opened.checkpoint, part).to(dtype) for name, part in parts.items()}
        for lora in loras:
            _add_lora(state, lora, opened)
    built.load_state_dict({name: tensor.to(device) for name, tensor in state.items()}, assign=True)
    return built.eval().requires_grad_(False)


def load_pipeline(folder: PipelineFolder, *, dtype: torch.dtype) -> Any:
    """Load diffusers' pipeline of a folder, with a MODEL's weights for its denoiser.

    The folder says which weights come from a MODEL.

    Nothing is fetched and no pickle is read. Raises DataError for a folder that diffusers cannot load, and FamilyError for a MODEL whose
    tensors are not those of the folder's denoiser.
    """
    kind = pipeline_class(folder.kind)
    if kind is None:
        import diffusers

        raise DataError(
            f'diffusers {diffusers.__version__} has no {folder.kind}, which "{folder.path}" asks for; install a newer diffusers.'
        )
    given = {} if folder.model is None else {folder.denoiser: load_denoiser(folder, dtype=dtype)}
    with quiet(), readable(folder.path, "pipeline"):
        return kind.from_pretrained(folder.path, torch_dtype=dtype, use_safetensors=True, **_LOCAL, **given)


def pipeline_class(name: str) -> Any:
    """diffusers' class of that name, or None."""
    with quiet():
        import diffusers

        return getattr(diffusers, name, None)


def load_denoiser(folder: PipelineFolder, *, dtype: torch.dtype) -> torch.nn.Module:
    """The denoiser of a folder's config with the weights of its MODEL, else its own. Raises as `load_pipeline`."""
    import diffusers

    model = folder.model or str(folder.path / folder.denoiser)
    with opened_model(model) as opened:
        built_as = getattr(diffusers, str(folder.config.get("_class_name")))
        with quiet(), torch.device("meta"):
            built = built_as.from_config(folder.config)
        with _in_diffusers_names(opened) as file:
            shapes = {name: info.shape for name, info in file.tensors.items()}
            _require_equal(model, built.state_dict(), shapes)
            state = {name: whole(file, name, None).to(dtype) for name in shapes}
    built.load_state_dict(state, assign=True)
    loaded: torch.nn.Module = built.eval().requires_grad_(False)
    return loaded


@contextmanager
def _in_diffusers_names(opened: Input) -> Iterator[Checkpoint]:
    """A model as the file in diffusers' layout that `convert` would write, computed while it is read."""
    layout = None if opened.anatomy.family.keeps_names else "diffusers"
    expression = parse(quote(opened.name), known=[opened.name])
    with ComputedCheckpoint(
        plan_merge(expression, [opened], MergeOptions(layout=layout, prefix="", bundled="drop")), opened.name
    ) as computed:
        yield computed


def _require_equal(model: str, built: Mapping[str, Tensor], stored: Mapping[str, tuple[int, ...]]) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in built.items()}
    missing = [name for name in wanted if name not in stored]
    extra = [name for name in stored if name not in wanted]
    if missing or extra:
        raise FamilyError(lacking(model, missing, extra))
    for name, shape in wanted.items():
        if stored[name] != shape:
            raise FamilyError(f'tensor "{name}" of {model} is {list(stored[name])}, its config needs {list(shape)}.')


def _read(checkpoint: Checkpoint, part: Part) -> Tensor:
    """A part in its stored dtype, float32 where it is quantised, memory of its own."""
    if part.encoding is not None:
        rows = part.numel // part.encoding.width
        return torch.from_numpy(part.encoding.values(checkpoint.read, part.stored.row, rows)).view(part.shape)
    row_nbytes = checkpoint.tensors[part.stored.tensor].row_nbytes
    raw = checkpoint.read(part.stored.tensor, part.stored.row * row_nbytes, part.nbytes)
    return as_tensor(memoryview(raw), part.dtype).clone().view(part.shape)


def _add_lora(state: dict[str, Tensor], lora: WeightedLora, model: Input) -> None:
    """Add a LoRA of any spelling at its strength to the weights, in float32 with one rounding."""
    with open_lora(lora.path, anatomy=model.anatomy) as file:
        require_lora(file, model.name)
        for name, part in anatomy_of(file, model.anatomy, model.checkpoint).parts.items():
            weight, rows = state[name], part.encoding
            assert rows is not None
            change = torch.from_numpy(rows.values(file.checkpoint.read)).view(weight.shape)
            strength = 1.0 if isinstance(rows, WholeRows) else lora.strength
            state[name] = (weight.float() + strength * change).to(weight.dtype)


def _state(weights: ComponentWeights, wanted: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a module, each in the shape that the module has."""
    return {
        name: whole(weights.file, weights.names[name], weights.encodings.get(weights.names[name]))
        .to(dtype)
        .view(tensor.shape)
        for name, tensor in wanted.items()
    }


def whole(file: Checkpoint, name: str, encoding: Encoding | None = None) -> Tensor:
    """A tensor of a file in memory of its own, in its stored dtype or dequantised to float32."""
    if encoding is not None:
        return torch.from_numpy(encoding.values(file.read)).view(encoding.shape)
    info = file.tensors[name]
    raw = file.read(name)  # by name: the tensor over it does not keep it alive
    return as_tensor(memoryview(raw), info.dtype).clone().view(info.shape)


def load_text_encoder(components: Components, *, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The text encoder and its tokenizer. Raises DataError when the files do not hold them, whole and nothing else."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    folder = config_folder(components.text_encoder, "text_encoder")
    with opened_text_encoder(components) as weights, quiet(), readable(components.text_encoder, "text encoder"):
        config = AutoConfig.from_pretrained(folder, **_LOCAL)
        with torch.device("meta"):
            encoder = AutoModel.from_config(config)
        encoder.load_state_dict(_state(weights, encoder.state_dict(), dtype), assign=True)
        # What is not stored, the rotary frequencies, is computed by the constructor; on "meta" it has no values.
        encoder.rotary_emb = type(encoder.rotary_emb)(config=config)
    with quiet(), readable(components.tokenizer, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(components.tokenizer, **_LOCAL)
    if tokenizer.chat_template is None:
        raise DataError(
            f'"{components.tokenizer}" has no chat template; take the tokenizer of the model\'s own repository.'
        )
    return encoder.eval().requires_grad_(False), tokenizer


def load_vae(components: Components, *, dtype: torch.dtype) -> AutoencoderKL:
    """The VAE, from a diffusers folder or a single file. Raises DataError when the file does not hold it, whole and nothing else."""
    from diffusers import AutoencoderKL

    with opened_vae(components) as weights, quiet(), readable(components.vae, "VAE"):
        with torch.device("meta"):
            vae = AutoencoderKL.from_config(AutoencoderKL.load_config(config_folder(components.vae, "vae")))
        vae.load_state_dict(_state(weights, vae.state_dict(), dtype), assign=True)
    return vae.eval().requires_grad_(False)


@contextmanager
def readable(path: Path, part: str) -> Iterator[None]:
    """Turn the libraries' exceptions for a wrong folder into one sentence."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise DataError(f'"{path}" is not a readable {part} ({reason}).') from None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' advice and progress bars inside the block."""
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
