"""Several merges in one pass: the bytes of single runs, every input byte read once, all outputs or none."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mergetool.checkpoint import dtypes
from mergetool.checkpoint.inputs import InputFile
from mergetool.checkpoint.reader import Checkpoint
from mergetool.engine import bundles, job, jobs, memory
from mergetool.engine.device import Device
from mergetool.errors import NonFiniteError, UsageError
from mergetool.options.merging import MergeOptions
from tests.quant.models import quantised

Items = list[tuple[str, MergeOptions]]

DELTA = "('a.safetensors' - 'b.safetensors')"
INPUTS = {"alk.safetensors", "a.safetensors", "b.safetensors"}


def scaled(multiplier: float, **options: Any) -> tuple[str, MergeOptions]:
    return f"'alk.safetensors' + {multiplier} * {DELTA}", MergeOptions(**options)


MULTIPLIERS = [scaled(m, protect=("refiner",)) for m in (5, 10, 20, 40)]
MIXED = [
    scaled(5),
    scaled(5, protect=("refiner",), dtype=dtypes.F8_E4M3),
    scaled(20, rounding="stochastic", seed=3),
    scaled(20, rounding="error-feedback"),
    scaled(10, layout="diffusers", dtype=dtypes.F16),
    scaled(10, multipliers=(("ffn", 0), ("layers.1", 2))),
    (f"'b.safetensors' + 2 * {DELTA}", MergeOptions(dtype=dtypes.F32)),
    (f"slerp('alk.safetensors', 'a.safetensors', t=0.3) + 0.5 * {DELTA}", MergeOptions()),
]
QUANTISED = [
    scaled(5, quant="fp8-scaled"),
    scaled(20, quant="fp8-scaled"),
    scaled(20, quant="fp8-scaled", scale_search=True),
    scaled(20, quant="nvfp4", rounding="stochastic", seed=1),
    scaled(20, quant="fp8-scaled", rounding="error-feedback"),
    scaled(40, dtype=dtypes.BF16),
]


def alone(items: Items) -> list[bytes]:
    """What each merge makes when it is run by itself."""
    found = []
    for text, options in items:
        with job.open_merge(text, options) as plan:
            job.run_merge(plan, Path("alone.safetensors"), overwrite=True)
        found.append(Path("alone.safetensors").read_bytes())
        Path("alone.safetensors").unlink()
    return found


def together(items: Items, **how: Any) -> list[bytes]:
    outputs = [Path(f"out-{i}.safetensors") for i in range(len(items))]
    with job.open_merges(items) as plans:
        job.run_merges(plans, outputs, overwrite=True, **how)
    return [output.read_bytes() for output in outputs]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tensors of a few thousand elements take several jobs."""
    monkeypatch.setattr(jobs, "CHUNK", 1 << 11)
    monkeypatch.setattr(jobs, "ROWS_CHUNK", 1 << 13)


