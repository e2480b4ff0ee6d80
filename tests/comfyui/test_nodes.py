"""The nodes without ComfyUI: what loading them costs, and the texts that travel along links. The server's tests are in test_server."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction
from typing import Any

import pytest

import mergetool.comfyui
from mergetool.api.merges import Merge
from mergetool.comfyui import host, links, widgets
from mergetool.errors import UsageError


def declared_inputs(cls: Any) -> dict[str, Any]:
    """Name -> type and options of a node's INPUT_TYPES."""
    types = cls.INPUT_TYPES()
    return {**types.get("required", {}), **types.get("optional", {})}


@pytest.mark.parametrize("name", mergetool.comfyui.NODE_CLASS_MAPPINGS)
def test_every_node_declares_what_comfyui_asks_for(name: str) -> None:
    cls: Any = mergetool.comfyui.NODE_CLASS_MAPPINGS[name]
    assert name.startswith("Mergetool")
    assert callable(getattr(cls, cls.FUNCTION))
    assert len(cls.RETURN_NAMES) == len(cls.RETURN_TYPES)
    json.dumps(declared_inputs(cls), allow_nan=False)  # what the page is sent


def test_a_file_of_one_line_does_as_well() -> None:
    (line,) = (line.strip() for line in (mergetool.comfyui.__doc__ or "").splitlines() if "import NODE_CLASS" in line)
    module: dict[str, Any] = {}
    exec(line, module)
    assert module["NODE_CLASS_MAPPINGS"] is mergetool.comfyui.NODE_CLASS_MAPPINGS
    assert module["NODE_DISPLAY_NAME_MAPPINGS"] is mergetool.comfyui.NODE_DISPLAY_NAME_MAPPINGS


@pytest.mark.parametrize(
    ("sentence", "at_a_node"),
    [
        ("it exists; use `overwrite`.", "it exists; use overwrite."),
        ("leave `rounding=stochastic` out", "leave rounding stochastic out"),
        ("see `mergetool diff --help`", "see `mergetool diff --help`"),
        ("a--b is no file", "a--b is no file"),
    ],
)
def test_an_error_calls_options_as_nodes_do(sentence: str, at_a_node: str) -> None:
    assert host.spelled(sentence) == at_a_node


def test_without_comfyui_files_are_named_by_text() -> None:
    assert declared_inputs(mergetool.comfyui.NODE_CLASS_MAPPINGS["MergetoolModelFile"])["file"][0] == "STRING"


def test_loading_the_nodes_imports_neither_torch_nor_anything_of_comfyui() -> None:
    code = "import sys, mergetool.comfyui; print([m for m in sys.modules if m.split('.')[0] in ('torch', 'comfy', 'folder_paths')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("a + 20 * (b - c)", "'x y' + 20 * ((m + n) - q)"),
        ("a+'a'*0.5-lab.a*0.5", "'x y'+'a'*0.5-lab.a*0.5"),
        ("ties(a - b, c - b, density=0.2)", "ties('x y' - (m + n), q - (m + n), density=0.2)"),
        ("'é' + a", "'é' + 'x y'"),
        ("d + a", "d + 'x y'"),
        ("a.x + a(b)", "a.x + a((m + n))"),
        ("a +", "a +"),
    ],
)
def test_linked_models_take_the_place_of_their_names(text: str, filled: str) -> None:
    assert links.filled(text, {"a": "'x y'", "b": "m + n", "c": "q"}) == filled


@pytest.mark.parametrize(
    ("multiplier", "text"),
    [(1.0, "m + a"), (171.15, "m + 171.15*a"), (-0.5, "m + (-0.5)*a"), (1e-7, "m + 0.0000001*a")],
)
def test_multipliers_are_written_exactly(multiplier: float, text: str) -> None:
    assert links.total("m", "a", multiplier) == text


@pytest.mark.parametrize("multiplier", [float("nan"), float("inf")])
def test_a_multiplier_that_is_no_number_is_refused(multiplier: float) -> None:
    with pytest.raises(UsageError, match="not a finite number"):
        links.difference("a", "b", multiplier)


def save() -> dict[str, Any]:
    return declared_inputs(mergetool.comfyui.NODE_CLASS_MAPPINGS["MergetoolSave"])


def test_what_is_not_in_daily_use_is_advanced() -> None:
    advanced = {name for name, (_, how) in save().items() if how.get("advanced")}
    assert {"threads", "reader", "gpu_memory", "prefix", "shard_size"} <= advanced
    assert advanced.isdisjoint({"protect", "multipliers", "dtype", "seed", "overwrite", "output"})


def test_a_seed_is_a_text_since_a_browser_has_no_numbers_so_large() -> None:
    assert save()["seed"][:1] == ("STRING",)
    assert (
        widgets.request(Merge, {"expression": "a", "rounding": "stochastic", "seed": str(2**64 - 1)}).seed == 2**64 - 1
    )


@pytest.mark.parametrize(
    ("held", "wanted"),
    [
        ({"protect": "refiner\n pad \n\n"}, {"protect": ("refiner", "pad")}),
        ({"protect": ""}, {"protect": ()}),
        ({"multipliers": "layers=0.5"}, {"settings": (("layers", Fraction(1, 2)),)}),
        ({"dtype": "the anchor's"}, {"dtype": None}),
        ({"quant": "none"}, {"quant": None}),
        ({"quant": "int8"}, {"quant": "int8"}),
        ({"prefix": ""}, {"prefix": ""}),
        ({"prefix": "the anchor's"}, {"prefix": None}),
        ({"threads": ""}, {"threads": None}),
        ({"threads": "2"}, {"threads": 2}),
        ({"shard_size": "5GB"}, {"shard_bytes": 5 * 10**9}),
        ({"folder": "output"}, {}),
    ],
)
def test_what_widgets_hold_is_what_is_asked(held: dict[str, Any], wanted: dict[str, Any]) -> None:
    asked = widgets.request(Merge, {"expression": "a", **held})
    assert {name: getattr(asked, name) for name in wanted} == wanted


def test_what_is_linked_is_not_judged_before_it_is_known() -> None:
    node: Any = mergetool.comfyui.NODE_CLASS_MAPPINGS["MergetoolSave"]
    held = {"expression": None, "output": "x.safetensors", "folder": "output"}
    assert node.VALIDATE_INPUTS(**held, seed="3", rounding=None) is True
    assert "draws no random numbers" in node.VALIDATE_INPUTS(**held, seed="3", rounding="nearest")
    assert "a whole number" in node.VALIDATE_INPUTS(**held, seed="many", rounding=None)
