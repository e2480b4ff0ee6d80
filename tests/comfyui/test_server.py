"""The node pack in the real ComfyUI 0.30.0 server: workflows are queued over its API, as its page queues them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mergetool.comfyui
from mergetool import models
from tests.cli.run import mergetool as command
from tests.comfyui.server import NODES, Prompt, Server
from tests.oracles import OracleMissingError

# As shipped; the two of files last, since one makes the LoRA that the other bakes.
WORKFLOWS = ["expression.json", "advised.json", "bridge.json", "bridge-files.json", "bake-files.json"]
LAB = {"alkahest": "lab.alkahest", "artshoot": "lab.striped", "z_image_bf16": "lab.base"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server, with the embedded models under the names that the shipped workflows ask for."""
    base = tmp_path_factory.mktemp("ComfyUI")
    folder = base / "models" / "diffusion_models"
    folder.mkdir(parents=True)
    for name, model in LAB.items():
        with models.open_model(model, names_only=True) as opened:
            shutil.copy(opened.checkpoint.files[0].path, folder / f"{name}.safetensors")
    try:
        started = Server(base)
        with started:
            yield started.start()
    except OracleMissingError as error:
        pytest.fail(str(error), pytrace=False)


def workflow(name: str) -> Prompt:
    return json.loads((NODES / "workflows" / name).read_text("utf-8"))


def bridge(name: str, **changes: Any) -> Prompt:
    """bridge-files.json with outputs called ``name``, and inputs of Save changed."""
    prompt = workflow("bridge-files.json")
    for node in "67":
        prompt[node]["inputs"]["output"] = f"{name}/{node}.safetensors"
    prompt["6"]["inputs"] |= changes
    return prompt


def merge_of(name: str, **changes: Any) -> Prompt:
    """The first half of it: no LoRA."""
    prompt = bridge(name, **changes)
    del prompt["7"]
    return prompt


def files(server: Server) -> dict[Path, bytes]:
    """Everything in the folders of models and of outputs."""
    places = (server.base / "models", server.base / "output")
    return {path: path.read_bytes() for place in places for path in sorted(place.rglob("*")) if path.is_file()}


def test_every_shipped_workflow_is_tried_here() -> None:
    assert sorted(WORKFLOWS) == sorted(path.name for path in (NODES / "workflows").glob("*.json"))


def test_the_server_offers_every_node(server: Server) -> None:
    offered = server.get("/object_info")
    for name, label in mergetool.comfyui.NODE_DISPLAY_NAME_MAPPINGS.items():
        assert offered[name]["display_name"] == label
        assert offered[name]["python_module"] == "custom_nodes.mergetool-nodes"
    assert set(mergetool.comfyui.NODE_CLASS_MAPPINGS) == set(mergetool.comfyui.NODE_DISPLAY_NAME_MAPPINGS)


def test_the_page_is_told_which_inputs_are_advanced(server: Server) -> None:
    inputs = server.get("/object_info")["MergetoolSave"]["input"]["optional"]
    assert inputs["threads"][1]["advanced"] is True
    assert "advanced" not in inputs["protect"][1]


def test_advanced_inputs_reach_the_merge(server: Server, tmp_path: Path) -> None:
    prompt = merge_of("advanced", include="refiner\nlayers", prefix="net.", threads="1", device="cpu", protect="pad")
    prompt["5"]["inputs"]["multiplier"] = 2.0
    ran = server.run(prompt)
    assert ran.status == "success", ran.error["exception_message"]
    told = command(
        "merge", "lab.alkahest + 2.0*(lab.striped - lab.base)", "--include", "refiner", "--include", "layers", "--protect", "pad",
        "--prefix", "net.", "-o", "advanced.safetensors", cwd=tmp_path,
    )  # fmt: skip
    assert told.code == 0, told.err
    made = load_file(server.base / "models" / "diffusion_models" / "advanced" / "6.safetensors")
    wanted = load_file(tmp_path / "advanced.safetensors")
    assert made.keys() == wanted.keys()
    assert all(name.startswith("net.") and torch.equal(made[name], wanted[name]) for name in made)


