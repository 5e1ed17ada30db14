"""The policy service's programs beside those of a Datapath, policies written by hand, and what becomes of packets.

Pods have interfaces of their own, in a namespace, so that any of them can be the one that sends. Time stands still: one
beat is all there ever is, and `Rig.age` makes a connection look as if it had been silent.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes as ct
import itertools
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Any

from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from services.common.instance import Instance
from services.common.kernel import bpf, loader, netns, progs
from services.common.kernel import netlink as nl
from services.common.kernel.lines import LINE
from services.common.kernel.maps import BpfMap
from services.common.kernel.netlink import Rtnl
from services.common.kernel.netns import NetNs
from services.common.kernel.ringbuf import RingBuffer
from services.common.pipeline import abi as pipeline
from services.common.pipeline import install as pipe
from services.common.pipeline.reasons import Reason
from services.policy import abi, install
from services.policy.kernel.tables import Tables
from tests import session
from tests.datapath.cluster import UNDERLAY, Cluster, Tunnel
from tests.datapath.harness import HOST_MAC, REDIRECT, SHOT, UNSPEC, Datapath

CONNECTIONS = 256
WORLD = {4: "192.0.2.1", 6: "2001:db8:1::1"}
ICMP = {4: 1, 6: 58}
ALLOW, DENY, DEFAULT = abi.Verdict.ALLOW, abi.Verdict.DENY, abi.Verdict.DEFAULT
REJECT, KEEP = abi.Verdict.REJECT, abi.Verdict.KEEP
RULE = 100
"""Number of the rule that allows, unless said otherwise; that of the one that denies is one more."""

Ranges = Sequence[tuple[int, int, int, int]]
"""(protocol, port, verdict, rule): what holds from there on, in order."""
Side = Sequence[Sequence[Ranges]] | None
"""By class of identity, then class of prefix; None: the side is not enforced."""


def only(
    *allowed: tuple[int, int, int],
    verdict: int = ALLOW,
    rule: int = RULE,
    other: int = DEFAULT,
    other_rule: int = 0,
) -> Ranges:
    """What allows (protocol, first port, last port) and nothing else."""
    cells = [(0, 0, int(other), other_rule)]
    for proto, first, last in sorted(allowed):
        if cells[-1][:2] == (proto, first):
            cells.pop()
        cells.append((proto, first, int(verdict), rule))
        after = (proto, last + 1) if last < 0xFFFF else (proto + 1, 0)
        cells.append((*after, int(other), other_rule))
    return cells


ALL: Ranges = [(0, 0, int(ALLOW), RULE)]
NONE: Ranges = [(0, 0, int(DEFAULT), 0)]


def refuse(verdict: int = DENY, rule: int = RULE + 1) -> Ranges:
    return [(0, 0, int(verdict), rule)]


@contextlib.contextmanager
def installed(instance: Instance) -> Iterator[None]:
    """Have the policy slots filled; compiled once a session."""
    slots = instance.pin_dir / pipeline.MAPS[pipeline.SLOTS_MAP]
    if all((instance.pin_dir / "prog" / install.SERVICE / name).exists() for name in install.SLOTS.values()):
        for slot, name in install.SLOTS.items():
            with progs.opened(instance.pin_dir / "prog" / install.SERVICE / name) as fd:
                progs.set_slot(slots, slot, fd)
    else:
        asyncio.run(install.install_tables(instance))
        asyncio.run(loader.load([install.programs()], instance.pin_dir))
    try:
        yield
    finally:
        for slot in install.SLOTS:
            progs.clear_slot(slots, slot)


@dataclass(frozen=True)
class Seen:
    """What became of a packet. `reason` NONE: it passes."""

    action: int
    reason: Reason
    data: bytes
    mark: int

    @property
    def passed(self) -> bool:
        return self.reason is Reason.NONE


class Space:
    """A namespace with the host sides of pods' links in it. For a module: making it takes a while."""

    def __init__(self) -> None:
        self._exit = contextlib.ExitStack()
        path = Path(f"/run/netns/{session.name()}")
        netns.add(path)
        self._exit.callback(netns.remove, path)
        self.netns = self._exit.enter_context(NetNs.open(path))
        self.pods: list[pipeline.Endpoint] = []
        with Rtnl(self.netns) as node:
            for number in (20, 21, 22):
                mac = f"02:00:00:00:01:{number:02x}"
                ifindex = node.create_veth(f"fbp{number}", HOST_MAC, f"fbq{number}", mac, 1500)
                node.apply([nl.link_up(node.ifindex(name)) for name in (f"fbp{number}", f"fbq{number}")])
                self.pods.append(pipeline.Endpoint.of(
                    id=number, ifindex=ifindex, mac=mac, host_mac=HOST_MAC, mtu=1500, flags=0, identity=1000 + number,
                    ipv4=f"10.1.0.{number}", ipv6=f"fd00:1::{number:x}"))  # fmt: skip
            self.uplink = node.create_veth("fbpu0", "02:00:00:00:00:11", "fbpu1", "02:00:00:00:00:fe", 1500)
            node.apply([nl.link_up(node.ifindex(name)) for name in ("fbpu0", "fbpu1")])

    def close(self) -> None:
        self._exit.close()


