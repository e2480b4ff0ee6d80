"""The curves of block-weight tools, against figures of the list that supermerger publishes."""

from __future__ import annotations

import pytest

from mergetool.arch import recognise, select
from mergetool.arch.families.block_weights import weights
from mergetool.arch.families.sd15 import SD15
from mergetool.arch.families.sdxl import SDXL_UNET
from mergetool.arch.known import KnownFamily
from mergetool.errors import UsageError
from mergetool.options.multipliers import parse_setting
from mergetool.recipe.groups import resolve
from tests.arch.tables import table
from tests.sdxl import SMALL, shapes

BLOCKS = ["BASE", *(f"IN{n:02}" for n in range(12)), "M00", *(f"OUT{n:02}" for n in range(12))]
COLUMNS = ("BASE", "IN00", "IN01", "IN05", "IN10", "M00", "OUT00", "OUT04", "OUT11")
# Of scripts/mbwpresets_master.txt of hako-mikan/sd-webui-supermerger, 0b1c491: the weights of COLUMNS to six digits, then the sum of all 26.
FIGURES = """
GRAD_V 0 1 0.916667 0.583333 0.166667 0 0.0833333 0.416667 1 13
GRAD_A 0 0 0.0833333 0.416667 0.833333 1 0.916667 0.583333 0 12
FLAT_25 0 0.25 0.25 0.25 0.25 0.25 0.25 0.25 0.25 6.25
FLAT_75 0 0.75 0.75 0.75 0.75 0.75 0.75 0.75 0.75 18.75
WRAP08 0 1 1 0 0 0 0 0 1 8
WRAP12 0 1 1 1 0 0 0 0 1 12
WRAP14 0 1 1 1 0 0 0 0 1 14
WRAP16 0 1 1 1 0 0 0 1 1 16
MID12_50 0 0 0 0.5 0.5 0.5 0.5 0.5 0 7
OUT07 0 0 0 0 0 0 0 0 1 7
OUT12 0 0 0 0 0 0 1 1 1 12
OUT12_5 0 0 0 0 0 0.5 1 1 1 12.5
RING08_SOFT 0 0 0 0.5 0 0 0 1 0 8
RING08_5 0 0 0 0 0 0 0 1 0 8
RING10_5 0 0 0 1 0 0 0 1 0 10
RING10_3 0 0 0 0 1 0 0 1 0 10
SMOOTHSTEP 0 0 0.00506366 0.112124 0.376157 0.5 0.562355 0.794416 1 12.5
REVERSE-SMOOTHSTEP 0 1 0.994936 0.887876 0.623843 0.5 0.437645 0.205584 0 12.5
SMOOTHSTEP*2 0 0 0.0101273 0.224248 0.752315 1 0.875289 0.411169 0 9.02083
R_SMOOTHSTEP*2 0 1 0.989873 0.775752 0.247685 0 0.124711 0.588831 1 15.9792
SMOOTHSTEP*3 0 0 0.015191 0.336372 0.871528 0.5 0.312934 0.383247 1 12.5
R_SMOOTHSTEP*3 0 1 0.984809 0.663628 0.128472 0.5 0.687066 0.616753 0 12.5
SMOOTHSTEP*4 0 0 0.0202546 0.448495 0.49537 0 0.249421 0.822338 0 9.81019
R_SMOOTHSTEP*4 0 1 0.979745 0.551505 0.50463 1 0.750579 0.177662 1 15.1898
SMOOTHSTEP/2 0 0 0.0196759 0.376157 0.925926 1 0.980324 0.623843 0 12
R_SMOOTHSTEP/2 0 1 0.980324 0.623843 0.0740741 0 0.0196759 0.376157 1 13
SMOOTHSTEP/3 0 0 0.0429688 0.683594 0.84375 0.5 0.316406 0.0429688 1 12.5
R_SMOOTHSTEP/3 0 1 0.957031 0.316406 0.15625 0.5 0.683594 0.957031 0 12.5
SMOOTHSTEP/4 0 0 0.0740741 0.925926 0.259259 0 0.0740741 0.925926 0 12
R_SMOOTHSTEP/4 0 1 0.925926 0.0740741 0.740741 1 0.925926 0.0740741 1 13
COSINE 0 1 0.995722 0.896677 0.62941 0.5 0.434737 0.195619 0 12.5
REVERSE_COSINE 0 0 0.00427757 0.103323 0.37059 0.5 0.565263 0.804381 1 12.5
TRUE_CUBIC_HERMITE 0 0 0.199032 0.549992 0.570939 0.520833 0.494388 0.444306 1 12.9792
TRUE_REVERSE_CUBIC_HERMITE 0 1 0.800968 0.450008 0.429061 0.479167 0.505612 0.555694 0 12.0208
FAKE_CUBIC_HERMITE 0 0 0.157576 0.512997 0.544946 0.5 0.476153 0.43574 1 12.5
FAKE_REVERSE_CUBIC_HERMITE 0 1 0.842424 0.487003 0.455054 0.5 0.523847 0.56426 0 12.5
ALL_A 0 0 0 0 0 0 0 0 0 0
ALL_B 1 1 1 1 1 1 1 1 1 26
"""
PUBLISHED = {name: list(map(float, values)) for name, *values in map(str.split, FIGURES.strip().splitlines())}
WIDTHS = {"width0": 32, "width1": 64, "width2": 64, "input": 4, "output": 4}