class Counting:
    """Counts how often each byte of the input files is fetched while a run reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: dict[str, Counter[tuple[int, int]]] = {}
        self._lock = threading.Lock()
        original = InputFile.read_into

        def read_into(file: InputFile, buffer: memoryview, offset: int) -> None:
            with self._lock:
                self.read.setdefault(file.path.name, Counter())[offset, len(buffer)] += 1
            original(file, buffer, offset)

        monkeypatch.setattr(InputFile, "read_into", read_into)

    def bytes_of(self, name: str) -> int:
        return sum(size * times for (_, size), times in self.read[name].items())


def data_size(name: str) -> int:
    with Checkpoint.open(Path(name)) as opened:
        return sum(info.nbytes for info in opened.tensors.values())


@pytest.mark.usefixtures("family", "small_chunks")
@pytest.mark.parametrize("items", [MULTIPLIERS, MIXED, QUANTISED], ids=["multipliers", "mixed", "quantised"])
def test_every_output_is_what_its_merge_alone_makes(items: Items) -> None:
    expected = alone(items)
    assert len(set(expected)) == len(items)
    for threads in (1, 4):
        assert together(items, threads=threads) == expected


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("container", ["fp8", "nvfp4"])
def test_quantised_inputs_give_the_bytes_of_single_runs(family: Path, container: str) -> None:
    for name in ("alk", "a"):
        quantised(family / f"q-{name}.safetensors", family / f"{name}.safetensors", container)
    first = "'q-alk.safetensors' + {} * ('q-a.safetensors' - 'b.safetensors')"
    items = [(first.format(m), MergeOptions(dtype=dtype)) for m in (5, 20) for dtype in (dtypes.BF16, dtypes.F8_E4M3)]
    assert together(items, reader="pread") == alone(items)


@pytest.mark.usefixtures("family", "small_chunks")
@pytest.mark.parametrize("items", [[scaled(5), scaled(10)], MIXED], ids=["multipliers", "mixed"])
def test_every_input_byte_is_read_once(items: Items, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = [Path(f"out-{i}.safetensors") for i in range(len(items))]
    with job.open_merges(items) as plans, monkeypatch.context() as patched:
        counting = Counting(patched)
        job.run_merges(plans, outputs, reader="pread")
    assert {name: counting.bytes_of(name) for name in INPUTS} == {name: data_size(name) for name in INPUTS}


@pytest.mark.usefixtures("family", "small_chunks")
def test_protected_bytes_of_the_other_models_are_not_read_and_the_progress_counts_what_is() -> None:
    told: list[int] = []
    with job.open_merges(MULTIPLIERS) as plans:
        job.run_merges(plans, [Path(f"out-{i}.safetensors") for i in range(4)], progress=told.append)
        assert sum(told) == job.bytes_moved(plans)
        assert job.bytes_moved(plans) == plans[0].bytes_read + 4 * plans[0].header.data_size


@pytest.mark.usefixtures("family")
def test_a_model_is_opened_and_its_fingerprint_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: Counter[str] = Counter()
    original = Checkpoint.fingerprint

    def fingerprint(checkpoint: Checkpoint) -> str:
        taken[checkpoint.source] += 1
        return original(checkpoint)

    monkeypatch.setattr(Checkpoint, "fingerprint", fingerprint)
    with job.open_merges([scaled(5), (f"'b.safetensors' + {DELTA}", MergeOptions())]) as plans:
        checkpoints = [{model.name: model.checkpoint for model in plan.inputs} for plan in plans]
    assert taken == Counter(INPUTS)
    assert checkpoints[0]["b.safetensors"] is checkpoints[1]["b.safetensors"]


@pytest.mark.usefixtures("family", "small_chunks")
def test_the_figures_of_each_output_are_those_of_its_merge_alone() -> None:
    items = [scaled(5), scaled(1_000_000, dtype=dtypes.F8_E4M3), scaled(20, quant="fp8-scaled")]
    single = []
    for i, (text, options) in enumerate(items):
        with job.open_merge(text, options) as plan:
            single.append(job.run_merge(plan, Path(f"alone-{i}.safetensors"), threads=1))
    with job.open_merges(items) as plans:
        found = job.run_merges(plans, [Path(f"out-{i}.safetensors") for i in range(3)], threads=1)
    assert found == single
    assert [bool(outcome.capped) for outcome in found] == [False, True, False]


# ---- all or nothing


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("threads", [1, 4])
def test_an_output_that_overflows_is_named_and_none_is_published(family: Path, threads: int) -> None:
    before = sorted(family.iterdir())
    items = [scaled(5), scaled(1e9, dtype=dtypes.F16), scaled(10)]
    with pytest.raises(NonFiniteError, match=r'^"out-1\.safetensors": tensor ".*write bf16'):
        together(items, threads=threads)
    assert sorted(family.iterdir()) == before


def test_an_interrupted_run_publishes_nothing(family: Path) -> None:
    before = sorted(family.iterdir())

    def interrupt(_: int) -> None:
        assert len(list(family.glob(".out-*.mergetool-*"))) == 4  # all are staged
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        together(MULTIPLIERS, progress=interrupt)
    assert sorted(family.iterdir()) == before


def test_outputs_stay_as_they_were_when_the_last_one_cannot_be_synced(
    family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergetool.checkpoint import system

    for i in range(4):
        (family / f"out-{i}.safetensors").write_bytes(b"old")
    calls: Iterator[int] = iter(range(100))
    original = system.fsync

    def fsync(fd: int) -> None:
        if next(calls) == 3:
            raise OSError(5, "Input/output error")
        original(fd)

    monkeypatch.setattr(system, "fsync", fsync)
    with pytest.raises(Exception, match="Input/output error"):
        together(MULTIPLIERS)
    assert [(family / f"out-{i}.safetensors").read_bytes() for i in range(4)] == [b"old"] * 4
    assert not list(family.glob(".out-*"))


@pytest.mark.usefixtures("family")
def test_two_outputs_of_one_name_are_refused() -> None:
    with (
        job.open_merges([scaled(5), scaled(10)]) as plans,
        pytest.raises(UsageError, match="are one file"),
    ):
        job.run_merges(plans, [Path("out.safetensors"), Path("./out.safetensors")])


def test_an_output_may_not_be_the_input_of_another_merge(family: Path) -> None:
    before = (family / "b.safetensors").read_bytes()
    with (
        job.open_merges([("0.5*'alk.safetensors' + 0.5*'a.safetensors'", MergeOptions()), scaled(5)]) as plans,
        pytest.raises(Exception, match=r"b\.safetensors"),
    ):
        job.run_merges(plans, [Path("b.safetensors"), Path("out.safetensors")], overwrite=True)
    assert (family / "b.safetensors").read_bytes() == before


# ---- passes and memory


@pytest.mark.usefixtures("family")
def test_plans_share_a_pass_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    with job.open_merges(QUANTISED, fingerprints=False) as plans:
        assert bundles.passes(plans) == [[0, 1, 5], [2], [3], [4]]
        assert bundles.passes(plans, Device(("cuda:0",))) == [[i] for i in range(6)]
        monkeypatch.setattr(bundles, "MOST_HELD", 0)
        assert bundles.passes(plans[:2]) == [[0], [1]]


@pytest.mark.usefixtures("family")
def test_memory_counts_what_plans_share_and_what_each_holds() -> None:
    with job.open_merges([*MULTIPLIERS, *QUANTISED[:2]], fingerprints=False) as plans:
        one, four = memory.memory_of(plans[:1], 2), memory.memory_of(plans[:4], 2)
        # The shared difference takes the room of one more register; the programs that read it need one less.
        assert one <= four <= one + 2 * 4 * jobs.CHUNK
        largest = sum(sorted((t.shape[0] * t.shape[1] for t in plans[4].tensors if t.quantiser), reverse=True)[:1])
        alone_, both = memory.memory_of(plans[4:5], 2), memory.memory_of(plans[4:], 2)
        assert both - alone_ >= 4 * largest
