"""LoRAs of SDXL: every spelling is read, and what is said of ComfyUI and five releases of diffusers is what these do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergetool.adapters.convert import convert
from mergetool.adapters.formats import KEY_FORMATS, KeyFormat
from mergetool.adapters.in_diffusers import RELEASES
from mergetool.adapters.loaders import loading
from mergetool.adapters.lora_file import open_lora
from mergetool.adapters.values import dense_rows
from mergetool.arch.families.sd15 import SD15
from mergetool.arch.families.sdxl import SDXL_UNET
from mergetool.arch.generic import GENERIC
from tests.oracles import ComfyUI, RefusedError
from tests.oracles.comparing import read as tensors_of
from tests.oracles.comparing import run, unlike
from tests.oracles.diffusers import Diffusers
from tests.sdxl import SMALL, checkpoint, shapes, values

Changes = dict[str, np.ndarray]
Pair = tuple[torch.Tensor, torch.Tensor]
Spell = Callable[[str], tuple[str, str, str]]
DOWN, UP, A, B = ".lora_down.weight", ".lora_up.weight", ".lora_A.weight", ".lora_B.weight"


def native(module: str) -> str:
    return SDXL_UNET.stored_name(f"{module}.weight", "comfyui").removesuffix(".weight")


def flat(module: str) -> str:
    return module.replace(".", "_")


def processor(module: str) -> str:
    """diffusers' oldest names: an attention's projections are its processor's, and the last has no number."""
    return module.replace(".to_", ".processor.to_").removesuffix(".0" if module.endswith("to_out.0") else "\n")


def old(module: str) -> tuple[str, str, str]:
    name = f"unet.{processor(module)}"
    mark = "_lora" if "processor" in name else ".lora"
    return name, f"{mark}.down.weight", f"{mark}.up.weight"


SPELLINGS: dict[str, Spell] = {
    "sd-scripts": lambda m: (f"lora_unet_{flat(native(m))}", DOWN, UP),
    "kohya, diffusers' names": lambda m: (f"lora_unet_{flat(m)}", DOWN, UP),
    "SimpleTuner": lambda m: (f"lycoris_{flat(m)}", DOWN, UP),
    "PEFT in diffusers": lambda m: (f"unet.{m}", A, B),
    "diffusers, dotted": lambda m: (f"unet.{m}", ".lora.down.weight", ".lora.up.weight"),
    "old diffusers": old,
    "PEFT behind a processor": lambda m: (f"unet.{processor(m)}", A, B),
    "ComfyUI's names": lambda m: (f"diffusion_model.{native(m)}", A, B),
    "ComfyUI's names, down and up": lambda m: (f"diffusion_model.{native(m)}", DOWN, UP),
    "bare": lambda m: (m, A, B),
    "raw PEFT": lambda m: (f"base_model.model.{m}", A, B),
}


SOME = re.compile(
    r"conv_(?:in|out)|(?:time|add)_embedding|down_blocks\.1\.(?:resnets\.0|downsamplers|attentions\.0\.(?:proj|transformer_blocks\.0))"
    r"|mid_block\.(?:resnets\.1|attentions\.0\.transformer_blocks\.1\.(?:attn2|ff))|up_blocks\.1\.(?:upsamplers|resnets\.2|attentions\.2\.proj_in)"
)
"""Modules of every kind and place."""


