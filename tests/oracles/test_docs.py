"""docs/explanation/oracles.md says how much was compared: the numbers are those of the tests."""

from __future__ import annotations

import json
import re
from pathlib import Path

from mergetool import models
from mergetool.arch.families.z_image import REFERENCE_CONFIG, reference_shapes
from tests.adapters.files import FILES
from tests.families import TINY
from tests.oracles import test_comfyui_faults as faults
from tests.oracles import test_comfyui_loading as loading
from tests.oracles import test_comfyui_loras as loras
from tests.oracles import test_comfyui_merging as merging
from tests.oracles import test_comfyui_quantised as quantised
from tests.oracles.case import Case
from tests.oracles.families import CASES
from tests.oracles.fetching import COMFYUI, PACKAGES, SDIST

PAGE = (Path(__file__).parents[2] / "docs" / "explanation" / "oracles.md").read_text(encoding="utf-8")


def cases(test: object) -> int:
    """How often a parametrised test runs, fixtures' parameters apart."""
    count = 1
    for mark in test.pytestmark:  # type: ignore[attr-defined]
        if mark.name == "parametrize":
            count *= len(mark.args[1])
    return count


def test_the_numbers_of_comparisons_are_those_of_the_tests() -> None:
    small = len(reference_shapes(TINY, "comfyui"))
    config = json.loads((models.EMBEDDED / "base" / "transformer" / "config.json").read_text())
    embedded = len(reference_shapes(config, "comfyui"))
    counted = {
        "models that `convert` writes": (cases(loading.test_comfyui_loads_what_convert_writes), small),
        "models that `merge` writes": (cases(loading.test_comfyui_loads_what_merge_writes), small),
        "the embedded models": (cases(loading.test_comfyui_loads_the_embedded_models), embedded),
        "a whole Z-Image": (
            cases(loading.test_comfyui_takes_a_whole_z_image_by_its_names_and_shapes),
            len(reference_shapes(REFERENCE_CONFIG, "comfyui")),
        ),
        "a forward pass": (1, embedded),
        "spellings of LoRAs": (len(FILES), small),
        "every name": (cases(loras.test_every_name_that_comfyui_knows_means_the_same_rows), small),
        "LoRAs of every kind": (cases(loras.test_comfyui_adds_what_bake_adds), small),
        "LoRAs that": (cases(loras.test_comfyui_adds_what_convert_writes) + 2, small),
        "DoRA": (
            cases(loras.test_comfyui_adds_the_dora_of_inputs_that_bake_adds)
            + cases(loras.test_comfyui_divides_the_dora_of_outputs_by_the_weights_own_norm),
            small,
        ),
        "convolutions": (cases(loras.test_comfyui_adds_to_convolutions_what_bake_adds), len(loras.CONV)),
        "quantised files": (cases(quantised.test_mergetool_reads_what_comfyui_reads), small),
        "quantised models": (cases(quantised.test_mergetool_reads_what_comfyui_saves_of_a_quantised_model), small),
        "old scaled FP8": (cases(quantised.test_mergetool_reads_old_scaled_fp8_as_comfyui_does), small),
        "`ModelMergeSubtract`": (2 * cases(merging.test_merge_is_what_comfyuis_nodes_make), small),
        "`ModelSave`": (2, small),
        "`LoraSave`": (cases(merging.test_what_lorasave_writes_is_baked_as_comfyui_adds_it), small),
        "faults": (
            cases(faults.test_a_fault_in_a_model_is_reported) + cases(faults.test_a_fault_in_a_lora_is_reported) + 1,
            small,
        ),
    }
    rows = [
        (what, (int(n), int(p))) for what, n, p in re.findall(r"^\| (.+?) \| (\d+) \| (\d+) \|", PAGE, re.MULTILINE)
    ]
    assert [
        (start, numbers)
        for (start, numbers), (what, _) in zip(counted.items(), rows, strict=True)
        if what.startswith(start)
    ] == [(start, numbers) for start, (_, numbers) in zip(counted, rows, strict=True)]


def test_the_counts_of_families_are_those_of_the_tests() -> None:
    rows = re.findall(
        r"^\| (\S[^|]*?) \((.+?)\) \| (\d+), (\d+) \| (\d+) \| (\d+), (\d+), (\d+) \|$", PAGE, re.MULTILINE
    )
    counted = [
        (name, size, *(str(len(case.shapes(layout, sizes))) for layout in ("comfyui", "diffusers")), str(len(case.spellings)), *loaded(case))
        for name, case in CASES.items()
        for size, sizes in case.published.items()
    ]  # fmt: skip
    assert rows == counted


def loaded(case: Case) -> tuple[str, str, str]:
    """How many modules ``diff`` writes and each program loads, or the test of it fails; diffusers none of a small Lumina-Image 2."""
    names = [
        name
        for name, shape in case.shapes("diffusers").items()
        if len(shape) in case.dimensions and name.endswith(".weight") and name not in case.in_full
    ]
    return str(len(names)), str(len(case.mapped(names))), "0" if case.has_one_width else str(case.matrices)


def test_the_versions_are_those_that_are_fetched() -> None:
    assert f"| ComfyUI | {COMFYUI}," in PAGE
    for pinned in [SDIST.split()[0], *PACKAGES[:-1]]:
        name, version = pinned.split("==")
        assert re.search(rf"{name}`? {re.escape(version)}", PAGE), pinned
