"""How far two members lie apart: ``python -m training.parting base turbo [--attempt 1]``.

For each group of tensors the norm of the difference over the norm of the first member's, and the mean cosine of the states that
enter the first main layer, token by token, for the same latents, noise levels and captions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor
from torch.nn import functional

from training import measuring, models, sampling

GROUPS = ("noise_refiner", "context_refiner", "cap_", "layers", "all_x_embedder", "all_final_layer", "t_embedder")
INPUTS = 32


def distances(one: ZImageTransformer2DModel, other: ZImageTransformer2DModel) -> dict[str, float]:
    """Relative distance by group of tensors."""
    state, compared = one.state_dict(), other.state_dict()
    found = {}
    for group in GROUPS:
        names = [name for name in state if name.startswith(group)]
        moved = sum(float((state[name] - compared[name]).square().sum()) for name in names)
        found[group] = round((moved / sum(float(state[name].square().sum()) for name in names)) ** 0.5, 4)
    return found


@torch.no_grad()
def entering(model: ZImageTransformer2DModel, reader: sampling.Reader) -> tuple[Tensor, Tensor]:
    """States of pictures' and of captions' tokens that enter the first main layer [n, tokens, width]."""
    scenes = measuring.scenes(INPUTS)
    latents = sampling.noise(INPUTS, (64, 64), torch.Generator().manual_seed(12))
    states, known = reader.many([scene.prompt for scene in scenes])
    captions = [state[real] for state, real in zip(states, known, strict=True)]
    seen: list[Tensor] = []
    hook = model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model([latent.unsqueeze(1) for latent in latents], torch.linspace(0, 0.9, INPUTS), captions, return_dict=False)
    hook.remove()
    return seen[0][:, :64], seen[0][:, 64:]


def parting(stored: models.Attempt, one: str, other: str) -> dict[str, object]:
    reader = sampling.Reader(stored.tokenizer(), stored.text_encoder())
    first, second = stored.transformer(one).eval(), stored.transformer(other).eval()
    pairs = zip(("picture", "caption"), entering(first, reader), entering(second, reader), strict=True)
    cosines = {kind: round(float(functional.cosine_similarity(a, b, dim=-1).mean()), 4) for kind, a, b in pairs}
    return {"distance": distances(first, second), "cosine of states entering layers": cosines}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("one")
    parser.add_argument("other")
    parser.add_argument("--attempt", type=int, default=1)
    options = parser.parse_args(arguments)
    stored = models.Attempt(Path(__file__).parent / "members" / str(options.attempt))
    print(json.dumps(parting(stored, options.one, options.other), indent=1))


if __name__ == "__main__":
    main()
