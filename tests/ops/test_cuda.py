"""The GPU arithmetic passes the contract: under Triton's interpreter everywhere, and on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from mergetool.ops.contract import Ops
from tests.ops.contract import OpsContract


@pytest.mark.gpu
class TestCudaOps(OpsContract):
    def make(self, capacity: int, registers: int) -> Ops:
        from mergetool.ops.cuda import CudaOps

        return CudaOps(capacity=capacity, registers=registers)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted: no GPU is needed")
class TestInterpretedCudaOps(OpsContract):
    @pytest.fixture(autouse=True)
    def _overflow_is_meant(self) -> Iterator[None]:
        with np.errstate(over="ignore", invalid="ignore"):
            yield

    def make(self, capacity: int, registers: int) -> Ops:
        from mergetool.ops.cuda import CudaOps

        return CudaOps(capacity=capacity, registers=registers, device="cpu")
