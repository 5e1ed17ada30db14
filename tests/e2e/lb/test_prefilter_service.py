"""The prefilter as a node has it: gRPC and command line on one end, packets on a device at the other.

    fbp1 --- fbp0 192.168.7.1, fd00:7::1 (the node)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc
import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from fibril.prefilter.v1 import prefilter_pb2 as pb
from fibril.prefilter.v1 import prefilter_pb2_grpc
from fibril.types.v1.types_pb2 import PageRequest
from services.common.instance import Instance
from services.common.kernel import features, netns
from services.common.kernel import netlink as nl
from services.common.kernel.netlink import Netlink, Rtnl
from services.common.kernel.netns import NetNs
from services.common.rpc.client import channel
from services.common.rpc.server import RpcConfig, RpcServer
from services.common.telemetry import Telemetry
from services.lb.prefilter.api import PrefilterApi
from services.lb.prefilter.part import PrefilterPart
from services.lb.xdp.xdp import Xdp
from tests import session

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

MAC, OTHER = "02:00:00:00:00:01", "02:00:00:00:00:02"
NODE = {4: "192.168.7.1", 6: "fd00:7::1"}
GOOD = {4: "192.168.7.5", 6: "fd00:7::5"}
BAD = {4: "192.168.7.66", 6: "fd00:7::66"}
BEHIND = 0x88B5
"""For experiments: no protocol that anybody speaks."""


class Wire:
    """Sends to the node, and sees what a process there gets."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._raw = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
        self._raw.bind(("fbp1", 0))
        self._there = stack.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
        self._there.bind(("::", 7777))
        self._there.setblocking(False)
        self._behind = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(BEHIND)))
        self._behind.bind(("fbp0", BEHIND))
        self._behind.settimeout(20)

    def arrives(self, source: str) -> bool:
        return self.arrive([source]) == [True]

    def arrive(self, sources: list[str]) -> list[bool]:
        """Which of these packets do. A frame that nobody filters comes behind them: by then they are there, or never come."""
        words, frames = [secrets.token_bytes(8) for _ in (*sources, None)], []
        for source, word in zip(sources, words[:-1], strict=True):
            ip = IP(src=source, dst=NODE[4]) if ip_address(source).version == 4 else IPv6(src=source, dst=NODE[6])
            frames.append(bytes(Ether(src=OTHER, dst=MAC) / ip / UDP(sport=1, dport=7777) / word))
        frames.append(bytes(Ether(src=OTHER, dst=MAC, type=BEHIND) / words[-1].ljust(46, b".")))
        # Frames keep their order on one CPU.
        cpus = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cpus)})
        try:
            for frame in frames:
                self._raw.send(frame)
        finally:
            os.sched_setaffinity(0, cpus)
        while words[-1] not in self._behind.recv(100):
            pass
        got = set()
        with contextlib.suppress(BlockingIOError):
            while True:
                got.add(self._there.recv(100))
        return [word in got for word in words[:-1]]


class Node:
    """What the lb process has of it. `kill` leaves everything as it is."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self._stack = contextlib.AsyncExitStack()

    async def start(self, mode: str = "generic") -> Node:
        netlink = await self._stack.enter_async_context(Netlink())
        self.xdp = Xdp(self.instance, netlink, "auto" if mode != "off" else "off", ("fbp0",), ("prefilter",))
        self.part = PrefilterPart(self.instance, lambda: [hook.device for hook in self.xdp.attached()])
        self.part.on_active(lambda active: self.xdp.need("prefilter", active))
        await self.xdp.start()
        self._stack.push_async_callback(self.xdp.stop)
        self._stack.push_async_callback(self.part.stop)
        await self.part.start()
        self.part.protect([ip_address(each) for each in NODE.values()])
        server = RpcServer(self.instance.socket("lb"), RpcConfig(), Telemetry())
        server.add(prefilter_pb2_grpc.add_PrefilterServiceServicer_to_server, PrefilterApi(self.part))
        await server.start()
        self._stack.push_async_callback(server.drain, 0.1)
        self.stub: Any = prefilter_pb2_grpc.PrefilterServiceStub(
            await self._stack.enter_async_context(channel(f"unix:{self.instance.socket('lb')}"))
        )
        return self

    async def stop(self) -> None:
        await self._stack.aclose()

    async def attached(self, wanted: bool = True) -> None:
        for _ in range(500):
            if bool(self.xdp.attached()) is wanted:
                return
            await asyncio.sleep(0.02)
        raise TimeoutError(self.xdp.status())

    async def fibril(self, *words: str, stdin: str = "") -> Any:
        """The command's answer."""
        roots = {"FIBRIL_RUN_ROOT": str(self.instance.run_root), "FIBRIL_STATE_ROOT": str(self.instance.state_root)}
        argv = [sys.executable, "-m", "services.ctl.main", "--instance", self.instance.name, "-o", "json", "prefilter", *words]
        process = await asyncio.create_subprocess_exec(
            *argv, env={**os.environ, **roots}, stdin=-1, stdout=-1, stderr=-1
        )
        out, err = await process.communicate(stdin.encode())
        assert process.returncode == 0, err.decode()
        return json.loads(out) if out.strip() else None