def factors(ranks: tuple[int, ...], modules: re.Pattern[str] = SOME) -> dict[str, Pair]:
    """Factors of matrices and convolutions, the latter as LoCon has them, with ranks by turns."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    chosen = ((p, s) for p, s in shapes().items() if p.endswith(".weight") and len(s) > 1 and modules.match(p))
    for i, (part, shape) in enumerate(chosen):
        rank, kernel = ranks[i % len(ranks)], shape[2:]
        down = torch.randn(rank, *shape[1:], generator=generator) * 0.1
        up = torch.randn(shape[0], rank, *(1 for _ in kernel), generator=generator) * 0.1
        found[part.removesuffix(".weight")] = down, up
    return found


def changes_of(pairs: dict[str, Pair], alpha: float | None) -> Changes:
    found = {}
    for module, (down, up) in pairs.items():
        scale = 1 if alpha is None else alpha / len(down)
        product = up.double().reshape(len(up), -1) @ down.double().reshape(len(down), -1) * scale
        found[f"{module}.weight"] = product.reshape(len(up), *down.shape[1:]).numpy()
    return found


def written(path: Path, spell: Spell, pairs: dict[str, Pair], alpha: float | None) -> Path:
    tensors: dict[str, torch.Tensor] = {}
    for module, (down, up) in pairs.items():
        name, end_of_down, end_of_up = spell(module)
        tensors |= {name + end_of_down: down, name + end_of_up: up}
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


EVEN, MIXED = (2,), (2, 4, 2, 3)
CASES: dict[str, tuple[str, tuple[int, ...], float | None, str]] = {
    **{name: (name, EVEN, None, "") for name in SPELLINGS},
    **{f"{name}, mixed ranks": (name, MIXED, None, "") for name in ("sd-scripts", "PEFT in diffusers", "old diffusers")},
    **{f"{name}, alpha": (name, EVEN, 1.0, "") for name in ("sd-scripts", "kohya, diffusers' names", "ComfyUI's names, down and up")},
    "sd-scripts, alpha, mixed ranks": ("sd-scripts", MIXED, 2.0, ""),
    "sd-scripts, alpha, attention": ("sd-scripts", MIXED, 2.0, ".attentions."),
    "sd-scripts, attention": ("sd-scripts", EVEN, None, ".attentions."),
    "sd-scripts, blocks": ("sd-scripts", MIXED, None, "_block"),
}  # fmt: skip
"""The spelling, ranks by turns, every module's alpha, and what modules have in their names."""


SOURCE, EVERY = "sd-scripts, alpha, mixed ranks", "every module"


class Cases:
    """Files by name, with what each means."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths: dict[str, Path] = {}
        self.changes: dict[str, Changes] = {}
        for i, (name, (spelling, ranks, alpha, within)) in enumerate(CASES.items()):
            pairs = {module: pair for module, pair in factors(ranks).items() if within in module}
            self.paths[name] = written(folder / f"{i}.safetensors", SPELLINGS[spelling], pairs, alpha)
            self.changes[name] = changes_of(pairs, alpha)
        for key_format in KEY_FORMATS[:-1]:
            self._convert(f"converted: {key_format}", SOURCE, key_format)
        pairs = factors(MIXED, re.compile(""))
        self.paths[EVERY] = written(folder / "every.safetensors", SPELLINGS["diffusers, dotted"], pairs, None)
        self.changes[EVERY] = changes_of(pairs, None)
        self._convert(f"{EVERY}, converted", EVERY, "default")

    def _convert(self, name: str, source: str, key_format: KeyFormat) -> None:
        self.paths[name], self.changes[name] = self.folder / f"{len(self.paths)}.safetensors", self.changes[source]
        with open_lora(self.paths[source]) as file:
            convert(file, self.paths[name], key_format)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return Cases(tmp_path_factory.mktemp("loras"))


def read(path: Path) -> tuple[Changes, dict[str, tuple[int, ...]]]:
    with open_lora(path) as file:
        assert (file.family, file.unmatched) == (SDXL_UNET, ())
        return {part: dense_rows(file, change, 0, change.rows) for part, (change,) in file.changes.items()}, {
            part: change.adapter.shape for part, (change,) in file.changes.items()
        }


def alike(found: np.ndarray, wanted: np.ndarray) -> bool:
    """To float32's roundings of a few products, and those of a scale that is folded."""
    return bool(np.allclose(found.reshape(wanted.shape), wanted, rtol=0, atol=2**-20 * np.abs(wanted).max()))


NAMES = [*CASES, *(f"converted: {key_format}" for key_format in KEY_FORMATS[:-1]), EVERY, f"{EVERY}, converted"]


