"""The nodes as ComfyUI sees them: the folder it loads, what it checks, what workflows compute."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mergetool.comfyui
from mergetool.comfyui import links
from mergetool.errors import UsageError
from tests.cli.run import mergetool as command
from tests.comfyui.executor import Executor, Failure, Host, Prompt, declared_inputs, load
from tests.families import checkpoint

FOLDER = Path(mergetool.comfyui.__file__).parent
WORKFLOWS = sorted(path.name for path in (FOLDER / "workflows").glob("*.json"))


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """ComfyUI's modules over empty folders."""
    found = Host(tmp_path / "ComfyUI")
    for name in ("models/unet", "models/diffusion_models", "models/loras", "output", "custom_nodes"):
        (found.root / name).mkdir(parents=True)
    for name, module in found.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("MERGETOOL_CONFIG_DIR", str(tmp_path / "config"))
    return found


@pytest.fixture
def comfyui(host: Host, monkeypatch: pytest.MonkeyPatch) -> Executor:
    """An executor with the folder of nodes linked into custom_nodes, as docs/comfyui.md says."""
    link = host.root / "custom_nodes" / "mergetool-nodes"
    link.symlink_to(FOLDER)
    before = set(sys.modules)
    module = load(link)
    for name in set(sys.modules) - before:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, name, module) if name.endswith("mergetool-nodes") else None
    assert set(module.NODE_DISPLAY_NAME_MAPPINGS) == set(module.NODE_CLASS_MAPPINGS)
    return Executor(module.NODE_CLASS_MAPPINGS)


def workflow(name: str) -> Prompt:
    return json.loads((FOLDER / "workflows" / name).read_text("utf-8"))


def three_files(host: Host) -> Prompt:
    """bridge-files.json, with the files it names."""
    prompt = workflow("bridge-files.json")
    for seed, node in enumerate("123"):
        checkpoint(host.root / "models" / "diffusion_models" / prompt[node]["inputs"]["file"], variant=seed)
    return prompt


def failure(found: Any) -> Failure:
    assert isinstance(found, Failure), found
    return found


def test_every_node_declares_what_comfyui_asks_for(comfyui: Executor) -> None:
    for name, cls in comfyui.nodes.items():
        assert name.startswith("Mergetool")
        assert callable(getattr(cls, cls.FUNCTION))  # type: ignore[attr-defined]
        assert len(cls.RETURN_NAMES) == len(cls.RETURN_TYPES)  # type: ignore[attr-defined]
        for kind, options, _ in declared_inputs(cls).values():
            assert isinstance(kind, list | str)
            json.dumps([kind, options], allow_nan=False)  # what the page is sent


def test_a_file_of_one_line_does_as_well(host: Host) -> None:
    (line,) = (line.strip() for line in (mergetool.comfyui.__doc__ or "").splitlines() if "import NODE_CLASS" in line)
    stub = host.root / "custom_nodes" / "mergetool_nodes.py"
    stub.write_text(line)
    assert load(stub).NODE_CLASS_MAPPINGS == mergetool.comfyui.NODE_CLASS_MAPPINGS


