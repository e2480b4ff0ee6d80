"""Merges on a GPU: the CPU's bytes, whatever fits and whatever fails. Interpreted where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mergetool.checkpoint.reader import Checkpoint
from mergetool.engine import device as devices
from mergetool.engine import gpu, job
from mergetool.engine.device import CPU, Device
from mergetool.engine.feeding import uploader
from mergetool.engine.runs import Outcome
from mergetool.errors import DeviceError, NonFiniteError, UsageError
from mergetool.options.merging import MergeOptions

BRIDGE = "'alk.safetensors' + 171.1 * ('a.safetensors' - 'b.safetensors')"
ROOM = 20_000_000
FEW = (
    "layers.0.attention.to_q.weight",
    "layers.0.attention_norm1.weight",
    "x_pad_token",
)  # interpreted, all takes minutes


@pytest.fixture(autouse=True)
def _overflow_is_meant() -> Iterator[None]:
    with np.errstate(over="ignore", invalid="ignore"):
        yield


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """The first GPU, or the CPU under Triton's interpreter, with jobs so small that every tensor takes several."""
    monkeypatch.setattr(gpu, "CHUNK", 1 << 12)
    monkeypatch.setattr(uploader, "PIECE", 1 << 12)
    monkeypatch.setattr(gpu, "RING", 1 << 17)
    return Device(("cuda:0",) if torch.cuda.is_available() else ("cpu",), ROOM)


def merged(name: str, options: MergeOptions, device: Device) -> tuple[bytes, Outcome]:
    with job.open_merge(BRIDGE, options) as plan:
        outcome = job.run_merge(plan, Path(name), device=device)
    return Path(name).read_bytes(), outcome


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "error-feedback"])
def test_the_bytes_are_the_cpus(family: Path, device: Device, rounding: str) -> None:
    options = MergeOptions(include=FEW, rounding=rounding, seed=7 if rounding == "stochastic" else 0)  # type: ignore[arg-type]
    wanted, by_cpu = merged("cpu.safetensors", options, CPU)
    found, by_gpu = merged("gpu.safetensors", options, device)
    assert found == wanted
    assert by_gpu.movements.total.moved == by_cpu.movements.total.moved
    assert by_gpu.movements.total.eaten == by_cpu.movements.total.eaten
    assert by_gpu.movements.total.projection == pytest.approx(by_cpu.movements.total.projection, rel=1e-6)