@pytest.mark.parametrize("name", NAMES)
def test_every_spelling_means_the_same_changes(cases: Cases, name: str) -> None:
    found, adapted = read(cases.paths[name])
    wanted = cases.changes[name]
    assert found.keys() == wanted.keys()
    assert all(adapted[part] == change.shape for part, change in wanted.items())
    assert [part for part in wanted if not alike(found[part], wanted[part])] == []


# -- who loads them ----------------------------------------------------------------------------------------------------------------

Found = tuple[set[str], bool]
"""The parts that a program changes as a file means, and whether it rejects the file."""


def right(found: dict[str, torch.Tensor], wanted: Changes) -> set[str]:
    return {
        part
        for part, tensor in found.items()
        if part in wanted and tensor.any() and alike(tensor.double().numpy(), wanted[part])
    }


def in_comfyui(cases: Cases, comfyui: ComfyUI) -> Iterator[tuple[str, Found]]:
    zeros = cases.folder / "zeros.safetensors"
    checkpoint(zeros, {name: torch.zeros(shape) for name, shape in shapes().items()})
    own = {SDXL_UNET.stored_name(name, "comfyui"): name for name in shapes()}
    for name, path in cases.paths.items():
        comfyui.ask("patch", model=zeros, lora=path, out=cases.folder / "out.safetensors")
        tensors = {own[key]: tensor for key, tensor in load_file(cases.folder / "out.safetensors").items()}
        yield name, (right(tensors, cases.changes[name]), False)


def in_diffusers(cases: Cases, release: str) -> Iterator[tuple[str, Found]]:
    model = {"pipeline": "StableDiffusionXLPipeline", "model": "UNet2DConditionModel", "config": dict(SMALL)}
    with Diffusers(release) as diffusers:
        for name, path in cases.paths.items():
            out = cases.folder / "out.safetensors"
            try:
                diffusers.ask("load", lora=cases.folder, name=path.name, out=out, **model)
            except RefusedError:
                yield name, (set(), True)
            else:
                yield name, (right(load_file(out), cases.changes[name]), False)


BETWEEN = [pytest.param(f"diffusers {release}", marks=pytest.mark.long) for release in RELEASES[1:-1]]


@pytest.mark.parametrize("program", ["ComfyUI 0.30", f"diffusers {RELEASES[0]}", f"diffusers {RELEASES[-1]}", *BETWEEN])
def test_a_program_loads_what_is_said(cases: Cases, comfyui: ComfyUI, program: str) -> None:
    found = dict(
        in_comfyui(cases, comfyui) if program.startswith("ComfyUI") else in_diffusers(cases, program.split(" ")[1])
    )
    wrong = {}
    for name, (changed, rejects) in found.items():
        with open_lora(cases.paths[name]) as file:
            (said,) = (one for one in loading(file) if program in [f"{one.program} {r}" for r in one.releases])
        expected = cases.changes[name].keys() - said.dropped.keys()
        if (changed, rejects) != (expected, said.error is not None):
            wrong[name] = (len(changed), len(expected), sorted(changed ^ expected)[:3], rejects, said.error)
    assert wrong == {}
    whole = {name for name, (changed, _) in found.items() if changed == cases.changes[name].keys()}
    if program not in ("diffusers 0.36", "diffusers 0.38"):  # which reject what is outside the blocks
        assert {"converted: default", f"{EVERY}, converted"} <= whole
    assert "old diffusers" in whole


