"""Tensor tables for the arch tests: what a header says, without a file."""

from __future__ import annotations

from collections.abc import Mapping

from mergetool.arch import Anatomy, recognise
from mergetool.arch.families.z_image import reference_shapes
from mergetool.checkpoint.dtypes import BF16, DType
from mergetool.checkpoint.header import Header, TensorInfo

# The smallest Z-Image whose heads are several and whose dimensions differ from each other.
TINY = {
    "dim": 32,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 16,
    "axes_dims": [8, 4, 4],
    "axes_lens": [256, 32, 32],
}
OMNI = {"siglip_feat_dim": 1152}


def table(shapes: Mapping[str, tuple[int, ...]], *, dtype: DType = BF16, prefix: str = "") -> dict[str, TensorInfo]:
    """A header's table for tensors of these shapes, all of one dtype."""
    return dict(Header.plan((prefix + name, dtype, shape) for name, shape in shapes.items()).tensors)


def z_image(config: Mapping[str, object] = TINY, layout: str = "comfyui", prefix: str = "") -> dict[str, TensorInfo]:
    """The table of a Z-Image file."""
    return table(reference_shapes(config, layout), prefix=prefix)


def anatomy(config: Mapping[str, object] = TINY, layout: str = "comfyui", prefix: str = "") -> Anatomy:
    """The anatomy of a Z-Image file."""
    return recognise(z_image(config, layout, prefix), source="model.safetensors")
