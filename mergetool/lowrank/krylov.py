"""The strongest directions of one matrix, from cheap products with it.

A block Krylov space of ``A^T A`` (block Lanczos with full reorthogonalisation; Golub & Van Loan, Matrix Computations,
section 10.3.6; Musco & Musco 2015 for its bounds) over the short side of the matrix. In a flat spectrum, which is what
a delta has below its low-rank part (rounding noise), it lost a third of the energy that subspace iteration with equally
wide blocks lost after nine passes; and since it keeps its blocks, they can be narrow, which is what makes a pass cheap.

Nothing here is a certificate. The products may be BF16; whoever uses the directions projects onto them once
more in float32 and states that energy (see lowrank.svd).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.cache
def fast_bfloat16() -> bool:
    """True where a BF16 matrix product is faster than a float32 one on this CPU.

    Decided by the CPU's instruction flags, never by a timing, so that the same machine always gives the same
    bytes. With AVX512-BF16 a product with 32 columns took 3.3 ms where float32 took 18 ms.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    flags = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, flag, bool)() for flag in flags)


def linear(inputs: Tensor, weights: Tensor) -> Tensor:
    """``inputs @ weights^T`` in float32.

    By oneDNN where torch has it: 223 GFLOP/s a core for 10240 x 3840 times 64 on an AMD EPYC 9005, where the BLAS behind
    ``@`` (MKL) reaches 75 there. Both are IEEE float32.
    """
    here = inputs.device.type == "cpu" and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if here and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        product: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weights, None, "none", [], "")
        return product
    return inputs @ weights.T


