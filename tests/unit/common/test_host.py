"""The host as a process: order, signals, failures, pid files, systemd."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import grpc
import pytest

from fibril.ipam.v1.ipam_pb2 import AllocateRequest, AllocateResponse
from fibril.ipam.v1.ipam_pb2_grpc import IpamServiceStub
from fibril.status.v1.status_pb2 import GetStatusRequest
from fibril.status.v1.status_pb2_grpc import StatusServiceStub
from services.common import pidfile
from services.common.instance import Instance
from services.common.rpc.client import channel
from tests import session
from tests.unit.common.rig import failure
from tests.unit.common.test_rpc_tls import Authority

ROOT = Path(__file__).parents[3]


class Process:
    """A hosted process and what it has said."""

    def __init__(self, popen: subprocess.Popen[str], instance: Instance) -> None:
        self.popen = popen
        self.instance = instance

    def events(self) -> list[str]:
        """All events until it ends, which it must do within 20 s; the log goes to `log`."""
        out, self.log = self.popen.communicate(timeout=20)
        return out.splitlines()

    async def ready(self) -> None:
        """Wait until the socket answers."""
        async with self.link() as link:
            await StatusServiceStub(link).GetStatus(GetStatusRequest(), wait_for_ready=True, timeout=20)

    @contextlib.asynccontextmanager
    async def link(self, name: str = "ipam") -> AsyncIterator[grpc.aio.Channel]:
        async with channel(f"unix:{self.instance.socket(name)}") as made:
            yield made


Host = Callable[..., AbstractContextManager[Process]]


@pytest.fixture
def host(run_dir: Path) -> Host:
    @contextlib.contextmanager
    def start(*services: dict[str, str], env: dict[str, str] | None = None, **spec: Any) -> Iterator[Process]:
        entries = services or ({"name": "ipam"},)
        command = [
            sys.executable,
            "-m",
            "tests.unit.common.hosted",
            json.dumps({"services": entries, **spec}),
        ]
        full = {**os.environ, "FIBRIL_RUN_ROOT": str(run_dir), **(env or {})}
        with subprocess.Popen(
            command, cwd=ROOT, env=full, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as popen:
            try:
                yield Process(popen, Instance("unit", run_root=run_dir))
            finally:
                popen.kill()

    return start


async def test_a_signal_stops_services_in_reverse_and_leaves_nothing(host: Host) -> None:
    with host({"name": "ipam"}, {"name": "lb"}) as process:
        await process.ready()
        async with process.link("lb") as link:
            answer = await StatusServiceStub(link).GetStatus(
                GetStatusRequest(), wait_for_ready=True, timeout=20
            )
        assert list(answer.services) == ["ipam", "lb"]
        assert [part.name for part in answer.components] == ["ipam.part", "lb.part"]
        assert (answer.pid, answer.instance) == (process.popen.pid, "unit")
        ref = pidfile.read(process.instance.pidfile("lb"))
        assert ref is not None and ref.pid == process.popen.pid
        process.popen.send_signal(signal.SIGTERM)
        assert process.events() == ["start ipam", "start lb", "stop lb", "stop ipam"]
        assert process.popen.returncode == 0
        assert list(process.instance.run_dir.iterdir()) == []


async def test_a_call_in_progress_is_answered_during_the_drain(host: Host) -> None:
    with host() as process:
        await process.ready()
        async with process.link() as link:
            call = asyncio.ensure_future(IpamServiceStub(link).Allocate(AllocateRequest()))
            assert process.popen.stdout is not None
            while await asyncio.to_thread(process.popen.stdout.readline) != "allocate\n":
                pass
            process.popen.send_signal(signal.SIGINT)
            assert await call == AllocateResponse()
        process.events()
        assert process.popen.returncode == 0


async def test_a_second_signal_exits_at_once(host: Host) -> None:
    with host(grace_s=300) as process:
        await process.ready()
        async with process.link() as link:
            call = asyncio.ensure_future(
                failure(IpamServiceStub(link).Allocate(AllocateRequest(owner="forever")))
            )
            assert process.popen.stdout is not None and process.popen.stderr is not None
            while await asyncio.to_thread(process.popen.stdout.readline) != "allocate\n":
                pass
            process.popen.send_signal(signal.SIGTERM)
            while "draining" not in await asyncio.to_thread(process.popen.stderr.readline):
                pass
            process.popen.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.popen.wait, 10) == 128 + signal.SIGTERM
            await call
        assert "stop ipam" not in process.events()


async def test_a_service_that_will_not_stop_does_not_hold_up_the_others(host: Host) -> None:
    with host(
        {"name": "ipam"}, {"name": "lb", "stop": "hang"}, {"name": "dns", "stop": "raise"}, grace_s=0
    ) as process:
        async with process.link("dns") as link:
            await StatusServiceStub(link).GetStatus(GetStatusRequest(), wait_for_ready=True, timeout=20)
        process.popen.send_signal(signal.SIGTERM)
        assert process.events()[-3:] == ["stop dns", "stop lb", "stop ipam"]
        assert process.popen.returncode == 0
        assert "service did not stop in time service=lb" in process.log
        assert "service failed to stop service=dns" in process.log


async def test_a_failed_task_stops_the_process_with_its_cause(host: Host) -> None:
    with host({"name": "ipam", "task": "raise"}) as process:
        assert process.events() == ["start ipam", "stop ipam"]
        assert process.popen.returncode == 1
        assert "task worker failed: worker broke" in process.log
        assert "Traceback" in process.log


async def test_a_task_that_ends_well_stops_nothing(host: Host) -> None:
    with host({"name": "ipam", "task": "return"}) as process:
        await process.ready()
        process.popen.send_signal(signal.SIGTERM)
        process.events()
        assert process.popen.returncode == 0


@pytest.mark.parametrize(
    ("how", "logged", "traceback"),
    [("raise", "cannot start: etcd is away; start it", False), ("bug", "cannot start: 'oops'", True)],
)
async def test_a_failed_start_is_undone_and_told(host: Host, how: str, logged: str, traceback: bool) -> None:
    with host({"name": "ipam"}, {"name": "lb", "start": how}, {"name": "dns"}) as process:
        assert process.events() == ["start ipam", "start lb", "stop lb", "stop ipam"]
        assert process.popen.returncode == 1
        assert logged in process.log
        assert ("Traceback" in process.log) is traceback
        assert list(process.instance.run_dir.iterdir()) == []


async def test_a_signal_ends_a_start_that_hangs(host: Host) -> None:
    with host({"name": "ipam", "start": "hang"}) as process:
        assert process.popen.stdout is not None
        assert await asyncio.to_thread(process.popen.stdout.readline) == "start ipam\n"
        process.popen.send_signal(signal.SIGTERM)
        assert process.events() == ["stop ipam"]
        assert process.popen.returncode == 0


async def test_a_second_process_of_a_service_is_refused(host: Host) -> None:
    with host() as first:
        await first.ready()
        with host({"name": "ipam"}) as second:
            assert second.events() == []
            assert second.popen.returncode == 1
            assert f"ipam already runs: process {first.popen.pid}" in second.log
        await first.ready()


async def test_a_killed_process_is_replaced(host: Host) -> None:
    with host() as first:
        await first.ready()
        first.popen.kill()
        first.popen.wait()
        assert first.instance.socket("ipam").exists()
        with host() as second:
            await second.ready()
            second.popen.send_signal(signal.SIGTERM)
            second.events()
            assert second.popen.returncode == 0


async def test_systemd_hears_of_ready_and_stopping(host: Host, run_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(run_dir / "notify"))
        systemd.settimeout(20)
        with host(env={"NOTIFY_SOCKET": str(run_dir / "notify")}) as process:
            assert await asyncio.to_thread(systemd.recv, 4096) == b"READY=1\nSTATUS=serving ipam"
            process.popen.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(systemd.recv, 4096) == b"STOPPING=1"
            process.events()


async def test_services_answer_on_tcp_as_well(host: Host, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    served, client = authority.issue(), authority.issue(units=("fibril-writer",))
    address = f"{session.loopback()}:8443"
    files = [str(served.ca), str(served.cert), str(served.key)]
    with host(tcp=address, tls=files) as process:
        await process.ready()
        async with channel(address, tls=client, server_name="fibril") as link:
            await IpamServiceStub(link).Allocate(AllocateRequest(), wait_for_ready=True, timeout=20)
            answer = await StatusServiceStub(link).GetStatus(GetStatusRequest())
        assert answer.pid == process.popen.pid


async def test_a_run_directory_that_cannot_be_made_is_named(host: Host) -> None:
    with host(env={"FIBRIL_RUN_ROOT": "/proc/nowhere"}) as process:
        assert process.events() == []
        assert process.popen.returncode == 1
        assert "run directory /proc/nowhere/unit cannot be made" in process.log
