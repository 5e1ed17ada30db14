"""Samples a program sends arrive, in order, without blocking the loop."""

import asyncio
import struct
from pathlib import Path

import pytest
from kernel_programs import load_counter

from services.common import errors
from services.common.kernel import progs
from services.common.kernel.ringbuf import RingBuffer


async def test_samples_arrive_in_order(pin_dir: Path) -> None:
    await load_counter(pin_dir)
    with (
        RingBuffer.open(pin_dir / "family/v1/samples") as ring,
        progs.opened(pin_dir / "prog/test/count_packets") as fd,
    ):
        reading = asyncio.create_task(ring.read())
        await asyncio.sleep(0)
        assert not reading.done()
        for size in (60, 70, 80):
            progs.test_run(fd, b"\2" * size)
        samples = await asyncio.wait_for(reading, 5)
        samples += ring.poll()
        assert [struct.unpack("I", sample)[0] for sample in samples] == [60, 70, 80]


async def test_a_full_buffer_is_read_whole_and_takes_new_samples(pin_dir: Path) -> None:
    await load_counter(pin_dir)
    with (
        RingBuffer.open(pin_dir / "family/v1/samples") as ring,
        progs.opened(pin_dir / "prog/test/count_packets") as fd,
    ):
        # 65,536 bytes hold 4,096 samples of 4 bytes with their 8-byte headers, less the one being written.
        progs.test_run(fd, b"\2" * 64, repeat=6000)
        found = ring.poll() + ring.poll()
        assert 4000 < len(found) <= 4096
        progs.test_run(fd, b"\2" * 61)
        assert await asyncio.wait_for(ring.read(), 5) == [struct.pack("I", 61)]


async def test_only_a_ring_buffer_can_be_read(pin_dir: Path) -> None:
    await load_counter(pin_dir)
    with pytest.raises(errors.FailedPrecondition, match="hash"):
        RingBuffer.open(pin_dir / "family/v1/counts")
    with pytest.raises(errors.NotFound):
        RingBuffer.open(pin_dir / "family/v1/none")