@pytest.fixture
def wire() -> Iterator[Wire]:
    """The thread is in the node's namespace."""
    path = Path(f"/run/netns/{session.name()}")
    netns.add(path)
    try:
        with contextlib.ExitStack() as stack:
            there = stack.enter_context(NetNs.open(path))
            stack.enter_context(there.entered())
            node = stack.enter_context(Rtnl(there))
            for option in ("all", "default"):
                Path(f"/proc/sys/net/ipv4/conf/{option}/rp_filter").write_text("0")
            near = node.create_veth("fbp0", MAC, "fbp1", OTHER, 1500)
            node.apply([nl.no_link_local(near), *(nl.link_up(node.ifindex(f"fbp{n}")) for n in (0, 1))])
            node.apply([nl.address_add(near, ip_address(NODE[4]), 24), nl.address_add(near, ip_address(NODE[6]), 64)])
            yield Wire(stack)
    finally:
        netns.remove(path)


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """Programs are compiled once for all tests."""
    features.ensure_bpffs()
    made = Instance.from_env(f"t-pfs-{session.name()}")
    made.run_dir.mkdir(parents=True, exist_ok=True)
    try:
        yield made
    finally:
        shutil.rmtree(made.pin_dir, ignore_errors=True)
        shutil.rmtree(made.run_dir, ignore_errors=True)


@pytest.fixture
async def node(wire: Wire, instance: Instance, tmp_path: Path) -> AsyncIterator[Node]:
    made = await Node(replace(instance, state_root=tmp_path)).start()
    try:
        yield made
    finally:
        for each in (await made.stub.ListSets(pb.ListSetsRequest())).sets:
            if each.name != "cluster":
                await made.stub.DeleteSet(pb.DeleteSetRequest(set=each.name))
        for limit in (await made.stub.ListLimits(pb.ListLimitsRequest())).limits:
            await made.stub.RemoveLimit(pb.RemoveLimitRequest(prefix=limit.prefix))
        await made.stop()


async def test_what_cannot_be_read_stays_in_force_and_stops_nothing(wire: Wire, instance: Instance, tmp_path: Path) -> None:
    mine = replace(instance, state_root=tmp_path)
    node = await Node(mine).start()
    await node.stub.SetPrefixes(messages(pb.SetPrefixesRequest, "bad", [BAD[4]]))
    await node.attached()
    await node.stop()
    (file,) = tmp_path.rglob("prefilter.db")
    whole = file.read_bytes()
    file.write_bytes(b"no database" * 1000)
    node = await Node(mine).start()
    try:
        (status,) = node.part.status()
        assert status.state == "degraded" and "cannot be used" in status.message
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await node.stub.ListSets(pb.ListSetsRequest())
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE and "cannot be used" in str(refused.value.details())
        assert not wire.arrives(BAD[4]) and wire.arrives(GOOD[4])
        # Restored, it goes on without a restart.
        file.write_bytes(whole)
        node.part.protect([])
        for _ in range(200):
            if node.part.status()[0].state == "ok":
                break
            await asyncio.sleep(0.05)
        await node.stub.DeleteSet(pb.DeleteSetRequest(set="bad"))
        assert wire.arrives(BAD[4])
    finally:
        await node.stop()


def messages(kind: type[Any], name: str, *batches: list[str], **first: Any) -> Iterator[Any]:
    yield kind(set=name, prefixes=batches[0], **first)
    for batch in batches[1:]:
        yield kind(prefixes=batch)


