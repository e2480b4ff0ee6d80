"""Prefix by layout by family: every pair of files is merged right, by name, or refused; none becomes a copy without a word."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergetool.engine import job
from mergetool.errors import FamilyError
from tests.oracles import ComfyUI
from tests.oracles.architectures import FAMILIES, LAYOUTS, Layouts, Shapes, layouts
from tests.oracles.case import Case
from tests.oracles.families import CASES

PREFIXES = (
    *("", "model.diffusion_model.", "diffusion_model.", "model.model.", "model.", "net.", "transformer.", "module."),
    *(
        "_orig_mod.",
        "pipe.dit.",
        "module._orig_mod.",
        "module.model.diffusion_model.",
        "model.diffusion_model._orig_mod.",
    ),
)
BESIDE = {"vae.decoder.conv_in.weight": torch.full((2, 2), 7.0), "text_encoders.t5xxl.shared.weight": torch.ones(3)}
ONE_LAYOUT = ("Qwen-Image", "HiDream")
"""Families whose tensors both programs call the same."""
CONVERTED = ("Chroma", "Flux.2", "Lumina-Image 2")
"""Families whose small classes are converted as diffusers' converter does; Wan and SDXL are known by widths that theirs have not."""
Tensors = dict[str, torch.Tensor]


def values(shapes: Shapes, seed: int) -> Tensors:
    """Random tensors of an eighth of every size, which keeps fused ones as large as their parts."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn([max(1, n // 8) for n in shape], generator=generator) for name, shape in shapes.items()}


def fused(own: Tensors) -> Tensors:
    """A Z-Image under diffusers' names in ComfyUI's layout, as ComfyUI's own converter of that model renames it."""
    renamed = {"to_out.0": "out", "norm_q": "q_norm", "norm_k": "k_norm"}
    found = {}
    for name, tensor in own.items():
        if name.endswith((".to_k.weight", ".to_v.weight")):
            continue
        if name.endswith(".to_q.weight"):
            found[name.replace("to_q", "qkv")] = torch.cat([own[name.replace("to_q", f"to_{x}")] for x in "qkv"])
            continue
        for theirs, ours in renamed.items():
            name = name.replace(f"attention.{theirs}.", f"attention.{ours}.")
        found[name.replace("all_x_embedder.2-1.", "x_embedder.").replace("all_final_layer.2-1.", "final_layer.")] = (
            tensor
        )
    return found


MAPS: dict[str, tuple[str, dict[str, int]]] = {
    "Flux.1": ("flux_to_diffusers", {"depth": 1, "depth_single_blocks": 2, "hidden_size": 96}),
    "SD3.5": ("mmdit_to_diffusers", {"depth": 2}),
}
"""ComfyUI's functions that map diffusers' names of a family."""


def as_comfyui_names(own: Tensors, comfyui: ComfyUI, family: str) -> Tensors:
    """A model under diffusers' names in ComfyUI's layout, as ComfyUI's own map says: rows of fused tensors in order, halves swapped."""
    function, config = MAPS[family]
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for theirs, (name, first, _, swapped) in comfyui.ask("diffusers_names", function=function, config=config)[
        "names"
    ].items():
        if theirs in own:
            tensor = torch.cat(own[theirs].chunk(2)[::-1]) if swapped else own[theirs]
            pieces.setdefault(name, []).append((first or 0, tensor))
    return {
        name: torch.cat([tensor for _, tensor in sorted(held, key=lambda piece: piece[0])])
        for name, held in pieces.items()
    }


def as_converted(own: Tensors, case: Case) -> Tensors:
    """A model under diffusers' names in ComfyUI's layout, as diffusers' own converter from there says."""
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for theirs, place in ((name, place) for name, place in case.places.items() if name in own):
        tensor = torch.cat(own[theirs].chunk(2)[::-1]) if place.swapped else own[theirs]
        pieces.setdefault(place.tensor, []).append((place.row, tensor))
    return {
        name: torch.cat([tensor for _, tensor in sorted(held, key=lambda piece: piece[0])])
        for name, held in pieces.items()
    }


class Files:
    """The three models A, B and C of a family, written under any prefix and layout."""

    def __init__(self, folder: Path, family: str, names: Layouts, comfyui: ComfyUI) -> None:
        self.folder = folder
        self.tensors: dict[tuple[str, str], Tensors] = {}
        for seed, model in enumerate("abc"):
            own = values(names.diffusers, seed)
            self.tensors[model, "diffusers"] = own
            self.tensors[model, "comfyui"] = self._in_comfyui(family, own, names, seed, comfyui)

    @staticmethod
    def _in_comfyui(family: str, own: Tensors, names: Layouts, seed: int, comfyui: ComfyUI) -> Tensors:
        """The same model in ComfyUI's layout; of a family that is not known by name, another of the same seed."""
        if family in ONE_LAYOUT:
            return own
        if family == "Z-Image":
            return fused(own)
        if family in CONVERTED:
            tensors = as_converted(own, CASES[family])
        elif family in MAPS:
            tensors = as_comfyui_names(own, comfyui, family)
        else:
            tensors = values(names.comfyui, seed)
        assert tensors.keys() == names.comfyui.keys()
        return tensors

    def file(self, model: str, layout: str, prefix: str) -> Path:
        path = self.folder / f"{model}-{layout}-{PREFIXES.index(prefix)}.safetensors"
        if not path.exists():
            tensors = {prefix + name: tensor for name, tensor in self.tensors[model, layout].items()}
            save_file(tensors | (BESIDE if prefix == PREFIXES[1] else {}), path)
        return path

    def expected(self, layout: str) -> Tensors:
        a, b, c = (self.tensors[model, layout] for model in "abc")
        return {name: a[name] + 0.5 * (b[name] - c[name]) for name in a}


def merged(files: Files, layout: str, prefix: str, others: str, second: str) -> str:
    """Merge A of one prefix and layout with B and C of another: "right" or "refused"; anything else is an error."""
    a = files.file("a", layout, prefix)
    b, c = (files.file(model, others, second) for model in "bc")
    out = files.folder / "out.safetensors"
    try:
        with job.open_merge(f"'{a}' + 0.5*('{b}' - '{c}')", fingerprints=False) as plan:
            job.run_merge(plan, out, overwrite=True)
    except FamilyError as error:
        names_both = f'"{prefix}' in str(error) and f'"{second}' in str(error)
        return "refused" if names_both else str(error)
    found = load_file(out)
    wanted = {prefix + name: tensor for name, tensor in files.expected(layout).items()}
    wanted |= BESIDE if prefix == PREFIXES[1] else {}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    return "right"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pair_of_files_is_merged_right_or_refused(family: str, comfyui: ComfyUI, tmp_path: Path) -> None:
    names = layouts(comfyui, family)
    files = Files(tmp_path, family, names, comfyui)
    count = {"right": 0, "refused": 0}
    for (layout, others), (at, prefix) in product(product(LAYOUTS, LAYOUTS), enumerate(PREFIXES)):
        outcome = merged(files, layout, prefix, others, PREFIXES[(at + 1) % len(PREFIXES)])
        meet = layout == others or family in (*ONE_LAYOUT, *MAPS, *CONVERTED, "Z-Image")
        assert outcome == ("right" if meet else "refused"), (layout, prefix, others)
        count[outcome] += 1
    print(f"{family}: {count}, {100 * names.in_common:.0f} % of the parameters have one name in both layouts")
