"""Every family that is known by name, as the oracles are asked for it."""

from __future__ import annotations

from collections.abc import Mapping

from tests.adapters import chroma, flux, flux2, lumina2, qwen_image, sd3, unets, wan, z_image
from tests.oracles.case import Case

CASES: Mapping[str, Case] = {
    case.family.name: case
    for case in (
        *(qwen_image.CASE, chroma.CASE, flux2.CASE, sd3.CASE, lumina2.CASE),
        *(flux.CASE, wan.CASE, z_image.CASE, unets.SDXL, unets.SD15),
    )
}
