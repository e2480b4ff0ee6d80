"""How the rows of a fused ``attention.qkv`` divide into q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from mergetool.checkpoint.header import TensorInfo
from mergetool.checkpoint.names import quoted
from mergetool.errors import FamilyError

_OUT = ("out.weight", "to_out.0.weight")
_NORMS = ("q_norm.weight", "norm_q.weight", "k_norm.weight", "norm_k.weight")


@dataclass(frozen=True, slots=True)
class HeadRows:
    """Row counts from head counts: H*head_dim rows of q, then half of the rest each of k and of v.

    H*head_dim is the input width of the attention's output projection, head_dim the length of its q or k norm.
    With as many key as query heads that comes to equal thirds; nothing here assumes it. A block that lost one of
    those tensors divides like ``fallback``, another attention of the same model. ``tensors`` are under the model's own names.
    """

    tensors: Mapping[str, TensorInfo]
    fallback: str
    source: str

    def split(self, name: str) -> tuple[int, int, int]:
        """Rows of q, k and v in the tensor ``...attention.qkv.weight`` (or ``.bias``).

        Raises FamilyError, naming the tensor, its shape and what was wanted, when they cannot be told or do not
        come out as whole heads.
        """
        attention = name.rpartition(".qkv.")[0]
        shape = self.tensors[name].shape
        width = self._size(attention, _OUT, axis=1)
        head_dim = self._size(attention, _NORMS, axis=0)
        if width is None:
            self._refuse(name, f'an output projection "{attention}.out.weight" that says how many rows are q')
        kv, odd = divmod((shape[0] if shape else 0) - width, 2)
        if width == 0 or kv <= 0 or odd:
            self._refuse(name, f"{width} rows of q and an equal number each of k and v")
        if head_dim is not None and (head_dim == 0 or width % head_dim or kv % head_dim):
            self._refuse(name, f"whole heads of {head_dim} rows (q has {width}, k and v have {kv})")
        return width, kv, kv

    def _size(self, attention: str, leaves: tuple[str, ...], *, axis: int) -> int | None:
        for place in (attention, self.fallback):
            for leaf in leaves:
                info = self.tensors.get(f"{place}.{leaf}")
                if info is not None and len(info.shape) == axis + 1:
                    return info.shape[axis]
        return None

    def _refuse(self, name: str, wanted: str) -> NoReturn:
        raise FamilyError(
            f'"{self.source}": tensor {quoted(name)} has shape {list(self.tensors[name].shape)}, which cannot be '
            f"split into q, k and v: wanted {wanted}; the file is damaged or another architecture."
        )