def test_shards_are_a_folder_that_the_next_node_reads(server: Server) -> None:
    prompt = bridge("sharded", shard_size="1MB")
    prompt["6"]["inputs"]["output"] = "sharded/model/"
    ran = server.run(prompt)
    assert ran.status == "success", ran.error["exception_message"]
    assert list((server.base / "models" / "diffusion_models" / "sharded" / "model").glob("*.safetensors"))
    assert "matrices" in ran.text("7")


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_queued_twice_succeeds_twice_and_leaves_the_same_files(server: Server, name: str) -> None:
    first = server.run(workflow(name))
    assert first.status == "success", first.error["exception_message"]
    made = files(server)
    again = server.run(workflow(name))
    assert again.status == "success", again.error["exception_message"]
    assert files(server) == made
    outputs = {
        node for node, what in workflow(name).items() if what["class_type"] in ("MergetoolSave", "MergetoolExtractLora")
    }
    assert set(workflow(name)) - again.cached <= outputs
    assert all("already made of this" in again.text(node) for node in outputs - again.cached)
    assert server.run(workflow(name)).cached == set(workflow(name))


def test_the_bridge_is_what_the_command_line_writes(server: Server, tmp_path: Path) -> None:
    assert server.run(workflow("bridge.json")).status == "success"
    made = server.base / "output" / "mergetool"
    expression = "lab.alkahest + 1.5*(lab.striped - lab.base)"
    ran = command("merge", expression, "--protect", "refiner", "-o", "striped.safetensors", cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert (made / "striped.safetensors").read_bytes() == (tmp_path / "striped.safetensors").read_bytes()
    options = ("--rank-thresh", "0.995", "--exclude", "refiner", "-o", "lora.safetensors")
    ran = command("diff", "--base", "lab.alkahest", "--variant", made / "striped.safetensors", *options, cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert (made / "striped-lora.safetensors").read_bytes() == (tmp_path / "lora.safetensors").read_bytes()


def test_an_expression_with_groups_and_a_container_is_too(server: Server, tmp_path: Path) -> None:
    prompt = workflow("expression.json")
    prompt["5"]["inputs"]["output"] = "groups.safetensors"
    ran = server.run(prompt)
    assert "rounding kept" in ran.text("5")
    options = ("--protect", "refiner", "--quant", "fp8-scaled", "--set", "layers=linear(0.5,1)", "--set", "layers.q=2")
    expression = "lab.alkahest + 1.5*(lab.striped - lab.base)"
    told = command("merge", expression, *options, "-o", "expression.safetensors", cwd=tmp_path)
    assert told.code == 0, told.err
    made = server.base / "output" / "groups.safetensors"
    assert made.read_bytes() == (tmp_path / "expression.safetensors").read_bytes()


def test_a_baked_lora_is_what_the_command_line_bakes(server: Server, tmp_path: Path) -> None:
    for name in ("bridge-files.json", "bake-files.json"):
        assert server.run(workflow(name)).status == "success"
    folder = server.base / "models"
    lora = folder / "loras" / "mergetool" / "artshoot-for-alkahest.safetensors"
    model = folder / "diffusion_models" / "alkahest.safetensors"
    told = command("lora", "bake", model, f"{lora}:1", "-o", "baked.safetensors", cwd=tmp_path)
    assert told.code == 0, told.err
    baked, wanted = (
        load_file(folder / "diffusion_models/mergetool/alkahest-with-artshoot.safetensors"),
        load_file(tmp_path / "baked.safetensors"),
    )
    assert all(torch.equal(baked[name], wanted[name]) for name in wanted | baked)


def test_a_comparison_chooses_the_multiplier(server: Server, tmp_path: Path) -> None:
    prompt = workflow("advised.json")
    prompt["6"]["inputs"]["output"] = "chosen.safetensors"
    ran = server.run(prompt)
    options = ("--onto", "lab.alkahest", "--target", "0.05", "--json")
    multiplier = command("compare", "lab.base", "lab.striped", *options, cwd=tmp_path).json["recommended"]
    assert f"lab.alkahest + {multiplier}*(lab.striped - lab.base)" in ran.text("6")
    assert ran.outputs["7"]["images"] == [{"filename": "striped.png", "subfolder": "mergetool", "type": "output"}]
    assert (server.base / "output" / "mergetool" / "striped.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("node", ["6", "7"])
def test_an_interrupted_node_leaves_nothing_and_works_again(server: Server, node: str) -> None:
    prompt = bridge(f"interrupted-{node}")
    if node == "7":
        assert server.run(merge_of(f"interrupted-{node}")).status == "success"
    before = files(server)
    with server.holding():
        queued = server.queue(prompt)
        server.wait_held()
        assert server.post("/interrupt")[0] == 200
        ran = server.ended(queued)
    assert ran.status == "error"
    assert ran.messages["execution_interrupted"]["node_id"] == node
    assert files(server) == before
    assert server.run(prompt).status == "success"


def test_an_interrupted_comparison_draws_nothing(server: Server) -> None:
    prompt = workflow("advised.json")
    prompt["7"]["inputs"] |= {"plot": "interrupted.png", "target": 0.06}
    with server.holding():
        queued = server.queue(prompt)
        server.wait_held()
        server.post("/interrupt")
        ran = server.ended(queued)
    assert ran.messages["execution_interrupted"]["node_id"] == "7"
    assert not (server.base / "output" / "interrupted.png").exists()


def test_progress_reaches_the_end_on_the_page(server: Server) -> None:
    ran = server.queue(bridge("progress"))
    assert server.ended(ran).status == "success"
    for node in "67":
        seen = [
            event
            for name, event in server.events()
            if name == "progress" and event["prompt_id"] == ran and event["node"] == node
        ]
        values = [event["value"] for event in seen]
        assert values == sorted(values)
        assert values[-1] == seen[-1]["max"] > 0


def test_nodes_run_again_when_a_file_changes(server: Server) -> None:
    prompt = merge_of("changing")
    changed = server.base / "models" / "diffusion_models" / "changing.safetensors"
    prompt["2"]["inputs"]["file"] = changed.name
    shutil.copy(changed.with_name("artshoot.safetensors"), changed)
    server.get("/object_info")
    assert server.run(prompt).status == "success"
    server.run(prompt)
    assert server.run(prompt).cached == set(prompt)
    shutil.copy(changed.with_name("alkahest.safetensors"), changed)
    prompt["6"]["inputs"] |= {"output": "changed.safetensors", "force": True}
    again = server.run(prompt)
    assert set(prompt) - again.cached == {"2", "4", "5", "6"}


def test_a_file_of_another_merge_is_replaced_only_where_asked(server: Server) -> None:
    assert server.run(merge_of("kept")).status == "success"
    path = server.base / "models" / "diffusion_models" / "kept" / "6.safetensors"
    first = path.read_bytes()
    other = merge_of("kept")
    other["5"]["inputs"]["multiplier"] = 171.15
    other["6"]["inputs"]["force"] = True  # it lands far from the bridge
    ran = server.run(other)
    assert ran.error["node_id"] == "6"
    assert ran.error["exception_type"] == "mergetool.errors.OutputError"
    assert "use overwrite" in ran.error["exception_message"]
    assert path.read_bytes() == first
    other["6"]["inputs"]["overwrite"] = True
    assert server.run(other).status == "success"
    assert path.read_bytes() != first


def test_a_deleted_output_is_made_again(server: Server) -> None:
    prompt = merge_of("deleted")
    assert server.run(prompt).status == "success"
    path = server.base / "models" / "diffusion_models" / "deleted" / "6.safetensors"
    first = path.read_bytes()
    server.run(prompt)
    path.unlink()
    assert server.run(prompt).status == "success"
    assert path.read_bytes() == first


def test_models_that_do_not_belong_together_need_force(server: Server) -> None:
    prompt = workflow("expression.json")
    prompt["4"]["inputs"]["expression"] = "c + 0.5*(a - c)"
    prompt["5"]["inputs"] |= {"protect": "", "quant": "none", "output": "forced.safetensors"}
    prompt["1"]["inputs"]["model"] = "lab.turbo"
    refused = server.run(prompt).error
    assert refused["exception_type"] == "mergetool.errors.LineageError"
    assert refused["exception_message"].strip().endswith("; force merges anyway.")
    prompt["5"]["inputs"]["force"] = True
    assert "error: " in server.run(prompt).text("5")


def test_a_lora_of_a_merge_that_is_not_saved_is_the_one_of_its_file(server: Server) -> None:
    saved, linked = bridge("saved"), bridge("linked")
    del saved["6"]["inputs"]["protect"]
    linked["7"]["inputs"]["variant"] = ["5", 0]
    del linked["6"]
    loras = []
    for prompt in (saved, linked):
        before = set(files(server))
        assert server.run(prompt).status == "success"
        (path,) = (path for path in set(files(server)) - before if path.name == "7.safetensors")
        loras.append(load_file(path))
    assert loras[0].keys() == loras[1].keys()
    assert all(torch.equal(loras[0][name], loras[1][name]) for name in loras[0])


def broken(what: str) -> tuple[Prompt, str]:
    """A workflow that stops at the node in second place."""
    prompt = workflow("bridge.json")
    if what == "a model that is not there":
        prompt["2"]["inputs"]["model"] = "lab.stripped"
    elif what == "a file that is not there":
        prompt["2"]["inputs"]["model"] = "nowhere.safetensors"
    elif what == "a protected group of a model that has none":
        prompt["6"]["inputs"]["multipliers"] = "refinery=2"
    elif what == "a group to leave out of a LoRA that there is not":
        prompt["7"]["inputs"] |= {"exclude": "refinery", "output": "without.safetensors"}
    return prompt, {"a l": "7", "a p": "6", "a g": "7"}.get(what[:3].lower(), "2")


@pytest.mark.parametrize(
    ("what", "kind", "said"),
    [
        ("a model that is not there", "InputMissing", "is no embedded model; choose one of"),
        ("a file that is not there", "InputMissing", "nowhere.safetensors"),
        ("a protected group of a model that has none", "PatternError", "refinery"),
        ("a group to leave out of a LoRA that there is not", "PatternError", "refinery"),
    ],
)
def test_what_goes_wrong_is_one_sentence_at_the_node(server: Server, what: str, kind: str, said: str) -> None:
    prompt, node = broken(what)
    before = files(server)
    error = server.run(prompt).error
    assert (error["node_id"], error["exception_type"]) == (node, f"mergetool.errors.{kind}")
    sentence = error["exception_message"].strip()
    assert said in sentence
    assert "\n" not in sentence
    assert "--" not in sentence  # an option of the command line, which a node does not have
    frames = [frame for frame in error["traceback"] if "mergetool" in frame]
    assert all("mergetool/comfyui" in frame or "mergetool-nodes" in frame for frame in frames)
    assert {path: made for path, made in files(server).items() if path.name != "striped.safetensors"} == {
        path: made for path, made in before.items() if path.name != "striped.safetensors"
    }


@pytest.mark.parametrize(
    "name", ["../out", "/etc/out", "C:\\out", "C:out", "a/../../out", "..\\out", "", "..", "a\x00b", "\\\\host\\out"]
)
@pytest.mark.parametrize("node", ["6", "7"])
def test_a_name_that_leads_out_of_the_folder_is_not_queued(server: Server, node: str, name: str) -> None:
    prompt = workflow("bridge.json")
    prompt[node]["inputs"]["output"] = name
    ((where, kind, detail), *_) = server.refused(prompt)
    assert (where, kind) == (node, "custom_validation_failed")
    assert "is not a name inside" in detail


@pytest.mark.parametrize(
    ("node", "changes", "kind"),
    [
        ("1", {"model": ["2"]}, "bad_linked_input"),
        ("5", {"multiplier": 2e6}, "value_bigger_than_max"),
        ("5", {"multiplier": "much"}, "invalid_input_type"),
        ("5", {"delta": ["1", 0]}, "return_type_mismatch"),
        ("5", {"model": ["4", 0]}, "return_type_mismatch"),
        ("6", {"dtype": "fp7"}, "custom_validation_failed"),
        ("6", {"folder": "custom_nodes"}, "custom_validation_failed"),
        ("7", {"folder": "diffusion_models"}, "custom_validation_failed"),
        ("6", {"multipliers": "layers=cubic(0,1)"}, "custom_validation_failed"),
        ("7", {"rank_thresh": "0"}, "custom_validation_failed"),
        ("7", {"rank": -1}, "custom_validation_failed"),
        ("6", {"rounding": "nearest", "seed": "3"}, "custom_validation_failed"),
        ("6", {"quant": "fp8-scaled", "threads": "0"}, "custom_validation_failed"),
    ],
)
def test_wrong_inputs_are_not_queued(server: Server, node: str, changes: Any, kind: str) -> None:
    prompt = workflow("bridge.json")
    prompt[node]["inputs"] |= changes
    assert (node, kind) in [(where, what) for where, what, _ in server.refused(prompt)]


@pytest.mark.parametrize("file", ["nowhere.safetensors", "../models/diffusion_models/alkahest.safetensors"])
def test_a_file_that_is_in_no_list_is_not_queued(server: Server, file: str) -> None:
    prompt = workflow("bridge-files.json")
    prompt["2"]["inputs"]["file"] = file
    assert ("2", "value_not_in_list") in [found[:2] for found in server.refused(prompt)]


@pytest.mark.parametrize("text", ["a + b", "a +", "a + __import__('os')", "a * b"])
def test_an_expression_that_is_no_merge_says_why_before_it_is_queued(server: Server, text: str) -> None:
    prompt = workflow("expression.json")
    prompt["4"]["inputs"]["expression"] = text
    ((node, kind, _),) = server.refused(prompt)
    assert (node, kind) == ("4", "custom_validation_failed")


def drawing(model: list[Any], name: str) -> Prompt:
    """KSampler's latents of whatever gives ``model``, which is in the workflow under "m"."""
    caption = {"class_type": "TestCaption", "inputs": {"seed": 1, "tokens": 20, "width": 64}}
    nothing = {"class_type": "TestCaption", "inputs": {"seed": 2, "tokens": 20, "width": 64}}
    latent = {"class_type": "EmptySD3LatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}}
    links = {"model": model, "positive": ["p", 0], "negative": ["n", 0], "latent_image": ["l", 0]}
    how = {"seed": 3, "steps": 4, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    kept = {"class_type": "SaveLatent", "inputs": {"samples": ["k", 0], "filename_prefix": name}}
    return {"p": caption, "n": nothing, "l": latent, "k": {"class_type": "KSampler", "inputs": links | how}, "s": kept}


def loaded(file: str) -> dict[str, Any]:
    return {"class_type": "UNETLoader", "inputs": {"unet_name": file, "weight_dtype": "default"}}


def latents(server: Server, prompt: Prompt) -> torch.Tensor:
    ran = server.run(prompt)
    assert ran.status == "success", ran.error["exception_message"]
    (file,) = ran.outputs["s"]["latents"]
    return load_file(server.base / "output" / file["subfolder"] / file["filename"])["latent_tensor"]


def drawn_by(server: Server, file: str) -> torch.Tensor:
    """Latents of a file of the models' folder."""
    return latents(server, {"m": loaded(file), **drawing(["m", 0], f"drawn/{Path(file).stem}")})


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.isfinite().all()
    return float((found - wanted).norm() / wanted.norm())


def own_merge(server: Server) -> torch.Tensor:
    """Latents of alkahest + 2 * (artshoot - z_image_bf16), merged by ComfyUI's nodes, which keep float32 on a processor."""
    parents = {node: loaded(f"{name}.safetensors") for node, name in zip("abc", LAB, strict=True)}
    difference = {"model1": ["b", 0], "model2": ["c", 0], "multiplier": 1.0}
    once, twice = ({"model1": [to, 0], "model2": ["d", 0]} for to in "ae")
    nodes = {"d": ("Subtract", difference), "e": ("Add", once), "f": ("Add", twice)}
    merging = {node: {"class_type": f"ModelMerge{kind}", "inputs": inputs} for node, (kind, inputs) in nodes.items()}
    return latents(server, parents | merging | drawing(["f", 0], "drawn/own"))


@pytest.mark.parametrize(
    ("form", "nearer"), [({"dtype": "fp32"}, 1e-4), ({"quant": "fp8-scaled"}, 0.5), ({"quant": "int8"}, 0.5)]
)
def test_ksampler_draws_with_our_merge_what_it_draws_with_comfyuis(
    server: Server, form: dict[str, Any], nearer: float
) -> None:
    name = "-".join(form.values())
    # ComfyUI patches only what lies in modules without modules: its merges keep the first model's pad tokens.
    prompt = merge_of(f"drawn-{name}", protect="", multipliers="pad=0", **form)
    prompt["5"]["inputs"]["multiplier"] = 2.0
    assert server.run(prompt).status == "success"
    own, plain = own_merge(server), drawn_by(server, "alkahest.safetensors")
    ours = drawn_by(server, f"drawn-{name}/6.safetensors")
    assert apart(ours, own) < nearer * apart(plain, own)


def test_ksampler_draws_with_the_lora_what_it_draws_with_the_baked_model(server: Server) -> None:
    assert server.run(workflow("bridge-files.json")).status == "success"
    prompt = workflow("bake-files.json")
    prompt["4"]["inputs"] |= {"output": "drawn-baked.safetensors", "dtype": "fp32"}
    assert server.run(prompt).status == "success"
    added = {"model": ["u", 0], "lora_name": "mergetool/artshoot-for-alkahest.safetensors", "strength_model": 1.0}
    patched = {"u": loaded("alkahest.safetensors"), "m": {"class_type": "LoraLoaderModelOnly", "inputs": added}}
    with_lora = latents(server, patched | drawing(["m", 0], "drawn/lora"))
    assert apart(with_lora, drawn_by(server, "drawn-baked.safetensors")) < 1e-4


def test_what_was_not_merged_by_the_nodes_is_not_in_the_servers_log(server: Server) -> None:
    for line in ("unet missing", "unet unexpected", "left over keys", "lora key not loaded"):
        assert line not in server.log
