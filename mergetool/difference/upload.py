"""File bytes to a device: several threads read into page-locked buffers, from which one stream copies.

On the CPU as a "device" the same happens without streams, so that everything above can run and be tested there.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from mergetool.checkpoint.inputs import InputFile

CHUNK = 16 << 20
"""Bytes a thread reads at once; each has two buffers of that size, one being filled while the other is copied."""


class Uploader:
    """Copies pieces of files to tensors on one device; ``threads`` read at once. For use by one thread, in a ``with`` block."""

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

    def upload(self, file: InputFile, offset: int, target: Tensor) -> list[Future[None]]:
        """Start filling ``target``, contiguous uint8 on the device, with the bytes of ``file`` at ``offset``.

        The futures raise what ``InputFile.read_into`` raises. When all are done, `finish_before` orders a stream after.
        """
        size = target.numel()
        return [
            self._pool.submit(self._copy, file, offset + start, target[start : min(start + CHUNK, size)])
            for start in range(0, size, CHUNK)
        ]

    def start_after(self, event: torch.cuda.Event | None) -> None:
        """Uploads started from now on do not write before ``event``."""
        if self._stream is not None and event is not None:
            self._stream.wait_event(event)

    def finish_before(self, stream: torch.cuda.Stream | None) -> None:
        """What ``stream`` is given from now on sees every upload whose future is done."""
        if self._stream is not None and stream is not None:
            stream.wait_stream(self._stream)

    def _copy(self, file: InputFile, offset: int, target: Tensor) -> None:
        buffer, copied = self._next_buffer()
        if copied is not None:
            copied.synchronize()
        filled = buffer[: target.numel()]
        file.read_into(filled.numpy().data, offset)
        if self._stream is None or copied is None:
            target.copy_(filled)
            return
        with torch.cuda.stream(self._stream):
            target.copy_(filled, non_blocking=True)
            copied.record(self._stream)

    def _next_buffer(self) -> tuple[Tensor, torch.cuda.Event | None]:
        """This thread's buffers in turn, each with the event after which it may be filled again."""
        if not hasattr(self._own, "buffers"):
            locked = self._stream is not None
            self._own.buffers = [
                (torch.empty(CHUNK, dtype=torch.uint8, pin_memory=locked), _event() if locked else None)
                for _ in range(2)
            ]
        buffers: list[tuple[Tensor, torch.cuda.Event | None]] = self._own.buffers
        buffers.reverse()
        return buffers[0]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
