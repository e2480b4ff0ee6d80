"""The merge arithmetic on a CUDA GPU: record a chunk's instructions, run one fused kernel.

The kernel reads each stored byte once and writes each result once (see ``mergetool_kernels.blend``). Bytes cross to the
device through pinned memory, on a stream of this instance's own, so instances in several threads overlap their copies
with each other's work.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mergetool.checkpoint.dtypes import DType
from mergetool.ops.cpu import CpuOps
from mergetool.ops.movement import Movement
from mergetool.ops.rounding import NEAREST, ErrorFeedback, Nearest, Rounding, Stochastic
from mergetool.ops.tensors import TORCH
from mergetool_kernels import blend

_LEAST, _MOST = 1e-30, 1e30
"""Energies of a chunk between which squares in float32 neither vanish nor overflow."""


class CudaOps:
    """The ``Ops`` contract over one chunk in device memory. ``device`` "cpu" runs under Triton's interpreter.

    Holds two buffers an operand and two for the result, ``capacity`` elements each, one pinned and one on the device. A
    chunk begins with a load into register 0. Error feedback, which goes element by element, is left to the CPU. Raises
    torch.OutOfMemoryError when the device has no room, torch.AcceleratorError when it fails.
    """

    def __init__(self, *, capacity: int, registers: int, device: str = "cuda") -> None:
        self._capacity = capacity
        self._registers = registers
        self._device = torch.device(device)
        self.stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]
        # A thread that waits must sleep: by default it would spin on the core that another one's copy needs.
        self._done = torch.cuda.Event(blocking=True) if self.stream is not None else None  # type: ignore[no-untyped-call]
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}  # pinned and on the device, of each slot; -1 is the result
        self._program: list[tuple[int, int, int]] = []
        self._factors: list[float] = []
        self._operands: list[Tensor] = []
        self._dtypes: list[DType] = []
        self._figures: list[Tensor | None] = []
        self._result = torch.empty(0, dtype=torch.uint8)
        self._rounding: Rounding = NEAREST
        self._counts: list[int] | None = None
        self._movement: Movement | None = None
        self.branches: set[blend.Branch] = set()
        """The ways that launches converted the stored formats, for tests."""

    def load(self, register: int, raw: memoryview, dtype: DType) -> None:
        if register == 0:
            self._wait()  # an abandoned chunk's copies still read the pinned buffers
        slot = 0 if register == 0 else len(self._operands)
        pinned, on_device = self._buffer(slot, len(raw))
        if len(raw):
            np.copyto(pinned.numpy(), np.frombuffer(raw, np.uint8))
        with torch.cuda.stream(self.stream):
            on_device.copy_(pinned, non_blocking=True)
        self.take(register, on_device, dtype)

    def take(self, register: int, stored: Tensor, dtype: DType) -> None:
        """Set a register from stored bytes, uint8, on the device.

        They are there already, or will be when the stream gets there.
        """
        if register == 0:
            self._program, self._factors, self._operands, self._dtypes = [], [], [], []
            self._counts = self._movement = None
        place = next((i for i, held in enumerate(self._operands) if held.data_ptr() == stored.data_ptr()), None)
        if place is None:
            place = len(self._operands)
            self._operands.append(stored.view(TORCH[dtype]))
            self._dtypes.append(dtype)
        self._program.append((blend.LOAD.value, register, place))

    def scale(self, register: int, factor: float) -> None:
        self._program.append((blend.SCALE.value, register, len(self._factors)))
        self._factors.append(factor)

    def add(self, register: int, other: int) -> None:
        self._program.append((blend.ADD.value, register, other))

    def subtract(self, register: int, other: int) -> None:
        self._program.append((blend.SUBTRACT.value, register, other))

    def is_finite(self, register: int) -> bool:
        if register == 0 and self._counts is not None:
            return self._counts[blend.NON_FINITE] == 0
        return bool(torch.isfinite(self._values(register)).all())

    def first_non_finite(self, register: int) -> tuple[int, int]:
        bad = ~torch.isfinite(self._values(register))
        return int(bad.sum()), int(bad.to(torch.uint8).argmax())

    def store(
        self, register: int, dtype: DType, rounding: Rounding = NEAREST, first: int | None = None
    ) -> tuple[memoryview, int]:
        if isinstance(rounding, ErrorFeedback):
            self._rounding = rounding
            return self._replay().store(register, dtype, rounding)
        self.launch(register, dtype, rounding, first)
        return self.collect()

    def launch(self, register: int, dtype: DType, rounding: Nearest | Stochastic, first: int | None = None) -> None:
        """Start a ``store`` and return at once; `collect` waits for it."""
        self._rounding = rounding
        program, base = list(self._program), None
        if first is not None:
            base = program.pop()[2]
            if not any(step[0] == blend.LOAD.value and step[2] == base for step in program):
                program.insert(0, (blend.LOAD.value, 0, base))  # the kernel notes it, and the program goes over it
        operands = [blend.KernelOperand(values) for values in self._operands]
        if register or not blend.fits(program, operands):
            program, operands = [(blend.LOAD.value, 0, 0)], [blend.KernelOperand(self._values(register))]
            if base is not None:
                program.insert(0, (blend.LOAD.value, 0, 1))
                operands.append(blend.KernelOperand(self._operands[base]))
                base = 1
        pinned, on_device = self._buffer(-1, self._operands[0].numel() * dtype.itemsize)
        with torch.cuda.stream(self.stream):
            result = blend.blend(
                program,
                operands,
                self._factors,
                on_device.view(TORCH[dtype]),
                stochastic_key=rounding.key if isinstance(rounding, Stochastic) else None,
                first=rounding.first if isinstance(rounding, Stochastic) else 0,
                base=base,
            )
            pinned.copy_(on_device, non_blocking=True)
            self._figures = [
                None if part is None else part.to("cpu", non_blocking=True) for part in (result.counts, result.sums)
            ]
            if self._done is not None:
                self._done.record(self.stream)
        self._result = pinned
        self.branches.add(result.branch)

    def collect(self) -> tuple[memoryview, int]:
        """Wait for `launch`. Returns the stored bytes and the number of elements beyond the range."""
        if self._done is not None:
            self._done.synchronize()
        counts, sums = self._figures
        assert counts is not None
        self._counts = counts.numpy().sum(axis=0).tolist()
        if sums is not None:
            energy, kept = sums.numpy().sum(axis=0).tolist()
            moved, eaten, below = self._counts[blend.MOVED :]
            self._movement = Movement(moved, eaten, below, energy, kept)
        return self._result.numpy().data, self._counts[blend.BEYOND]

    def measure(self, register: int, first: int, dtype: DType) -> Movement:
        if self._movement is not None and _LEAST < self._movement.delta_energy < _MOST:
            return self._movement
        cpu = self._replay()
        cpu.store(register, dtype, self._rounding)
        return cpu.measure(register, first, dtype)

    def _replay(self) -> CpuOps:
        """Compute the chunk once more, on the CPU: for rare cases, and for work that has to go element by element."""
        cpu = CpuOps(capacity=self._operands[0].numel(), registers=self._registers)
        for operation, register, argument in self._program:
            match operation:
                case blend.LOAD.value:
                    raw = self._operands[argument].view(torch.uint8).cpu().numpy()
                    cpu.load(register, raw.data, self._dtypes[argument])
                case blend.SCALE.value:
                    cpu.scale(register, self._factors[argument])
                case blend.ADD.value:
                    cpu.add(register, argument)
                case _:
                    cpu.subtract(register, argument)
        return cpu

    def _wait(self) -> None:
        if self.stream is not None and self._done is not None:
            self._done.record(self.stream)
            self._done.synchronize()

    def _buffer(self, slot: int, size: int) -> tuple[Tensor, Tensor]:
        """``size`` bytes of pinned and of device memory; a slot's buffers grow to the size its dtype needs, once."""
        held = self._buffers.get(slot)
        if held is None or held[0].numel() < size:
            # Whole capacities of 1, 2, 4 or 8 bytes an element, so that the first chunk decides.
            width = 1 << max(0, -(-size // self._capacity) - 1).bit_length()
            pinned = torch.empty(self._capacity * width, dtype=torch.uint8, pin_memory=self.stream is not None)
            held = self._buffers[slot] = (pinned, torch.empty_like(pinned, device=self._device))
        return held[0][:size], held[1][:size]

    def _values(self, register: int) -> Tensor:
        """A register's float32 values, by one torch operation an instruction: any depth, any number of operands."""
        values: dict[int, Tensor] = {}
        with torch.cuda.stream(self.stream):
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
