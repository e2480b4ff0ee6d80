"""Prompts in, pictures out: stages over shared parts, one large module in memory at a time.

studio = Studio(Components.find("lab.base"))
shots = [Shot("a blue circle on a gold background", seed=7)]
latents = studio.first_stage(Stage("lab.base", steps=30, guidance=3.0, shift=6.0), shots, (64, 64))
latents = studio.second_stage(Refinement("lab.turbo", steps=4, shift=3.0, strength=0.15), shots, latents)
studio.decode(latents)                                   # uint8 [1, 64, 64, 3]
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor

from mergetool.errors import DataError, NonFiniteError, UsageError
from mergetool.sampler import load
from mergetool.sampler.denoise import bring_to, denoise, starting_noise
from mergetool.sampler.parts import Components
from mergetool.sampler.request import Pictures, Refinement, Shot, Stage, StepCounter

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, ZImageTransformer2DModel


TOKENS_AT_ONCE = 4096
"""Pictures are sampled together up to this many latent tokens: 64 of the embedded models, one of 1024 x 1024."""

MAX_CAPTION = 512
"""Tokens of a prompt that are read; diffusers' limit for Z-Image."""

CAPTION_UNIT = 32
"""Captions are padded to multiples of this, and the picture's positions come after them."""


@dataclass
class Studio:
    """The parts that both stages share, and the device and dtype all run in.

    The text encoder, each transformer and the VAE are loaded when they are needed; on a GPU only one is there at a time.
    """

    components: Components
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    notes: list[str] = field(default_factory=list)
    _captions: dict[str, Tensor] = field(default_factory=dict)
    _vae: AutoencoderKL | None = None
    _transformer: tuple[Stage, ZImageTransformer2DModel] | None = None

    # ---- text

    def captions(self, prompts: Sequence[str]) -> list[Tensor]:
        """Encode each prompt once to the transformer's caption, [tokens, width].

        A prompt of more than MAX_CAPTION tokens is cut, and ``notes`` says so. Raises NonFiniteError for a caption with NaN.
        """
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._captions]
        if new:
            self._release()
            encoder, tokenizer = load.load_text_encoder(self.components, dtype=self.dtype)
            encoder.to(self.device)
            for start in range(0, len(new), 32):
                part = new[start : start + 32]
                self._captions |= zip(part, self._encode(encoder, tokenizer, part), strict=True)
            del encoder
            self._collect()
        return [self._captions[prompt] for prompt in prompts]

    @torch.no_grad()
    def _encode(
        self, encoder: torch.nn.Module, tokenizer: Callable[..., object], prompts: Sequence[str]
    ) -> list[Tensor]:
        try:
            texts = [
                tokenizer.apply_chat_template(  # type: ignore[attr-defined]
                    [{"role": "user", "content": prompt}],
                    tokenize=False,
                    add_generation_prompt=True,
                    enable_thinking=True,
                )
                for prompt in prompts
            ]
        except TemplateError as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise DataError(
                f'"{self.components.tokenizer}" has a chat template that cannot be used ({reason}); '
                "take the tokenizer of the model's own repository."
            ) from None
        for prompt, tokens in zip(prompts, tokenizer(texts).input_ids, strict=True):  # type: ignore[attr-defined]
            if len(tokens) > MAX_CAPTION:
                self.notes.append(
                    f'of the {len(tokens)} tokens of the prompt "{prompt[:30]}..." the first {MAX_CAPTION} are read, as by diffusers; ComfyUI reads all.'
                )
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=MAX_CAPTION, return_tensors="pt")
        mask = inputs.attention_mask.bool().to(self.device)  # type: ignore[attr-defined]
        states = encoder(
            input_ids=inputs.input_ids.to(self.device),  # type: ignore[attr-defined]
            attention_mask=mask,
            output_hidden_states=True,
        ).hidden_states[-2]
        for prompt, state in zip(prompts, states, strict=True):
            if not torch.isfinite(state).all():
                raise NonFiniteError(
                    f'the text encoder "{self.components.text_encoder}" makes NaN or infinity of "{prompt[:30]}"; '
                    "get its files again, or run it with `dtype=fp32`."
                )
        return [state[kept] for state, kept in zip(states, mask, strict=True)]

    # ---- pictures

    @property
    def vae(self) -> AutoencoderKL:
        """The VAE, on the CPU until it is used."""
        if self._vae is None:
            self._vae = load.load_vae(self.components, dtype=self.dtype)
        return self._vae

    @property
    def reduction(self) -> int:
        """Pixels a side of one latent."""
        return self.components.vae_config.reduction

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Pictures:
        """Pictures uint8 [n, height, width, 3] of scaled latents. Raises NonFiniteError for one with NaN, and for a black one."""
        self._release()
        vae = self.vae.to(self.device)
        made = []
        for latent in torch.split(latents, _together(*latents.shape[2:])):
            unscaled = latent.to(self.device, self.dtype) / vae.config.scaling_factor + vae.config.shift_factor
            picture = vae.decode(unscaled, return_dict=False)[0].float().cpu()
            self._require_picture(picture, latent)
            # As diffusers' image processor does it: to 0..1, clamped, and rounded.
            made.append(((picture / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8))
        vae.to("cpu")
        return np.concatenate(made)

    def _require_picture(self, picture: Tensor, latents: Tensor) -> None:
        where = f'the VAE "{self.components.vae}"'
        spread = float(latents.std())
        if not torch.isfinite(picture).all():
            fault = f"{where} makes NaN or infinity of finite latents"
        elif bool((picture.flatten(1).amax(1) <= -1).any()):
            fault = f"{where} makes a black picture of the latents"
        else:
            return
        raise NonFiniteError(
            f"{fault}, whose standard deviation is {spread:.3g} where 0.5 to 2 is usual: "
            f"{'the transformer made them so; take fewer or weaker changes' if spread > 5 else 'get its files again, or name another with `vae`'}."
        )

    @torch.no_grad()
    def encode(self, pictures: Pictures) -> Tensor:
        """Encode pictures uint8 [n, height, width, 3] as scaled latents float32.

        They are the means of the VAE's posterior.
        """
        self._release()
        vae = self.vae.to(self.device)
        made = []
        height, width = (side // self.reduction for side in pictures.shape[1:3])
        for picture in torch.split(torch.from_numpy(pictures), _together(height, width)):
            wanted = picture.permute(0, 3, 1, 2).to(self.device).float() / 127.5 - 1
            posterior = vae.encode(wanted.to(self.dtype), return_dict=False)[0]
            made.append((posterior.mode().float() - vae.config.shift_factor) * vae.config.scaling_factor)
        vae.to("cpu")
        return torch.cat(made).cpu()

    # ---- stages

    def first_stage(
        self, stage: Stage, shots: Sequence[Shot], size: tuple[int, int], *, progress: StepCounter = lambda _: None
    ) -> Tensor:
        """Make the latents float32 of every shot from pure noise.

        The pictures have ``size`` = (width, height) pixels.

        Raises UsageError for a size that the model has no whole tokens for; see also `load.load_transformer`.
        """
        channels = int(self.vae.config.latent_channels)
        noise = starting_noise([shot.seed for shot in shots], (channels, *self.latent_size(size)))
        return self._run(stage, [shot.prompt for shot in shots], [shot.seed for shot in shots], shots, noise, progress)

    def second_stage(
        self, stage: Refinement, shots: Sequence[Shot], latents: Tensor, *, progress: StepCounter = lambda _: None
    ) -> Tensor:
        """Bring the shots' ``latents`` to the stage's level, and denoise them.

        The level is that of its strength; its model denoises.
        """
        seeds = [shot.second_seed for shot in shots]
        noise = starting_noise(seeds, (latents.shape[1], latents.shape[2], latents.shape[3]))
        noised = bring_to(latents, noise, stage.levels()[0])
        return self._run(stage, [shot.second_prompt for shot in shots], seeds, shots, noised, progress)

    def _run(
        self,
        stage: Stage,
        prompts: Sequence[str],
        seeds: Sequence[int],
        shots: Sequence[Shot],
        start: Tensor,
        progress: StepCounter,
    ) -> Tensor:
        captions = self.captions(prompts)
        negatives = self.captions([shot.negative for shot in shots]) if stage.guidance != 0 else captions
        transformer = self._load(stage)
        for prompt, caption in zip(
            [*prompts, *(shot.negative for shot in shots)], [*captions, *negatives], strict=False
        ):
            most = transformer.config.axes_lens[0] - CAPTION_UNIT
            if len(caption) > most:
                raise UsageError(
                    f'the prompt "{prompt[:30]}..." has {len(caption)} tokens, {stage.model} reads {most} at most: shorten it.'
                )
        made = []
        together = _together(*start.shape[2:])
        for begin in range(0, len(shots), together):
            part = slice(begin, begin + together)
            made.append(
                denoise(
                    transformer,
                    stage,
                    start[part].to(self.device),
                    captions[part],
                    negatives[part],
                    seeds[part],
                    step_done=functools.partial(progress, len(start[part])),
                ).cpu()
            )
        return torch.cat(made)

    def latent_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The (rows, columns) of latents for a picture of ``size`` = (width, height).

        Raises UsageError where they are not whole tokens.
        """
        unit = 2 * self.reduction
        for side in size:
            if side < unit or side % unit:
                raise UsageError(f"`size={size[0]}x{size[1]}`: both sides are multiples of {unit} for this model.")
        return size[1] // self.reduction, size[0] // self.reduction

    # ---- memory

    def _load(self, stage: Stage) -> ZImageTransformer2DModel:
        """The stage's transformer; kept until another module needs the memory."""
        if self._transformer is None or (self._transformer[0].model, self._transformer[0].loras) != (
            stage.model,
            stage.loras,
        ):
            self._release()
            built = load.load_transformer(stage.model, dtype=self.dtype, device=self.device, loras=stage.loras)
            self._transformer = (stage, built)
        return self._transformer[1]

    def _release(self) -> None:
        """Let go of the transformer where memory is dear; a small one on the CPU stays."""
        if self._transformer is None:
            return
        small = sum(parameter.numel() for parameter in self._transformer[1].parameters()) < 100_000_000
        if not small:
            self._transformer = None
            self._collect()

    def _collect(self) -> None:
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()


def dtype_of(name: str) -> torch.dtype:
    return torch.bfloat16 if name == "bf16" else torch.float32


def _together(height: int, width: int) -> int:
    """The number of latents of this size that go through a model at once; a token is 2 x 2 of their values."""
    return max(1, TOKENS_AT_ONCE // max(1, height * width // 4))