# -- what is not SDXL's, and what is beside it -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("columns", "family"), [(768, SD15), (1024, GENERIC), (2048, SDXL_UNET)])
def test_other_unets_have_the_same_names_and_another_context(tmp_path: Path, columns: int, family: object) -> None:
    block = "lora_unet_mid_block_attentions_0_transformer_blocks_0"
    tensors = {
        f"{block}_{module}{end}": torch.ones(shape)
        for module, width in (("attn1_to_q", 1280), ("attn2_to_k", columns))
        for end, shape in ((DOWN, (2, width)), (UP, (1280, 2)))
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    with open_lora(tmp_path / "lora.safetensors") as file:
        assert file.family is family


def test_keys_of_text_encoders_are_left_aside_by_name(tmp_path: Path) -> None:
    pairs = factors(EVEN)
    tensors = load_file(written(tmp_path / "unet.safetensors", SPELLINGS["sd-scripts"], pairs, 1.0))
    beside = {
        f"{name}_text_model_encoder_layers_0_mlp_fc1{end}": torch.ones(2, 2)
        for name in ("lora_te1", "lora_te2")
        for end in (DOWN, UP)
    }
    save_file({**tensors, **beside}, tmp_path / "lora.safetensors")
    with open_lora(tmp_path / "lora.safetensors") as file:
        assert set(file.text_encoder) == beside.keys()
        assert (len(file.changes), file.unmatched) == (len(pairs), ())


def test_a_header_tells_diffusers_ranks_where_no_alpha_does(cases: Cases) -> None:
    with open_lora(cases.paths["converted: default"]) as file:
        config = json.loads(file.checkpoint.metadata["lora_adapter_metadata"])
    assert config["unet.r"] == config["unet.lora_alpha"] == 2
    assert config["unet.rank_pattern"] == config["unet.alpha_pattern"]
    assert set(config["unet.rank_pattern"].values()) == {3, 4}
    with open_lora(cases.paths["converted: kohya"]) as file:
        assert "lora_adapter_metadata" not in file.checkpoint.metadata


# -- convolutions -----------------------------------------------------------------------------------------------------------------

CONV = "input_blocks_4_0_in_layers_2"  # [64, 32, 3, 3]
LYCORIS: dict[str, dict[str, tuple[int, ...]]] = {
    "LoCon": {"lora_down.weight": (2, 32, 3, 3), "lora_up.weight": (64, 2, 1, 1)},
    "LoCon with a middle": {"lora_down.weight": (2, 32, 1, 1), "lora_up.weight": (64, 2, 1, 1), "lora_mid.weight": (2, 2, 3, 3)},
    "LoHa": {"hada_w1_a": (64, 2), "hada_w1_b": (2, 288), "hada_w2_a": (64, 2), "hada_w2_b": (2, 288)},
    "LoKr": {"lokr_w1": (4, 4), "lokr_w2": (16, 8, 3, 3)},
    "a whole difference": {"diff": (64, 32, 3, 3)},
}  # fmt: skip


@pytest.mark.parametrize("kind", LYCORIS)
def test_comfyui_adds_to_a_convolution_what_bake_adds(tmp_path: Path, comfyui: ComfyUI, kind: str) -> None:
    source = checkpoint(tmp_path / "source.safetensors", values(1))
    generator = torch.Generator().manual_seed(3)
    tensors = {
        f"lora_unet_{CONV}.{end}": torch.randn(shape, generator=generator) * 0.3 for end, shape in LYCORIS[kind].items()
    }
    save_file({**tensors, f"lora_unet_{CONV}.alpha": torch.tensor(1.0)}, tmp_path / "lora.safetensors")
    out = tmp_path / "out.safetensors"
    answer = comfyui.ask("patch", model=source, lora=tmp_path / "lora.safetensors", out=out)
    name = "input_blocks.4.0.in_layers.2.weight"
    assert (answer["log"], answer["patched"]) == ([], [f"diffusion_model.{name}"])
    run(
        "lora",
        "bake",
        source,
        "lora.safetensors",
        "-o",
        "baked.safetensors",
        "--dtype",
        "fp32",
        "--force",
        folder=tmp_path,
    )
    theirs, ours, before = tensors_of(out), tensors_of(tmp_path / "baked.safetensors"), tensors_of(source)
    assert np.abs(ours[name] - before[name]).max() > 0.05
    assert unlike(theirs, ours, {other: np.array(2.0**-18 if other == name else 0) for other in ours}) == []