class Rig:
    """Policies, connections and packets of one test; everything is empty to begin with.

    `a`, `b` and `c` are pods of this node, which know each other's identity and have no policy yet.
    """

    def __init__(self, dp: Datapath, space: Space) -> None:
        self.dp, self.space = dp, space
        self.a, self.b, self.c = self.pods = [type(pod).from_buffer_copy(pod) for pod in space.pods]
        self._exit = contextlib.ExitStack()
        pins = dp.instance.pin_dir
        self.tables = Tables(dp.instance, CONNECTIONS)
        self._exit.callback(self.tables.close)
        self._fds = dict(dp.programs)
        self.events_ring = self._exit.enter_context(RingBuffer.open(pins / abi.MAPS["pol_events"]))
        self.told = self._open("pol_told", ct.c_uint32 * 3, ct.c_uint64)
        self.frags = self._open("pol_frags", ct.c_uint8 * 40, ct.c_uint32)
        self._line = 0
        self._first = 0
        self._revision = itertools.count(1)
        self._tables = itertools.count(1)
        self._classes: dict[tuple[int, int], tuple[int, int, int, int]] = {}
        self.clear()
        for pod in self.pods:
            dp.put(pod)
            self.know(pod.identity)
        for reserved in (1, 2, 6):
            self.know(reserved)
        self.configure()
        dp.ring.poll()
        self.events()

    def _open(self, name: str, key: type, value: type) -> BpfMap[Any, Any]:
        found: BpfMap[Any, Any] = self._exit.enter_context(
            BpfMap.open(self.dp.instance.pin_dir / abi.MAPS[name], key, value)
        )
        return found

    def configure(self, **fields: Any) -> None:
        """Limits and flags; a beat without end."""
        fields = {
            "beat_shift": 63,
            "syn_s": 60,
            "close_s": 10,
            "tcp_s": 21600,
            "any_s": 60,
            "flags": 0,
            **fields,
        }
        for name, value in fields.items():
            setattr(self.tables.config, name, int(value))

    def clear(self) -> None:
        for table in (self.tables.peers, self.tables.new, self.tables.flows, self.told, self.frags):
            for key in list(table.keys()):
                table.delete(key)
        # Those of tests that write with the service's own code, too, which begins with the same numbers of tables.
        for key in list(self.tables.prefixes.keys()):
            self.tables.prefixes.delete(key)
        for number in (0, *(pod.id for pod in self.space.pods), 10, 11, 12, 13):
            self.tables.eps_memory[number * 16 : number * 16 + 16] = bytes(16)

    def close(self) -> None:
        self.clear()
        for pod in self.pods:
            self.dp.remove(pod)
        self._exit.close()

    # ---- policies -------------------------------------------------------------------------------------------
    def know(self, identity: int) -> None:
        self.tables.peers.update(abi.Peer(abi.KNOWN, identity), 0)

    def policy(
        self,
        who: pipeline.Endpoint | int,
        ingress: Side | Ranges = None,
        egress: Side | Ranges = None,
        *,
        peers: Mapping[int, int] | None = None,
        prefixes: Mapping[str, int] | None = None,
        unknown: int = 0,
        flags: int = 0,
    ) -> int:
        """Put a policy in force; a side may be ranges alone, for everybody. Returns its revision."""
        self._line += 1
        self.tables.policies.ensure(self._line + 1)
        table = next(self._tables)
        for identity, found in (peers or {}).items():
            self.tables.peers.update(abi.Peer(table, identity), found)
        for text, found in (prefixes or {}).items():
            network: IPv4Network | IPv6Network = ip_network(text)
            key = abi.Prefix.of(table, network)
            self.tables.prefixes.update(key, found)
        sides = [self._side(side) for side in (ingress, egress)]
        line = abi.Policy(
            peers=table, prefixes=table if prefixes else 0, sides=(abi.Side * 2)(*sides), unknown=unknown
        )
        self.tables.policies.mem[self._line * LINE : (self._line + 1) * LINE] = bytes(line)
        revision = next(self._revision)
        self.set_ep(who, self._line, revision, flags)
        return revision

    def one(self, side: str, who: pipeline.Endpoint, what: Side | Ranges, **fields: Any) -> int:
        """A policy of one side, "ingress" or "egress"; the other is not enforced."""
        return self.policy(
            who, what if side == "ingress" else None, what if side == "egress" else None, **fields
        )

    def set_ep(
        self, who: pipeline.Endpoint | int, line: int, revision: int, flags: int = 0, owner: int = -1
    ) -> None:
        number, index = (who, 0) if isinstance(who, int) else (who.id, who.ifindex)
        ep = abi.Ep(policy=line, revision=revision, flags=int(flags), owner=index if owner < 0 else owner)
        self.tables.eps_memory[number * 16 : number * 16 + 16] = bytes(ep)

    def _side(self, side: Side | Ranges) -> abi.Side:
        if side is None:
            return abi.Side(prefixes=1)
        classes: Any = side
        if isinstance(classes[0], tuple):
            classes = [[classes]]
        flat = [ranges for row in classes for ranges in row]
        at = self._cells([0] * len(flat))
        for index, ranges in enumerate(flat):
            first = self._cells([abi.cell_range(*cell) for cell in ranges])
            self._write(at + index, abi.cell_class(first, len(ranges)))
        return abi.Side(at, len(classes[0]), abi.ENFORCED)

    def _cells(self, words: Sequence[int]) -> int:
        first = self._first
        self._first += len(words)
        self.tables.cells.ensure(self._first // abi.CELLS_A_LINE + 1)
        for index, word in enumerate(words):
            self._write(first + index, word)
        return first

    def _write(self, at: int, word: int) -> None:
        self.tables.cells.mem[at * 8 : at * 8 + 8] = struct.pack("=Q", word)

    def open_all(self, *pods: pipeline.Endpoint) -> None:
        """Policies that allow everything, for all pods if none is named."""
        for pod in pods or self.pods:
            self.policy(pod, ALL, ALL)

    # ---- packets --------------------------------------------------------------------------------------------
    def run(self, packet: Any, program: str, ifindex: int, *, mark: int = 0) -> Seen:
        self.dp.ring.poll()
        action, data, mark = self._run(bytes(packet), program, ifindex, 1, mark)
        found = [e for e in map(pipeline.Event.from_buffer_copy, self.dp.ring.poll()) if e.ifindex == ifindex]
        if not found and program in (install.HOST_IN, install.HOST_OUT):
            # What is let through there is the host's, and not counted.
            assert action == UNSPEC, action
            return Seen(action, Reason.NONE, data, mark)
        assert found, f"no event; action {action}"
        reason = Reason(found[0].reason)
        assert action in ({SHOT, REDIRECT} if reason else {REDIRECT, UNSPEC}), (action, reason)
        return Seen(action, reason, data, mark)

    def _run(self, data: bytes, program: str, ifindex: int, times: int, mark: int) -> tuple[int, bytes, int]:
        """What the last of so many packets came to: action, packet, mark."""
        fd = self._fds.get(program)
        if fd is None:
            pin = self.dp.instance.pin_dir / "prog"
            (path,) = pin.glob(f"*/{program}")
            fd = self._fds[program] = self._exit.enter_context(progs.opened(path))
        ctx = bytearray(192)
        struct.pack_into("=I", ctx, 8, mark)
        struct.pack_into("=I", ctx, 40, ifindex)
        buffer, out, context = (
            ct.create_string_buffer(raw, len(raw)) for raw in (data, bytes(65536), bytes(ctx))
        )
        attr = struct.pack("IIIIQQIIIIQQ", fd, 0, len(data), len(out), ct.addressof(buffer), ct.addressof(out), times, 0,
                           len(ctx), len(ctx), ct.addressof(context), ct.addressof(context))  # fmt: skip
        with self.space.netns.entered():
            _, back = bpf.call(bpf.PROG_TEST_RUN, attr, "test run")
        _, action, _, size = struct.unpack_from("IIII", back)
        return action, out.raw[:size], struct.unpack_from("=I", context.raw, 8)[0]

    def storm(self, pod: pipeline.Endpoint, packet: Any, times: int) -> None:
        """An IP packet that the host's stack sends to a pod, so often; nobody looks what becomes of them."""
        frame = Ether(src=HOST_MAC, dst=bytes(pod.pod_mac).hex(":")) / packet
        self._run(bytes(frame), pipe.TO_POD, pod.ifindex, times, 0)

    def send(self, pod: pipeline.Endpoint, packet: Any, **options: Any) -> Seen:
        """An IP packet of a pod of this node."""
        return self.run(
            Ether(src=bytes(pod.pod_mac).hex(":"), dst=HOST_MAC) / packet,
            pipe.FROM_POD,
            pod.ifindex,
            **options,
        )

    def arrive(self, pod: pipeline.Endpoint, packet: Any, **options: Any) -> Seen:
        """An IP packet that the host's stack sends to a pod."""
        return self.run(
            Ether(src=HOST_MAC, dst=bytes(pod.pod_mac).hex(":")) / packet, pipe.TO_POD, pod.ifindex, **options
        )

    def overlay(self, cluster: Cluster, packet: Any, identity: int, node: int) -> Seen:
        """An IP packet out of the overlay."""
        cluster._tunnel.update(0, Tunnel.of(UNDERLAY[node][0], identity))
        pins = self.dp.instance.pin_dir / "prog"
        (path,) = pins.glob("*/fib_from_overlay")
        with progs.opened(path) as fd:
            progs.set_slot(cluster._next, 0, fd)
        return self.run(
            Ether(src="02:00:00:00:00:77", dst="02:00:00:00:00:78") / packet,
            "fib_t_tunnel",
            self.space.uplink,
        )

    def packet(self, sender: pipeline.Endpoint, peer: pipeline.Endpoint | str, layer: Any, family: int = 4, *,
               back: bool = False) -> Seen:  # fmt: skip
        """A packet of a pod's to another one, or to somebody outside by the host's stack; `back`: in the other direction."""
        mine, other = own(sender, family), own(peer, family)
        if not back:
            return self.send(sender, header(mine, other) / layer)
        if isinstance(peer, str):
            return self.arrive(sender, header(other, mine) / layer)
        return self.send(peer, header(other, mine) / layer)

    # ---- what is left of it -----------------------------------------------------------------------------------
    def events(self) -> list[abi.Event]:
        """Since this was last asked."""
        return [abi.Event.from_buffer_copy(raw) for raw in self.events_ring.poll()]

    def stat(self, which: abi.Stat) -> int:
        return self.tables.stat(which)

    def entries(self, established: bool = True) -> list[tuple[abi.CtKey, abi.CtEntry]]:
        table = self.tables.flows if established else self.tables.new
        return list(table.items())

    def entry(self) -> tuple[abi.CtEntry, bool]:
        """The only connection there is, and whether it is established."""
        found = [
            (value, established) for established in (False, True) for _, value in self.entries(established)
        ]
        assert len(found) == 1, found
        return found[0]

    def age(self, beats: int) -> None:
        """Every connection has been silent for so many seconds more."""
        for table in (self.tables.new, self.tables.flows):
            for key, value in list(table.items()):
                value.seen = value.seen - beats & 0xFFFFFFFF
                table.update(key, value)

    def beat(self) -> None:
        """What has been told of may be told again."""
        for key, value in list(self.told.items()):
            self.told.update(key, (value.value & ~0xFFFFFFFF) | 0xFFFFFFFF)

    def forget(self) -> None:
        """No connection is known any longer."""
        for table in (self.tables.new, self.tables.flows):
            for key in list(table.keys()):
                table.delete(key)


def own(pod: pipeline.Endpoint | str, family: int) -> str:
    if isinstance(pod, str):
        return pod
    return str(pod.ipv4 if family == 4 else pod.ipv6)


def header(src: str, dst: str) -> IP | IPv6:
    return (IP if ip_address(dst).version == 4 else IPv6)(src=src, dst=dst)
