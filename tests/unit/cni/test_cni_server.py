"""The CNI server with a fake endpoint manager: commands to calls, failures to codes, callers that vanish."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.common import errors
from services.ipam.cni import spec
from services.ipam.cni.server import CniServer
from services.ipam.endpoints.model import EndpointRecord, EndpointSpec, State

ENV = {"CNI_CONTAINERID": "c1", "CNI_NETNS": "/run/netns/x", "CNI_IFNAME": "eth0"}
CONF: dict[str, Any] = {"cniVersion": "1.1.0", "name": "net", "type": "fibril-cni"}


class FakeManager:
    """Endpoints in a dict; `fail` is raised by the next operation; `gate` holds creations up."""

    def __init__(self) -> None:
        self.endpoints: dict[tuple[str, str], EndpointRecord] = {}
        self.specs: list[Any] = []
        self.fail: BaseException | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.entered = asyncio.Event()
        self.created = asyncio.Event()
        self.undone = 0
        self.differences: list[str] = []

    def _raise(self) -> None:
        if self.fail is not None:
            failure, self.fail = self.fail, None
            raise failure

    async def create(self, wanted: Any) -> Any:
        self._raise()
        self.specs.append(wanted)
        self.entered.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.undone += 1
            raise
        self.created.set()
        made = EndpointRecord(
            1, wanted, State.READY, 0.0, ipv4="10.244.0.5", ipv6="fd00::5", ipv4_gateway="10.244.0.1",
            ipv6_gateway="fd00::1", mac="02:00:00:00:00:02", host_mac="02:00:00:00:00:01", host_ifname="fb1", mtu=1500,
        )  # fmt: skip
        return self.endpoints.setdefault((wanted.container_id, wanted.ifname), made)

    async def delete(self, container_id: str, ifname: str = "") -> int:
        self._raise()
        return 1 if self.endpoints.pop((container_id, ifname), None) else 0

    def get(self, container_id: str, ifname: str) -> Any:
        return self.endpoints.get((container_id, ifname))

    def list(self) -> Sequence[Any]:
        return list(self.endpoints.values())

    async def check(self, container_id: str, ifname: str) -> list[str]:
        self._raise()
        return self.differences


@pytest.fixture
def manager() -> FakeManager:
    return FakeManager()


@pytest.fixture
async def server(manager: FakeManager, tmp_path: Path) -> AsyncIterator[CniServer]:
    server = CniServer(manager, tmp_path / "cni.sock", timeout=5.0)
    await server.start()
    yield server
    await server.stop()


async def answer(
    server: CniServer, command: str, conf: dict[str, Any] | None = None, **env: str
) -> tuple[int, Any]:
    code, output = await server.answer(
        {**ENV, "CNI_COMMAND": command, **env}, json.dumps(conf or CONF).encode()
    )
    return code, json.loads(output) if output else None


async def raw_call(path: Path, request: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(request)
    data = await reader.read()
    writer.close()
    return data


def request(command: str, conf: bytes | None = None) -> bytes:
    body = json.dumps(CONF).encode() if conf is None else conf
    variables = b"".join(
        f"{key}={value}\0".encode() for key, value in {**ENV, "CNI_COMMAND": command}.items()
    )
    return b"%d %d\n" % (len(variables), len(body)) + variables + body


async def test_add_creates_what_the_runtime_asked_for(server: CniServer, manager: FakeManager) -> None:
    conf = {
        **CONF,
        "pool": "blue",
        "mtu": 1400,
        "runtimeConfig": {"ips": ["10.1.1.1/24"], "cgroupPath": "/pods/x"},
    }
    code, result = await answer(server, "ADD", conf, CNI_ARGS="K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0")
    assert code == 0 and result["ips"][0]["address"] == "10.244.0.5/32"
    wanted = manager.specs[0]
    assert (wanted.container_id, wanted.ifname, wanted.netns) == ("c1", "eth0", "/run/netns/x")
    assert (wanted.pool, wanted.ipv4, wanted.mtu) == ("blue", "10.1.1.1", 1400)
    assert (wanted.pod, wanted.cgroup_path) == ("shop/cart-0", "/pods/x")


@pytest.mark.parametrize("version", spec.VERSIONS)
async def test_del_of_something_never_added_succeeds(server: CniServer, version: str) -> None:
    assert await answer(server, "DEL", {**CONF, "cniVersion": version}, CNI_NETNS="") == (0, None)


async def test_check_accepts_what_add_made_and_names_differences(
    server: CniServer, manager: FakeManager
) -> None:
    _, result = await answer(server, "ADD")
    conf = {**CONF, "prevResult": result}
    assert await answer(server, "CHECK", conf) == (0, None)
    manager.differences = ["the route is gone"]
    code, error = await answer(server, "CHECK", conf)
    assert code == 1 and error["code"] == spec.DIFFERENT and "the route is gone" in error["details"]


async def test_check_of_an_unknown_container_is_code_3(server: CniServer) -> None:
    assert (await answer(server, "CHECK"))[1]["code"] == spec.UNKNOWN_CONTAINER


async def test_gc_deletes_only_its_own_networks_unlisted_endpoints(
    server: CniServer, manager: FakeManager
) -> None:
    for container, network in (("a", "net"), ("b", "net"), ("c", "other")):
        await answer(server, "ADD", {**CONF, "name": network}, CNI_CONTAINERID=container)
    # One that CNI has not made, and one whose labels somebody has replaced.
    manager.endpoints["d", "eth0"] = EndpointRecord(4, EndpointSpec("d"), State.READY, 0.0)
    manager.endpoints["b", "eth0"] = replace(manager.endpoints["b", "eth0"], relabelled={})
    conf = {**CONF, "cni.dev/valid-attachments": [{"containerID": "a", "ifname": "eth0"}]}
    assert await answer(server, "GC", conf) == (0, None)
    assert sorted(container for container, _ in manager.endpoints) == ["a", "c", "d"]


async def test_gc_goes_on_past_a_failure_and_names_it(server: CniServer, manager: FakeManager) -> None:
    for container in ("a", "b"):
        await answer(server, "ADD", CNI_CONTAINERID=container)
    manager.fail = errors.Unavailable("a is stuck")
    code, error = await answer(server, "GC", {**CONF, "cni.dev/valid-attachments": []})
    assert code == 1 and "a is stuck" in error["details"]
    assert len(manager.endpoints) == 1


async def test_status_reports_why_add_cannot_be_served(manager: FakeManager, tmp_path: Path) -> None:
    reason = ""
    server = CniServer(manager, tmp_path / "cni.sock", unavailable=lambda: reason)
    assert await answer(server, "STATUS") == (0, None)
    reason = "no address block"
    code, error = await answer(server, "STATUS")
    assert (code, error["code"], error["details"]) == (1, spec.NOT_AVAILABLE, "no address block")


@pytest.mark.parametrize(
    "failure, code",
    [
        (errors.InvalidArgument("bad"), spec.INVALID_CONFIG),
        (errors.NotFound("no pool"), spec.INVALID_CONFIG),
        (errors.Unavailable("etcd is away"), spec.TRY_AGAIN_LATER),
        (errors.Aborted("raced"), spec.TRY_AGAIN_LATER),
        (errors.ResourceExhausted("256 of 256"), spec.EXHAUSTED),
        (errors.AlreadyExists("other options"), spec.ALREADY_EXISTS),
        (errors.FailedPrecondition("namespace gone"), spec.PRECONDITION),
        (errors.Internal("bug"), spec.INTERNAL),
        (RuntimeError("bug"), spec.INTERNAL),
    ],
)
async def test_failures_have_their_code(
    server: CniServer, manager: FakeManager, failure: Exception, code: int
) -> None:
    manager.fail = failure
    exit_code, error = await answer(server, "ADD")
    assert (exit_code, error["code"], error["cniVersion"]) == (1, code, "1.1.0")


async def test_an_error_for_an_unknown_version_is_in_the_newest(server: CniServer) -> None:
    _, error = await answer(server, "ADD", {**CONF, "cniVersion": "9.9.9"})
    assert (error["code"], error["cniVersion"]) == (spec.INCOMPATIBLE_VERSION, "1.1.0")


async def test_a_call_that_takes_too_long_is_try_again_later(manager: FakeManager, tmp_path: Path) -> None:
    server = CniServer(manager, tmp_path / "cni.sock", timeout=0.05)
    manager.gate.clear()
    assert (await answer(server, "ADD"))[1]["code"] == spec.TRY_AGAIN_LATER
    assert manager.undone == 1


async def test_the_socket_is_for_root_alone_and_goes_with_the_server(
    manager: FakeManager, tmp_path: Path
) -> None:
    path = tmp_path / "cni.sock"
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(path))
    server = CniServer(manager, path)
    await server.start()
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert (await raw_call(path, request("STATUS"))) == b"0 0\n"
    await server.stop()
    assert os.listdir(tmp_path) == []


async def test_a_caller_that_vanishes_leaves_a_whole_endpoint(
    server: CniServer, manager: FakeManager, tmp_path: Path
) -> None:
    manager.gate.clear()
    _, writer = await asyncio.open_unix_connection(tmp_path / "cni.sock")
    writer.write(request("ADD"))
    await manager.entered.wait()
    writer.transport.abort()
    manager.gate.set()
    await asyncio.wait_for(manager.created.wait(), 20)
    assert manager.undone == 0


async def test_stopping_lets_calls_end_and_refuses_new_ones(manager: FakeManager, tmp_path: Path) -> None:
    server = CniServer(manager, tmp_path / "cni.sock")
    await server.start()
    manager.gate.clear()
    under_way = asyncio.create_task(raw_call(tmp_path / "cni.sock", request("ADD")))
    await manager.entered.wait()
    stopping = asyncio.create_task(server.stop())
    await asyncio.sleep(0)
    assert (await answer(server, "ADD"))[1]["code"] == spec.TRY_AGAIN_LATER
    manager.gate.set()
    assert (await under_way).startswith(b"0 ")
    await stopping


async def test_stopping_cancels_what_does_not_end_in_time(manager: FakeManager, tmp_path: Path) -> None:
    server = CniServer(manager, tmp_path / "cni.sock")
    await server.start()
    manager.gate.clear()
    under_way = asyncio.create_task(raw_call(tmp_path / "cni.sock", request("ADD")))
    await manager.entered.wait()
    await server.stop(grace=0.05)
    assert await under_way == b"" and manager.undone == 1


@pytest.mark.parametrize(
    "sent", [b"\n", b"x y\n", b"-1 5\n", b"99999999999 1\n", b"3\n", b"0 4 4\n", b"\xff\xfe\n"]
)
async def test_what_is_no_request_gets_no_answer(server: CniServer, tmp_path: Path, sent: bytes) -> None:
    assert await raw_call(tmp_path / "cni.sock", sent) == b""


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    variables=st.dictionaries(
        st.sampled_from(["CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS"]),
        st.sampled_from(["ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION", "c1", "eth0"])
        | st.text(max_size=10),
    ),
    config=st.binary(max_size=60) | st.just(json.dumps(CONF).encode()),
)
def test_any_call_gets_an_answer(variables: dict[str, str], config: bytes) -> None:
    async def run() -> tuple[int, bytes]:
        return await CniServer(FakeManager(), Path("/nonexistent")).answer(variables, config)

    code, output = asyncio.run(run())
    if code:
        error = json.loads(output)
        assert error["code"] in (1, 2, 3, 4, 6, 7) and error["cniVersion"] in spec.VERSIONS and error["msg"]
    else:
        assert not output or json.loads(output)["cniVersion"] in spec.VERSIONS