def gram(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right^T`` of two contiguous matrices in their own dtype, float32 or float64."""
    return linear(left, right) if left.dtype == torch.float32 else left @ right.T


class Products:
    """Matrix products with one delta [m, n], seen as a tall matrix A [long, short].

    ``delta`` is float32 and contiguous, ``sketch`` the same matrix in the dtype of the cheap products, ``total`` its
    squared Frobenius norm. ``passes`` counts the products, each of which reads the matrix once; ``small`` is the dtype
    for algebra on the results of cheap ones.
    """

    def __init__(self, delta: Tensor, sketch: Tensor, total: float) -> None:
        self.delta = delta
        self.total = total
        self.sketch = sketch
        self.tall = delta.shape[0] >= delta.shape[1]
        self.long, self.short = max(delta.shape), min(delta.shape)
        self.passes = 0
        # What cheap products make of an energy, relative. The worst of 12 deltas of ranks 1 to 20 in BF16: 7.6e-4 at a
        # short side of 200, 4.8e-4 at 1024, 1.5e-4 at 3840; 1e-8 was measured in float32.
        cheap = sketch.dtype == torch.bfloat16
        self.cheap_error = 2.0**-6 / self.short**0.5 if cheap else 1e-7
        # The rise of an energy from block to block is known better than the energy: its errors stay the same.
        self.cheap_rise = 5e-5 if cheap else 1e-7
        # What is worth keeping of them: float64 algebra on BF16 products took 6 % of an extraction.
        self.small = torch.float32 if cheap else torch.float64

    def _forward(self, matrix: Tensor, rows: Tensor) -> Tensor:
        self.passes += 1
        return (matrix if self.tall else matrix.T) @ rows.T

    def _back(self, matrix: Tensor, columns: Tensor) -> Tensor:
        self.passes += 1
        # Two layouts of one product: these are the faster ones of oneDNN (6.5 against 9 ms).
        count = columns.shape[0]
        return columns.T @ matrix[:count] if self.tall else (matrix[:, :count] @ columns).T

    def image(self, rows: Tensor) -> Tensor:
        """A @ rows^T [long, b] in float32, for float64 ``rows`` [b, short]."""
        self.passes += 1
        exact = rows.float().contiguous()
        return linear(self.delta, exact) if self.tall else linear(exact, self.delta.T).T

    def back(self, columns: Tensor) -> Tensor:
        """columns^T @ A [b, short] in float64, by a float32 product with ``columns`` [long, b]."""
        return self._back(self.delta, columns).double()

    def cheap_image(self, rows: Tensor) -> Tensor:
        """A @ rows^T [long, b] in the dtype of the sketch, from one cheap product."""
        return self._forward(self.sketch, rows.to(self.sketch.dtype))

    def cheap_back(self, columns: Tensor) -> Tensor:
        """columns^T @ A [b, short] in ``small``, by one cheap product.

        Fewer ``columns`` [k, b] meet A's first k rows.
        """
        return self._back(self.sketch, columns.to(self.sketch.dtype)).to(self.small)


def orthonormal_rows(rows: Tensor, *, cutoff: float = 1e-14, rounds: int = 2) -> Tensor:
    """An orthonormal basis [r, n] of the row space of ``rows`` [b, n], strongest first. It keeps their dtype.

    From the eigenvectors of the Gram matrix (SVQB, Stathopoulos & Wu 2002): directions whose energy is below
    ``cutoff`` times the strongest (in float32, 1e-6 times) are left out, so a rank-deficient block is no special case.
    Two ``rounds``, because one loses half the digits; one is enough for rows that are nearly orthonormal.
    """
    if rows.dtype == torch.float32:
        cutoff = max(cutoff, 1e-6)
    for _ in range(rounds):
        energies, vectors = torch.linalg.eigh(gram(rows, rows).double())
        keep = energies > max(float(energies[-1]), 1e-300) * cutoff
        rows = (vectors[:, keep] / energies[keep].sqrt()).T.flip(0).to(rows.dtype) @ rows
    return rows


class BlockKrylov:
    """An orthonormal basis that grows block by block, and A^T A projected onto it. It is of the short side.

    ``expand`` adds directions; ``energies`` are the squared singular values the basis knows of, largest first
    (Ritz values: never above the true ones, but for the rounding of the cheap products); ``strongest`` gives
    the directions that hold the most energy. The basis is kept in the dtype ``products.small``, what is projected onto it
    in float64.
    """

    def __init__(self, products: Products, generator: torch.Generator) -> None:
        self._products = products
        self._generator = generator
        self._basis = torch.empty(0, products.short, dtype=products.small)
        self._images: list[Tensor] = []  # A @ block^T, transposed, of every block of the basis
        self._last = torch.empty(products.long, 0)  # of the last block, as it came
        self._projected = torch.empty(0, 0, dtype=torch.float64)
        self.energies = torch.empty(0, dtype=torch.float64)

    @property
    def size(self) -> int:
        return self._basis.shape[0]

    def _gaussian(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)

    def _candidates(self, width: int, fresh: int) -> Tensor:
        """``width`` directions to try next: the image of the last block outside the basis, and random ones."""
        if self.size == 0:
            return orthonormal_rows(self._start(width))
        image = self._products.cheap_back(self._last)
        rest = image - (image @ self._basis.T) @ self._basis
        if float(rest.square().sum()) > 1e-12 * float(self.energies[0]) ** 2:
            rest = orthonormal_rows(rest, cutoff=1e-10, rounds=1)[: width - fresh]
        else:
            rest = rest[:0]
        random = self._gaussian(width - rest.shape[0], self._products.short).to(rest.dtype)
        return torch.cat([rest, random / self._products.short**0.5])

    def _start(self, width: int) -> Tensor:
        """Random combinations of A's rows: of the first quarter, if that holds a fair share of the energy.

        All rows took 6 % longer for the whole search and held no more in the end.
        """
        products = self._products
        rows = products.cheap_back(self._gaussian(products.long // 4, width))
        if float(rows.square().sum()) > products.total * width / 16:
            return rows
        return products.cheap_back(self._gaussian(products.long, width))

    def expand(self, width: int, fresh: int = 0) -> None:
        """Add up to ``width`` directions, ``fresh`` of them random, by two cheap passes. ``energies`` are renewed.

        One brings the candidates, the other their images, from which the energies follow: the last block needs no third.
        """
        width = min(width, self._products.short - self.size)
        if width == 0:
            return
        block = self._candidates(width, fresh)
        # One round each here and in _candidates keeps the basis orthonormal to 5e-15 in float64: only what lies outside
        # it was a candidate, so neither step cancels.
        block = orthonormal_rows(block - (block @ self._basis.T) @ self._basis, rounds=1)
        old, new = self.size, self.size + block.shape[0]
        self._basis = torch.cat([self._basis, block])
        self._last = self._products.cheap_image(block)
        self._images.append(self._last.T.to(self._products.small).contiguous())
        overlap = torch.cat([gram(image, self._images[-1]) for image in self._images]).double()
        projected = torch.empty(new, new, dtype=torch.float64)
        projected[:old, :old] = self._projected
        projected[:, old:] = overlap
        projected[old:, :old] = overlap[:old].T
        projected[old:, old:] = (overlap[old:] + overlap[old:].T) / 2
        self._projected = projected
        self.energies = torch.linalg.eigvalsh(projected).flip(0).clamp_min_(0.0)

    def strongest(self, count: int) -> Tensor:
        """Orthonormal rows [count, short] that hold the most energy of all in the basis, float64."""
        vectors: Tensor = torch.linalg.eigh(self._projected)[1].flip(1)
        return orthonormal_rows(vectors[:, :count].T @ self._basis.double(), rounds=1)
