"""The merge arithmetic on a CUDA GPU: the instructions of a chunk are recorded, and one fused kernel runs them.

The kernel reads each stored byte once and writes each result once (see ``mergetool_kernels.blend``). Bytes cross to the
device through pinned memory, on a stream of this instance's own, so instances in several threads overlap their copies
with each other's work.
"""

from __future__ import annotations

import numpy as np
import torch
from mergetool_kernels import blend
from torch import Tensor

from mergetool.checkpoint.dtypes import DType
from mergetool.ops.cpu import TORCH


class CudaOps:
    """The ``Ops`` contract over one chunk in device memory; ``device`` "cpu" runs under Triton's interpreter.

    Holds two buffers an operand, ``capacity`` elements of its dtype each, one pinned and one on the device. A chunk
    begins with a load into register 0. Raises torch.OutOfMemoryError when the device has no room left.
    """

    def __init__(self, *, capacity: int, registers: int, device: str = "cuda") -> None:
        self._capacity = capacity
        self._registers = registers
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._pinned: list[Tensor] = []
        self._on_device: list[Tensor] = []
        self._begin()
        self.branches: set[blend.Branch] = set()

    def load(self, register: int, raw: memoryview, dtype: DType) -> None:
        if register == 0:
            self._begin()
        slot = len(self._operands)
        pinned, on_device = self._buffers(slot, len(raw))
        if len(raw):
            np.copyto(pinned.numpy(), np.frombuffer(raw, np.uint8))
        with torch.cuda.stream(self._stream):
            on_device.copy_(pinned, non_blocking=True)
        self._operands.append(on_device.view(TORCH[dtype]))
        self._program.append((blend.LOAD.value, register, slot))

    def scale(self, register: int, factor: float) -> None:
        self._program.append((blend.SCALE.value, register, len(self._factors)))
        self._factors.append(factor)

    def add(self, register: int, other: int) -> None:
        self._program.append((blend.ADD.value, register, other))

    def subtract(self, register: int, other: int) -> None:
        self._program.append((blend.SUBTRACT.value, register, other))

    def is_finite(self, register: int) -> bool:
        if register == 0 and self._non_finite is not None:
            return self._non_finite == 0
        return bool(torch.isfinite(self._run(register)).all())

    def first_non_finite(self, register: int) -> tuple[int, int]:
        bad = ~torch.isfinite(self._run(register))
        return int(bad.sum()), int(bad.to(torch.uint8).argmax())

    def store(self, register: int, dtype: DType) -> tuple[memoryview, int]:
        count = self._operands[0].numel()
        pinned, on_device = self._buffers(len(self._operands), count * dtype.itemsize)
        out = on_device.view(TORCH[dtype])
        program, operands = self._program, [blend.Operand(values) for values in self._operands]
        with torch.cuda.stream(self._stream):
            if register or not blend.fits(program, operands):
                values = self._run(register)
                program, operands = [(blend.LOAD.value, 0, 0)], [blend.Operand(values)]
            result = blend.blend(program, operands, self._factors, out)
            pinned.copy_(on_device, non_blocking=True)
            counts = result.counts.cpu() if result.counts is not None else torch.zeros(0, 5)
        self._wait()
        self.branches.add(result.branch)
        totals = counts.sum(0).tolist()
        if register == 0:
            self._non_finite = totals[blend.NON_FINITE]
        return pinned.numpy().data, totals[blend.BEYOND]

    def _begin(self) -> None:
        self._wait()  # an abandoned chunk's copies still read the pinned buffers
        self._program: list[tuple[int, int, int]] = []
        self._factors: list[float] = []
        self._operands: list[Tensor] = []
        self._non_finite: int | None = None

    def _wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def _buffers(self, slot: int, size: int) -> tuple[Tensor, Tensor]:
        """``size`` bytes of pinned and of device memory; a slot's buffers grow to what its dtype needs, once."""
        while len(self._pinned) <= slot:
            self._pinned.append(torch.empty(0, dtype=torch.uint8))
            self._on_device.append(torch.empty(0, dtype=torch.uint8, device=self._device))
        if self._pinned[slot].numel() < size:
            # Whole capacities of 1, 2, 4 or 8 bytes an element, so that the first chunk decides.
            width = 1 << (-(-size // self._capacity) - 1).bit_length()
            room = self._capacity * width
            self._on_device[slot] = torch.empty(room, dtype=torch.uint8, device=self._device)
            self._pinned[slot] = torch.empty(room, dtype=torch.uint8, pin_memory=self._stream is not None)
        return self._pinned[slot][:size], self._on_device[slot][:size]

    def _run(self, register: int) -> Tensor:
        """A register's float32 values, by one torch operation an instruction: any depth, any number of operands."""
        values: dict[int, Tensor] = {}
        with torch.cuda.stream(self._stream):
            for operation, target, argument in self._program:
                if operation == blend.LOAD.value:
                    values[target] = self._operands[argument].float()
                elif operation == blend.SCALE.value:
                    values[target] = values[target] * self._factors[argument]
                elif operation == blend.ADD.value:
                    values[target] = values[target] + values[argument]
                else:
                    values[target] = values[target] - values[argument]
        self._wait()
        return values[register]
