"""The transformer for a batch of latents of one size and captions of one padded length, without diffusers' lists of samples.

It computes what ``ZImageTransformer2DModel.forward`` computes, from the model's own parameters (a test compares the two). Gradients
flow. A training step takes 0.46 s of one core with compiled blocks and 0.68 s without, where the transformer's own forward takes 1.0 s.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor
from torch.nn import functional

MULTIPLE = 32
"""The transformer fills captions and pictures up to multiples of so many tokens, with its pad tokens."""


def compile_blocks() -> None:
    """From now on in this process the blocks run as compiled code, which takes a minute or two to make the first time."""
    global _block
    torch._dynamo.config.cache_size_limit = 64
    _block = torch.compile(_block, dynamic=False)  # type: ignore[assignment]


@cache
def _positions(captions: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Position ids of the caption's tokens and of the picture's, int [tokens, 3], as diffusers numbers them."""
    caption = torch.zeros(captions, 3, dtype=torch.long)
    caption[:, 0] = torch.arange(1, captions + 1)
    picture = torch.zeros(rows * columns + (-rows * columns) % MULTIPLE, 3, dtype=torch.long)
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    picture[: len(grid), 0] = captions + 1
    picture[: len(grid), 1:] = grid
    return caption, picture


def _rotations(model: ZImageTransformer2DModel, ids: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [tokens, 1, head / 2] of the rotary embedding."""
    turns = model.rope_embedder(ids.to(device))
    return turns.real.unsqueeze(1).contiguous(), turns.imag.unsqueeze(1).contiguous()


def _rotated(states: Tensor, rotations: tuple[Tensor, Tensor]) -> Tensor:
    cosine, sine = rotations
    even, odd = states.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), -1).flatten(-2)


def _norm(states: Tensor, module: torch.nn.Module) -> Tensor:
    return functional.rms_norm(states.float(), (states.shape[-1],), module.weight, module.eps)


def _attention(attention: torch.nn.Module, states: Tensor, rotations: tuple[Tensor, Tensor]) -> Tensor:
    heads = (attention.heads, -1)
    query = _rotated(_norm(attention.to_q(states).unflatten(-1, heads), attention.norm_q), rotations)
    key = _rotated(_norm(attention.to_k(states).unflatten(-1, heads), attention.norm_k), rotations)
    value = attention.to_v(states).unflatten(-1, heads)
    query, key, value = (part.to(value.dtype).transpose(1, 2) for part in (query, key, value))
    # Written out: the fused kernel's backward takes two fifths of a step on a CPU at this size.
    weights = (query @ key.mT * query.shape[-1] ** -0.5).float().softmax(-1).to(value.dtype)
    return attention.to_out[0]((weights @ value).transpose(1, 2).flatten(2))


def _block(block: torch.nn.Module, states: Tensor, rotations: tuple[Tensor, Tensor], time: Tensor | None) -> Tensor:
    if time is None:
        states = states + _norm(
            _attention(block.attention, _norm(states, block.attention_norm1), rotations), block.attention_norm2
        )
        forward = block.feed_forward(_norm(states, block.ffn_norm1))
        return states + _norm(forward, block.ffn_norm2)
    scale, gate, scale_forward, gate_forward = block.adaLN_modulation(time).float().unsqueeze(1).chunk(4, dim=2)
    attended = _attention(block.attention, _norm(states, block.attention_norm1) * (1 + scale), rotations)
    states = states + gate.tanh() * _norm(attended, block.attention_norm2)
    forward = block.feed_forward(_norm(states, block.ffn_norm1) * (1 + scale_forward))
    return states + gate_forward.tanh() * _norm(forward, block.ffn_norm2)


def context(model: ZImageTransformer2DModel, captions: Tensor, known: Tensor) -> Tensor:
    """Captions [n, tokens, text width], real where ``known`` [n, tokens], through the caption path: [n, tokens, width].

    ``tokens`` is a multiple of MULTIPLE, the least that holds each caption.
    """
    states = torch.where(
        known.unsqueeze(-1), model.cap_embedder[1](_norm(captions, model.cap_embedder[0])).float(), model.cap_pad_token
    )
    rotations = _rotations(model, _positions(captions.shape[1], 1, 1)[0], captions.device)
    for block in model.context_refiner:
        states = _block(block, states, rotations, None)
    return states


def velocity(model: ZImageTransformer2DModel, latents: Tensor, time: Tensor, refined: Tensor) -> Tensor:
    """x0 - noise as the transformer sees it, float32 like ``latents`` [n, channels, height, width]; ``refined`` is what `context` made."""
    count, channels, height, width = latents.shape
    rows, columns = height // 2, width // 2
    tokens = rows * columns
    patches = latents.view(count, channels, rows, 2, columns, 2).permute(0, 2, 4, 3, 5, 1).reshape(count, tokens, -1)
    states = model.all_x_embedder["2-1"](patches).float()
    if tokens % MULTIPLE:
        states = torch.cat([states, model.x_pad_token.expand(count, -tokens % MULTIPLE, -1)], 1)
    embedded = model.t_embedder(time * model.t_scale).float()
    caption_ids, picture_ids = _positions(refined.shape[1], rows, columns)
    rotations = _rotations(model, picture_ids, latents.device)
    for block in model.noise_refiner:
        states = _block(block, states, rotations, embedded)
    rotations = _rotations(model, torch.cat([picture_ids, caption_ids]), latents.device)
    states = torch.cat([states, refined.float()], 1)
    for block in model.layers:
        states = _block(block, states, rotations, embedded)
    final = model.all_final_layer["2-1"]
    scale = 1 + final.adaLN_modulation(embedded).float().unsqueeze(1)
    found = final.linear(final.norm_final(states[:, :tokens]) * scale).float()
    return found.view(count, rows, columns, 2, 2, channels).permute(0, 5, 1, 3, 2, 4).reshape(latents.shape)


def use(model: ZImageTransformer2DModel) -> None:
    """Let a model on the CPU answer its calls by what is above, with matrix products in BF16.

    A picture takes 1.6 ms of one core an evaluation with compiled blocks, in place of 4.1 ms. Captions of a call must fill up to one length: where they
    do not, the model answers as it did.
    """
    own = model.forward

    def forward(x: Sequence[Tensor], t: Tensor, cap_feats: Sequence[Tensor], **rest: object) -> tuple[list[Tensor]]:
        filled = {-(-len(caption) // MULTIPLE) * MULTIPLE for caption in cap_feats}
        if len(filled) > 1:
            answer: tuple[list[Tensor]] = own(x, t, cap_feats, **rest)
            return answer
        captions = torch.zeros(len(cap_feats), filled.pop(), cap_feats[0].shape[1])
        known = torch.zeros(captions.shape[:2], dtype=torch.bool)
        for row, caption in enumerate(cap_feats):
            captions[row, : len(caption)] = caption
            known[row, : len(caption)] = True
        with torch.autocast("cpu", torch.bfloat16):
            found = velocity(model, torch.cat(list(x), 1).transpose(0, 1), t, context(model, captions, known))
        return (list(found.unsqueeze(2)),)

    model.forward = forward