async def test_what_is_denied_does_not_arrive_as_long_as_it_is(wire: Wire, node: Node) -> None:
    assert not node.xdp.attached()
    assert (await node.stub.ListSets(pb.ListSetsRequest())).devices == []
    answer = await node.stub.SetPrefixes(messages(pb.SetPrefixesRequest, "drop", [BAD[4]], ["fd00:7::66/127", "10.0.0.0/8"]))
    assert (answer.entries, answer.added, answer.removed) == (3, 3, 0)
    await node.attached()
    assert [wire.arrives(source) for source in (BAD[4], BAD[6], GOOD[4], GOOD[6])] == [False, False, True, True]
    sets = await node.stub.ListSets(pb.ListSetsRequest())
    assert (list(sets.devices), sets.problem) == (["fbp0"], "")
    told = {each.name: (each.entries_v4, each.entries_v6, each.traffic.packets) for each in sets.sets}
    assert told == {"drop": (2, 1, 2), "cluster": (1, 1, 0)}

    # The process goes, the filter stays; the next one adopts it.
    await node.stop()
    assert [wire.arrives(source) for source in (BAD[4], GOOD[6])] == [False, True]
    await node.start()
    assert node.part.active
    assert [wire.arrives(source) for source in (BAD[6], GOOD[4])] == [False, True]
    counters = await node.stub.GetCounters(pb.GetCountersRequest())
    assert counters.denied.packets == 4

    await node.stub.DeleteSet(pb.DeleteSetRequest(set="drop"))
    await node.attached(False)
    assert wire.arrives(BAD[4])


async def test_the_command_does_all_of_it(wire: Wire, node: Node, tmp_path: Path) -> None:
    lines = "; a list\n192.168.7.66 ; somebody\n\nfd00:7::/64 # a network\n"
    assert await node.fibril("add", "drop", "-f", "-", stdin=lines) == {"set": "drop", "entries": 2, "added": 2}
    await node.fibril("set", "friends", "--allow", "--ttl", "10m", GOOD[6])
    await node.attached()
    assert [wire.arrives(source) for source in (BAD[4], BAD[6], GOOD[4], GOOD[6])] == [False, False, True, True]
    got = await node.fibril("get", GOOD[6])
    assert (got["set"], got["action"]) == ("friends", "ACTION_ALLOW")
    assert [(each["set"], each["entry"]["prefix"]) for each in got["others"]] == [("drop", "fd00:7::/64")]
    assert (await node.fibril("ls", "drop"))[0]["prefix"] == "192.168.7.66/32"
    await node.fibril("limit", "0.0.0.0/0", "1", "--burst", "2")
    while True:
        began = time.monotonic()
        arrived = wire.arrive([GOOD[4]] * 3)
        limited = (await node.stub.GetAddress(pb.GetAddressRequest(address=GOOD[4]))).limited_now
        if time.monotonic() - began < 0.9:
            break
        await asyncio.sleep(2.5)  # so slow was this machine that a third was due
    assert arrived == [True, True, False] and limited
    got = await node.fibril("get", GOOD[4])
    assert (got["limit"]["rate_pps"], got["set"]) == (1, "")
    # The node's own are never limited.
    assert (await node.fibril("get", NODE[4]))["set"] == "cluster"
    await node.fibril("unlimit", "0.0.0.0/0")
    assert wire.arrives(GOOD[4])
    counters = await node.fibril("counters")
    assert counters["denied"]["packets"] == 2 and counters["allowed"]["packets"] == 1
    await node.fibril("rm", "drop", "fd00:7::/64")
    assert wire.arrives(BAD[6])
    await node.fibril("rm", "drop", "--all")
    assert wire.arrives(BAD[4])

    path = tmp_path / "many"
    path.write_text("".join(f"{1 + n // 8192}.{n // 256 % 32}.{n % 256}.1\n" for n in range(100_000)))
    assert (await node.fibril("set", "drop", "-f", str(path)))["entries"] == 100_000
    got = await node.fibril("get", "9.9.9.1")
    assert (got["set"], got["entry"]["prefix"]) == ("drop", "9.9.9.1/32")


async def test_entries_go_when_their_time_has_come(wire: Wire, node: Node) -> None:
    began = time.monotonic()
    await node.stub.AddPrefixes(messages(pb.AddPrefixesRequest, "ban", [BAD[4]], ttl_s=2))
    await node.attached()
    assert not wire.arrives(BAD[4]) or time.monotonic() - began > 2
    await node.attached(False)
    assert wire.arrives(BAD[4])


