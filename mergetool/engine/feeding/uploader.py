"""File bytes to a device: threads read into page-locked buffers, one stream copies.

On the CPU as a "device" the same happens without streams, so that everything above can run and be tested there.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from mergetool.checkpoint.inputs import Readable

PIECE = 16 << 20
"""Bytes a thread reads at once; each has two buffers of that size, one being filled while the other is copied."""

Arrival = Future["torch.cuda.Event | None"]
"""A piece on its way: done when it is read, with the event of its copy."""


def page_locked(threads: int) -> int:
    """Bytes of page-locked memory that an `Uploader` of so many threads takes, at most."""
    return 2 * PIECE * threads


class Uploader:
    """Copies pieces of files to tensors on one device; ``threads`` read at once. For use by one thread, in a ``with`` block.

    What was read is released (`InputFile.release`).
    """

    def __init__(self, device: torch.device, threads: int) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._pool = ThreadPoolExecutor(threads, "upload")
        self._own = threading.local()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        if self._stream is not None:
            self._stream.synchronize()

    def upload(self, file: Readable, offset: int, target: Tensor) -> list[Arrival]:
        """Start filling ``target`` with the bytes of ``file`` at ``offset``; `finish` waits for it.

        ``target`` is contiguous uint8 on the device.
        """
        size = target.numel()
        return [
            self._pool.submit(self._copy, file, offset + start, target[start : min(start + PIECE, size)])
            for start in range(0, size, PIECE)
        ]

    def start_after(self, event: torch.cuda.Event | None) -> None:
        """Uploads started from now on do not write before ``event``."""
        if self._stream is not None and event is not None:
            self._stream.wait_event(event)

    @staticmethod
    def finish(arrivals: Sequence[Arrival], before: torch.cuda.Stream | None) -> None:
        """Return when all bytes are read.

        Work that the stream ``before`` gets from now on sees them. Raises what ``Readable.read_into`` raises.
        """
        for arrival in arrivals:
            copied = arrival.result()
            if before is not None and copied is not None:
                before.wait_event(copied)

    def _copy(self, file: Readable, offset: int, target: Tensor) -> torch.cuda.Event | None:
        buffer = self._next_buffer()
        if buffer.copied is not None:
            buffer.copied.synchronize()
        filled = buffer.memory[: target.numel()]
        file.read_into(filled.numpy().data, offset)
        file.release(offset, target.numel())
        if self._stream is None:
            target.copy_(filled)
            return None
        with torch.cuda.stream(self._stream):
            target.copy_(filled, non_blocking=True)
            # A thread that waits must sleep: by default it would spin on the core that another one's copy needs.
            buffer.copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            buffer.copied.record(self._stream)
        return buffer.copied

    def _next_buffer(self) -> _Buffer:
        """This thread's two in turn."""
        if not hasattr(self._own, "buffers"):
            locked = self._stream is not None
            self._own.buffers = [_Buffer(torch.empty(PIECE, dtype=torch.uint8, pin_memory=locked)) for _ in range(2)]
        buffers: list[_Buffer] = self._own.buffers
        buffers.reverse()
        return buffers[0]


@dataclass
class _Buffer:
    """Page-locked memory, and the copy after which it may be filled again."""

    memory: Tensor
    copied: torch.cuda.Event | None = None
