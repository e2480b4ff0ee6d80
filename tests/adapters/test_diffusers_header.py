"""The ranks that a LoRA's header states for diffusers, at the published widths, where other families' widths occur too."""

from __future__ import annotations

import json

from mergetool.adapters.alphas import HEADER
from mergetool.adapters.diffusers_header import header
from mergetool.arch.families.sdxl import SDXL_UNET
from mergetool.arch.families.z_image import REFERENCE_CONFIG, Z_IMAGE, reference_shapes
from tests.sdxl import PUBLISHED, shapes

Shapes = dict[str, tuple[int, ...]]


def lora(matrices: Shapes, prefix: str, down: str, up: str, *, flat: bool) -> Shapes:
    """The tensors of a LoRA of every matrix, with ranks of 4 and 8 by turns."""
    tensors: Shapes = {}
    for i, (name, (rows, columns)) in enumerate(matrices.items()):
        module = prefix + (name.removesuffix(".weight").replace(".", "_") if flat else name.removesuffix(".weight"))
        tensors |= {module + down: (4 << i % 2, columns), module + up: (rows, 4 << i % 2)}
    return tensors


def matrices(all_shapes: Shapes) -> Shapes:
    return {name: shape for name, shape in all_shapes.items() if len(shape) == 2 and name.endswith(".weight")}


def stated(entry: dict[str, str], component: str) -> dict[str, int]:
    """Module -> rank, by the header."""
    config = json.loads(entry[HEADER])
    ranks = config[f"{component}.rank_pattern"]
    return {module: ranks.get(module, config[f"{component}.r"]) for module in config[f"{component}.target_modules"]}


def test_every_module_of_a_published_z_image_has_its_rank() -> None:
    wanted = matrices(reference_shapes(REFERENCE_CONFIG, "diffusers"))
    assert (256, 1024) in wanted.values()  # t_embedder.mlp.2: SD2's width too
    entry = header(lora(wanted, "diffusion_model.", ".lora_A.weight", ".lora_B.weight", flat=False))
    assert list(stated(entry, Z_IMAGE.component).values()) == [4 << i % 2 for i in range(len(wanted))]


def test_every_matrix_of_a_published_sdxl_has_its_rank() -> None:
    """In sd-scripts' names. Most matrices have 1280 columns, as the embeddings that SDXL's refiner reads."""
    parts = matrices(shapes(PUBLISHED))
    native = {SDXL_UNET.stored_name(name, "comfyui"): shape for name, shape in parts.items()}
    entry = header(lora(native, "lora_unet_", ".lora_down.weight", ".lora_up.weight", flat=True))
    ranks = stated(entry, SDXL_UNET.component)
    assert [ranks[name.removesuffix(".weight")] for name in parts] == [4 << i % 2 for i in range(len(parts))]


def test_a_lora_of_lumina_has_none_since_its_modules_have_other_names_in_diffusers() -> None:
    wanted = {f"layers.{i}.attention.to_q.weight": (2304, 2304) for i in range(4)}
    assert header(lora(wanted, "diffusion_model.", ".lora_A.weight", ".lora_B.weight", flat=False)) == {}
