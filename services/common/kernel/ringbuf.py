"""BPF ring buffers, read from the event loop.

Through libbpf (Debian: libbpf1), for its memory barriers: the buffer is shared memory between CPUs.
"""

from __future__ import annotations

import asyncio
import ctypes as ct
import errno
import functools
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final, Self

from services.common import errors
from services.common.kernel import bpf

MAX_BATCH: Final = 4096
_SAMPLE = ct.CFUNCTYPE(ct.c_int, ct.c_void_p, ct.c_void_p, ct.c_size_t)


@functools.cache
def _libbpf() -> Any:
    try:
        library = ct.CDLL("libbpf.so.1", use_errno=True)
    except OSError:
        raise errors.FailedPrecondition("libbpf.so.1 is missing", fix="install Debian's libbpf1") from None
    library.ring_buffer__new.restype = ct.c_void_p
    library.ring_buffer__new.argtypes = [ct.c_int, _SAMPLE, ct.c_void_p, ct.c_void_p]
    library.ring_buffer__consume.argtypes = [ct.c_void_p]
    library.ring_buffer__epoll_fd.argtypes = [ct.c_void_p]
    library.ring_buffer__free.argtypes = [ct.c_void_p]
    return library


class RingBuffer:
    """The only reader of a ring buffer (two would steal from each other). One thread."""

    def __init__(self, fd: int, label: str) -> None:
        """Take over the map's descriptor `fd`. FailedPrecondition if it is no ring buffer."""
        self._fd, self.label = fd, label
        self._samples: list[bytes] = []
        self._callback = _SAMPLE(self._take)
        self._ring = None
        info = bpf.map_info(fd)
        if info.type == "ringbuf":
            self._ring = _libbpf().ring_buffer__new(fd, self._callback, None, None)
        if not self._ring:
            os.close(fd)
            raise errors.FailedPrecondition(f"cannot read map {label} ({info.shape()}) as a ring buffer")
        self.size = info.max_entries

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Open a pinned ring buffer; NotFound if there is none."""
        try:
            return cls(bpf.get(str(path)), str(path))
        except FileNotFoundError:
            raise errors.NotFound(
                f"no BPF map pinned at {path}", fix="start the service that creates it"
            ) from None

    def close(self) -> None:
        """Not while a read is under way."""
        if self._ring:
            _libbpf().ring_buffer__free(self._ring)
            self._ring = None
            os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def poll(self) -> list[bytes]:
        """What is there now, at most MAX_BATCH samples."""
        result = _libbpf().ring_buffer__consume(self._ring)
        samples, self._samples = self._samples, []
        if result < 0 and result != -errno.EAGAIN:
            raise errors.Internal(f"reading ring buffer {self.label}: {os.strerror(-result)}")
        return samples

    async def read(self) -> list[bytes]:
        """Wait for samples, then as poll."""
        loop = asyncio.get_running_loop()
        poll_fd = _libbpf().ring_buffer__epoll_fd(self._ring)
        while not (samples := self.poll()):
            ready = asyncio.Event()
            loop.add_reader(poll_fd, ready.set)
            try:
                await ready.wait()
            finally:
                loop.remove_reader(poll_fd)
        return samples

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            for sample in await self.read():
                yield sample

    def _take(self, _: int | None, data: int | None, size: int) -> int:
        self._samples.append(ct.string_at(data or 0, size))
        # A negative answer stops consuming after this sample, so a flood cannot hold the loop.
        return -errno.EAGAIN if len(self._samples) >= MAX_BATCH else 0
