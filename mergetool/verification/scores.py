"""Score how well pictures fit prompts, by a CLIP model of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from mergetool.errors import DataError, InputMissing
from mergetool.sampler.request import Pictures
from mergetool.verification.pictures import Scorer


def clip_scorer(folder: Path) -> Scorer:
    """Make a scorer by cosine similarity, -1 to 1, of picture and prompt.

    ``folder`` has the CLIP model as transformers saves one. After Hessel et al. 2021 (CLIPScore), without its factor of 2.5 and without
    clipping at 0. Raises InputMissing or DataError for a folder that holds none.
    """
    from transformers import CLIPModel, CLIPProcessor

    if not folder.is_dir():
        raise InputMissing(f'`clip` "{folder}" is no folder; name one with a CLIP model as transformers saves it.')
    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise DataError(f'"{folder}" is not a readable CLIP model ({reason}).') from None

    @torch.no_grad()
    def scores(pictures: Sequence[Pictures], prompts: Sequence[str]) -> list[float]:
        similarities = []
        for picture, prompt in zip(pictures, prompts, strict=True):
            inputs = processor(text=[prompt], images=[picture], return_tensors="pt", padding=True, truncation=True)
            outputs = model(**inputs)
            similarities.append(float(torch.cosine_similarity(outputs.image_embeds, outputs.text_embeds)[0]))
        return similarities

    return scores