def test_small_tensors_do_not_keep_large_ones_from_being_read(
    family: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that fits in the ring is being read before the first job is waited for, however many jobs that are."""
    takes: list[bool] = []
    take = gpu.Ring.take

    def noted(self: gpu.Ring, size: int, *, wait: bool = False) -> object:
        region = take(self, size, wait=wait)
        takes.append(region is not None)
        return region

    monkeypatch.setattr(gpu.Ring, "take", noted)
    merged("gpu.safetensors", MergeOptions(include=("norm",)), device)
    assert [*takes, False].index(False) > 2 * gpu.SEATS


def test_page_locked_memory_does_not_grow_with_the_models(family: Path, device: Device) -> None:
    def pinned(text: str) -> int:
        with job.open_merge(text) as plan:
            return gpu.room(plan, Device(device.names, 1 << 30)).pinned

    for name in "cdef":
        shutil.copyfile("a.safetensors", f"{name}.safetensors")
    more = " + ".join(f"2 * ('{name}.safetensors' - 'b.safetensors')" for name in "cdef")
    assert pinned(f"{BRIDGE} + {more}") <= pinned(BRIDGE)


def test_what_the_gpu_has_no_room_for_is_computed_by_the_cpu_and_named(family: Path, device: Device) -> None:
    options = MergeOptions(include=FEW)
    found, outcome = merged("gpu.safetensors", options, Device(device.names, 1000))
    assert found == merged("cpu.safetensors", options, CPU)[0]
    assert set(outcome.off_device) >= {"layers.0.attention_norm1.weight"}


def test_memory_that_runs_out_in_the_middle_costs_time_only(
    family: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergetool.ops.cuda import CudaOps

    launch, calls = CudaOps.launch, iter(range(1000))

    def now_and_then(self: CudaOps, *arguments: object) -> None:
        if next(calls) % 3 == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        launch(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(CudaOps, "launch", now_and_then)
    options = MergeOptions(include=FEW)
    found, outcome = merged("gpu.safetensors", options, device)
    assert found == merged("cpu.safetensors", options, CPU)[0]
    assert outcome.off_device


def test_a_lost_gpu_is_one_sentence_and_no_output(
    family: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergetool.ops.cuda import CudaOps

    def lost(self: CudaOps) -> tuple[memoryview, int]:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(CudaOps, "collect", lost)
    with pytest.raises(DeviceError, match=r"failed \(CUDA error: unspecified launch failure\); `device=cpu`"):
        merged("gpu.safetensors", MergeOptions(include=FEW), device)
    assert not Path("gpu.safetensors").exists()


def test_nan_in_an_input_is_named_as_the_cpu_names_it(family: Path, device: Device) -> None:
    with Checkpoint.open(Path("a.safetensors")) as opened:
        _, offset = opened.locate("layers.0.attention_norm1.weight")
    with Path("a.safetensors").open("r+b") as file:
        file.seek(offset + 6)
        file.write(b"\xc0\x7f")
    with pytest.raises(NonFiniteError) as by_cpu:
        merged("cpu.safetensors", MergeOptions(include=FEW), CPU)
    with pytest.raises(NonFiniteError) as by_gpu:
        merged("gpu.safetensors", MergeOptions(include=FEW), device)
    assert str(by_gpu.value) == str(by_cpu.value)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", ""])
def test_a_device_that_is_no_device_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="has to be auto, cpu, cuda or cuda:NUMBER"):
        devices.choose(name, work=10**12)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_asking_for_a_gpu_that_is_not_there_says_so_and_auto_takes_the_cpu() -> None:
    with pytest.raises(UsageError, match=r"`device=cuda` needs a CUDA GPU.*`device=cpu` gives the same bytes"):
        devices.choose("cuda", work=10**12)
    assert devices.choose("auto", work=10**12) == CPU


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("cuda: Optional[str] = None\nhip: Optional[str] = None\n", True),
        ("cuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n", False),
        ("cuda: Optional[str] = None\nhip: Optional[str] = '6.4'\n", False),
        ("cuda = None\nhip = None\n", True),
        ("something else\n", False),
        (None, False),
    ],
)
def test_auto_asks_torch_unless_its_version_file_says_it_is_for_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str | None, expected: bool
) -> None:
    if said is not None:
        (tmp_path / "version.py").write_text(said)
    place = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: place)
    asked: list[str] = []
    monkeypatch.setattr(devices, "_obstacle", lambda name, kernels: asked.append(name) or "a GPU")
    assert devices.choose("auto", work=10**12) == CPU
    assert (not asked) == expected


def test_a_gpu_without_triton_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_torch_is_for_cpus", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs Triton, which is missing \(.* -m pip install .*triton"):
        devices.choose("cuda", work=10**12)
    assert devices.choose("auto", work=10**12) == CPU


@pytest.mark.gpu
def test_tensors_past_two_to_the_31_elements_are_whole() -> None:
    from mergetool_kernels import blend

    count = (1 << 31) + 4099
    values = (
        torch.arange(count, device="cuda", dtype=torch.int64).remainder_(97).to(torch.uint8).view(torch.float8_e4m3fn)
    )
    out = torch.empty(count, dtype=torch.float8_e4m3fn, device="cuda")
    blend.blend([(0, 0, 0)], [blend.KernelOperand(values)], [], out)
    assert torch.equal(out.view(torch.uint8), values.view(torch.uint8))