def small(family: KnownFamily) -> dict[str, tuple[int, ...]]:
    if family is SDXL_UNET:
        return shapes(SMALL, "comfyui")
    stacks = {".".join(s.path[:i]): 1 for s in family.table.spots for i, c in enumerate(s.path) if c == "{i}"}
    return family.shapes(family.derived(WIDTHS | stacks), "comfyui")


def test_every_published_curve_is_there_and_no_other() -> None:
    names = {name.lower().replace("_", "-") for name in PUBLISHED}
    assert weights().keys() == names | {"flat-50"}  # which the list leaves out between 25 and 75


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_curve_has_the_published_figures(name: str) -> None:
    base, along = weights()[name.lower().replace("_", "-")]
    found = dict(zip(BLOCKS, (base, *along), strict=True))
    *figures, total = PUBLISHED[name]
    assert [float(found[block]) for block in COLUMNS] == pytest.approx(figures, abs=2e-6)
    assert float(sum(found.values())) == pytest.approx(total, abs=2e-4)


@pytest.mark.parametrize("family", [SD15, SDXL_UNET], ids=["sd15", "sdxl"])
def test_every_part_of_a_unet_gets_the_weight_of_its_block(family: KnownFamily) -> None:
    """Of the 26 the tool gives SDXL the twenty whose blocks it has. Every fifth curve is asked."""
    anatomy = recognise(table(small(family)), source="f")
    assert anatomy.family is family
    there = [name for name in BLOCKS if any(family.block_name(part) == name for part in anatomy.parts)]
    assert len(there) == (26 if family is SD15 else 20)
    chosen = select(there, anatomy)
    for name, (base, along) in list(weights().items())[::5]:
        found = resolve([parse_setting(f"preset:{name}=1")], anatomy)
        assert found.keys() == anatomy.parts.keys()
        wanted = dict(zip(BLOCKS, (base, *along), strict=True))
        for block, parts in chosen.items():
            assert {found[part] for part in parts} == {wanted[block]}, (name, block)


def test_a_preset_is_found_as_the_tools_write_it() -> None:
    anatomy = recognise(table(small(SD15)), source="f")
    assert resolve([parse_setting("preset:RING08_SOFT")], anatomy) == resolve(
        [parse_setting("preset:ring08-soft")], anatomy
    )
    with pytest.raises(UsageError, match="did you mean preset:ring08-soft"):
        resolve([parse_setting("preset:RING08_SFT")], anatomy)