def test_the_bridge_recipe_is_what_the_command_line_writes(comfyui: Executor, host: Host, tmp_path: Path) -> None:
    outputs = comfyui.run(workflow("bridge.json"))
    assert not isinstance(outputs, Failure), outputs
    merged, lora = Path(outputs["6"][1]), Path(outputs["7"][0])
    assert merged == host.root / "output" / "mergetool" / "striped.safetensors"
    expression = "lab.alkahest + 1.5*(lab.striped - lab.base)"
    ran = command("merge", expression, "--protect", "refiner", "-o", "striped.safetensors", cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert merged.read_bytes() == (tmp_path / "striped.safetensors").read_bytes()
    options = ("--rank-thresh", "0.995", "--exclude", "refiner", "-o", "lora.safetensors")
    ran = command("diff", "--base", "lab.alkahest", "--variant", merged, *options, cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert lora.read_bytes() == (tmp_path / "lora.safetensors").read_bytes()


def test_an_expression_with_groups_and_a_container(comfyui: Executor, tmp_path: Path) -> None:
    outputs = comfyui.run(workflow("expression.json"))
    assert not isinstance(outputs, Failure), outputs
    options = ("--protect", "refiner", "--quant", "fp8-scaled", "--set", "layers=linear(0.5,1)", "--set", "layers.q=2")
    expression = "lab.alkahest + 1.5*(lab.striped - lab.base)"
    ran = command("merge", expression, *options, "-o", "expression.safetensors", cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert Path(outputs["5"][1]).read_bytes() == (tmp_path / "expression.safetensors").read_bytes()
    assert "rounding kept" in comfyui.ui["5"]["text"][0]


def test_a_comparison_chooses_the_multiplier(comfyui: Executor, host: Host, tmp_path: Path) -> None:
    outputs = comfyui.run(workflow("advised.json"))
    assert not isinstance(outputs, Failure), outputs
    multiplier, report = outputs["7"]
    options = ("--onto", "lab.alkahest", "--target", "0.05", "--json")
    advised = command("compare", "lab.base", "lab.striped", *options, cwd=tmp_path).json
    assert multiplier == advised["recommended"]
    assert f"x {multiplier:.4g} for a change of 5 %" in report
    assert f"lab.alkahest + {multiplier}*(lab.striped - lab.base)" in outputs["6"][2]
    assert comfyui.ui["7"]["images"] == [{"filename": "striped.png", "subfolder": "mergetool", "type": "output"}]
    assert (host.root / "output" / "mergetool" / "striped.png").read_bytes().startswith(b"\x89PNG")


def test_models_that_do_not_belong_together_need_force(comfyui: Executor) -> None:
    prompt = workflow("expression.json")
    prompt["4"]["inputs"]["expression"] = "0.5*c + 0.5*a"
    prompt["5"]["inputs"] |= {"protect_refiner": False, "quant": "none"}
    prompt["1"]["inputs"]["model"] = "lab.turbo"
    found = failure(comfyui.run(prompt))
    assert (found.node, found.kind) == ("5", "mergetool.errors.LineageError")
    assert found.message.endswith("turn on force to merge anyway.")
    prompt["5"]["inputs"]["force"] = True
    assert not isinstance(comfyui.run(prompt), Failure)
    assert "error: " in comfyui.ui["5"]["text"][0]


def test_files_are_chosen_from_comfyuis_folders_and_written_there(comfyui: Executor, host: Host) -> None:
    outputs = comfyui.run(three_files(host))
    assert not isinstance(outputs, Failure), outputs
    models = host.root / "models"
    assert (models / "diffusion_models" / "mergetool" / "artshoot-on-alkahest.safetensors").is_file()
    assert (models / "loras" / "mergetool" / "artshoot-for-alkahest.safetensors").is_file()
    assert (
        "mergetool/artshoot-on-alkahest.safetensors" in declared_inputs(comfyui.nodes["MergetoolModelFile"])["file"][0]
    )


def test_progress_reaches_the_end(comfyui: Executor, host: Host) -> None:
    assert not isinstance(comfyui.run(three_files(host)), Failure)
    merging, extracting = host.bars
    for seen in (merging, extracting):
        values = [value for value, _ in seen]
        assert values == sorted(values)
        assert seen[-1][0] == seen[-1][1] > 0


def test_cancelling_leaves_nothing(comfyui: Executor, host: Host) -> None:
    prompt = three_files(host)
    host.interrupt_after = 0
    assert failure(comfyui.run(prompt)).kind.endswith("InterruptProcessingException")
    assert list((host.root / "models" / "diffusion_models" / "mergetool").iterdir()) == []


def test_nothing_runs_again_until_an_input_changes(comfyui: Executor, host: Host) -> None:
    prompt = three_files(host)
    del prompt["7"]
    assert not isinstance(comfyui.run(prompt), Failure)
    comfyui.run(prompt)  # a Save looks once more when its file has appeared
    assert comfyui.ran == ["6"]
    assert "already made of this" in comfyui.ui["6"]["text"][0]
    comfyui.run(prompt)
    assert comfyui.ran == []
    prompt["6"]["inputs"]["name"] = "other.safetensors"
    changed = host.root / "models" / "diffusion_models" / prompt["2"]["inputs"]["file"]
    changed.unlink()
    checkpoint(changed, variant=9)
    outputs = comfyui.run(prompt)
    assert comfyui.ran == ["2", "4", "5", "6"]
    assert not isinstance(outputs, Failure)


def test_a_file_of_another_merge_is_not_replaced_unless_asked(comfyui: Executor, host: Host) -> None:
    prompt = three_files(host)
    del prompt["7"]
    outputs = comfyui.run(prompt)
    assert not isinstance(outputs, Failure)
    first = Path(outputs["6"][1]).read_bytes()
    prompt["5"]["inputs"]["multiplier"] = 171.15
    found = failure(comfyui.run(prompt))
    assert found.kind == "mergetool.errors.OutputError"
    assert "exists" in found.message
    assert Path(outputs["6"][1]).read_bytes() == first
    prompt["6"]["inputs"]["overwrite"] = True
    assert not isinstance(comfyui.run(prompt), Failure)
    assert Path(outputs["6"][1]).read_bytes() != first


def test_a_deleted_output_is_made_again(comfyui: Executor, host: Host) -> None:
    prompt = three_files(host)
    del prompt["7"]
    outputs = comfyui.run(prompt)
    assert not isinstance(outputs, Failure)
    comfyui.run(prompt)
    Path(outputs["6"][1]).unlink()
    comfyui.run(prompt)
    assert comfyui.ran == ["6"]
    assert Path(outputs["6"][1]).is_file()


@pytest.mark.parametrize(
    "name", ["../out", "/etc/out", "C:\\out", "C:out", "a/../../out", "..\\out", "", "..", "a\x00b", "\\\\host\\out"]
)
@pytest.mark.parametrize("node", ["6", "7"])
def test_a_name_that_leads_out_of_the_folder_is_refused_before_anything_runs(
    comfyui: Executor, node: str, name: str
) -> None:
    prompt = workflow("bridge.json")
    prompt[node]["inputs"]["name"] = name
    ((where, kind, detail),) = comfyui.errors(prompt)
    assert (where, kind) == (node, "custom_validation_failed")
    assert "is not a name inside" in detail


@pytest.mark.parametrize(
    ("node", "changes", "kind"),
    [
        ("5", {"multiplier": 2e6}, "value_bigger_than_max"),
        ("5", {"multiplier": "much"}, "invalid_input_type"),
        ("5", {"delta": ["1", 0]}, "return_type_mismatch"),
        ("5", {"model": ["4", 0]}, "return_type_mismatch"),
        ("6", {"dtype": "fp7"}, "value_not_in_list"),
        ("6", {"groups": "layers=cubic(0,1)"}, "custom_validation_failed"),
        ("7", {"rank_max": 0}, "value_smaller_than_min"),
    ],
)
def test_wrong_inputs_are_refused_before_anything_runs(comfyui: Executor, node: str, changes: Any, kind: str) -> None:
    prompt = workflow("bridge.json")
    prompt[node]["inputs"] |= changes
    assert [(where, what) for where, what, _ in comfyui.errors(prompt)] == [(node, kind)]


@pytest.mark.parametrize("text", ["a + b", "a +", "a + __import__('os')", "a * b"])
def test_an_expression_that_is_no_merge_says_why_before_anything_runs(comfyui: Executor, text: str) -> None:
    prompt = workflow("expression.json")
    prompt["4"]["inputs"]["expression"] = text
    ((node, kind, _),) = comfyui.errors(prompt)
    assert (node, kind) == ("4", "custom_validation_failed")


def test_an_error_is_mergetools_sentence(comfyui: Executor) -> None:
    prompt = workflow("bridge.json")
    prompt["2"]["inputs"]["model"] = "lab.stripped"
    found = failure(comfyui.run(prompt))
    assert (found.node, found.kind) == ("2", "mergetool.errors.InputMissing")
    assert "no embedded model is named" in found.message


def test_a_lora_of_a_merge_that_is_no_file_says_what_to_do(comfyui: Executor) -> None:
    prompt = workflow("bridge.json")
    prompt["7"]["inputs"]["variant"] = ["5", 0]
    del prompt["6"]
    found = failure(comfyui.run(prompt))
    assert found.node == "7"
    assert "link it through Save first" in found.message


@pytest.mark.parametrize("name", WORKFLOWS)
def test_shipped_workflows_are_valid(comfyui: Executor, host: Host, name: str) -> None:
    three_files(host)
    assert comfyui.errors(workflow(name)) == []


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
