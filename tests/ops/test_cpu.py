"""The CPU arithmetic passes the contract."""

from __future__ import annotations

from mergetool.ops.contract import Ops
from mergetool.ops.cpu import CpuOps
from tests.ops.contract import OpsContract


class TestCpuOps(OpsContract):
    def make(self, capacity: int, registers: int) -> Ops:
        return CpuOps(capacity=capacity, registers=registers)