@pytest.mark.parametrize(("method", "request_", "code", "field"), [
    ("SetPrefixes", [pb.SetPrefixesRequest(set="a", prefixes=["10.0.0.0/8", "10.0.0.1/8"])], "INVALID_ARGUMENT", "prefixes[1]"),
    ("SetPrefixes", [], "INVALID_ARGUMENT", "set"),
    ("SetPrefixes", [pb.SetPrefixesRequest(set="a"), pb.SetPrefixesRequest(set="b")], "INVALID_ARGUMENT", "set"),
    ("SetPrefixes", [pb.SetPrefixesRequest(set="a", prefixes=["::/0"])], "FAILED_PRECONDITION", ""),
    ("SetPrefixes", [pb.SetPrefixesRequest(set="a", prefixes=["1.1.1.1"] * 100_001)], "INVALID_ARGUMENT", "prefixes"),
    ("AddPrefixes", [pb.AddPrefixesRequest(set="no/name")], "INVALID_ARGUMENT", "set"),
    ("AddPrefixes", [pb.AddPrefixesRequest(set="cluster")], "INVALID_ARGUMENT", "set"),
    ("AddPrefixes", [pb.AddPrefixesRequest(set="a", action=7)], "INVALID_ARGUMENT", "action"),  # type: ignore[arg-type]
    ("RemovePrefixes", [pb.RemovePrefixesRequest(set="none")], "NOT_FOUND", "set"),
    ("DeleteSet", pb.DeleteSetRequest(set="none"), "NOT_FOUND", "set"),
    ("ListPrefixes", pb.ListPrefixesRequest(set="none"), "NOT_FOUND", "set"),
    ("ListPrefixes", pb.ListPrefixesRequest(set="cluster", page=PageRequest(size=10_001)), "INVALID_ARGUMENT", "page"),
    ("ListPrefixes", pb.ListPrefixesRequest(set="cluster", page=PageRequest(token="x")), "INVALID_ARGUMENT", "page"),
    ("GetAddress", pb.GetAddressRequest(address="10.0.0.0/8"), "INVALID_ARGUMENT", "address"),
    ("SetLimit", pb.SetLimitRequest(limit=pb.Limit(prefix="0.0.0.0/0")), "INVALID_ARGUMENT", "limit.rate_pps"),
    ("SetLimit", pb.SetLimitRequest(limit=pb.Limit(prefix="x", rate_pps=1)), "INVALID_ARGUMENT", "limit.prefix"),
    ("SetLimit", pb.SetLimitRequest(limit=pb.Limit(prefix="fd00::1", rate_pps=1)), "INVALID_ARGUMENT", "limit.prefix"),
    ("SetLimit", pb.SetLimitRequest(limit=pb.Limit(prefix="::/0", rate_pps=1, burst=4000)), "INVALID_ARGUMENT", "limit.burst"),
    ("RemoveLimit", pb.RemoveLimitRequest(prefix="10.0.0.0/8"), "NOT_FOUND", "prefix"),
])  # fmt: skip
async def test_bad_input_is_named(node: Node, method: str, request_: Any, code: str, field: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(node.stub, method)(iter(request_) if isinstance(request_, list) else request_)
    assert caught.value.code().name == code
    assert field in (caught.value.details() or "")
    assert not node.part.active


async def test_pages_hold_every_prefix_once(node: Node) -> None:
    wanted = [f"10.0.{n}.0/24" for n in range(7)] + [f"fd00:{n:x}::/32" for n in range(1, 6)]
    await node.stub.SetPrefixes(messages(pb.SetPrefixesRequest, "a", wanted))
    for size in (1, 5, 7, 12, 13):
        found, token = [], ""
        while True:
            page = PageRequest(size=size, token=token)
            answer = await node.stub.ListPrefixes(pb.ListPrefixesRequest(set="a", page=page))
            found += [each.prefix for each in answer.prefixes]
            token = answer.next_token
            if not token:
                break
        assert found == wanted


async def test_without_xdp_it_says_so(wire: Wire, instance: Instance, tmp_path: Path) -> None:
    node = await Node(replace(instance, state_root=tmp_path)).start("off")
    try:
        await node.stub.AddPrefixes(messages(pb.AddPrefixesRequest, "ban", [BAD[4]]))
        assert wire.arrives(BAD[4])
        assert "no XDP program" in (await node.stub.ListSets(pb.ListSetsRequest())).problem
        assert node.part.status()[0].state == "degraded"
        await node.stub.DeleteSet(pb.DeleteSetRequest(set="ban"))
        assert node.part.status()[0].state == "ok"
    finally:
        await node.stop()
