"""A cluster as the programs see it: nodes and addresses in the maps, packets with and without a tunnel."""

from __future__ import annotations

import contextlib
import ctypes as ct
import ipaddress
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from services.common.instance import Instance
from services.common.kernel import loader, progs
from services.common.kernel.maps import BpfMap
from services.common.pipeline import abi
from services.identity.network import install
from tests.datapath.harness import Datapath, Result

HERE, OVERLAY, OVERLAY_V6, ROUTED, CLOUD, NOWHERE, DIRECT = 1, 2, 3, 4, 5, 6, 7
"""Indexes of the nodes."""
UNDERLAY = {OVERLAY: ("192.168.7.2", ""), DIRECT: ("192.168.7.7", ""), OVERLAY_V6: ("", "fd77::3"),
            ROUTED: ("192.168.7.4", "fd77::4"),
            HERE: ("192.168.7.1", "fd77::1")}  # fmt: skip
MTU = 1400
OVERLAY_PORT = 8472
HOST_IF, OVERLAY_IF, UPLINK_IF = 2001, 2002, 2003
HOST_MAC = "02:00:00:00:00:99"
TUNNEL_SPEC = loader.ProgramSpec(
    source=Path(__file__).with_name("tunnel.c"), service="tunnel",
    functions=dict.fromkeys(("fib_t_tunnel", "fib_t_tunnel_only"), "sched_cls"),
    maps={"next": "tunnel/next", "tunnel": "tunnel/tunnel"})  # fmt: skip


class Tunnel(ct.Structure):
    """struct tunnel of tunnel.c."""

    _fields_ = (("id", ct.c_uint32), ("policy", ct.c_uint32), ("remote", ct.c_uint8 * 16), ("family", ct.c_uint32))

    @classmethod
    def of(cls, remote: str, identity: int) -> Tunnel:
        address = ipaddress.ip_address(remote)
        return cls(id=identity & 0xFFFFFF, policy=identity >> 24, family=address.version,
                   remote=(ct.c_uint8 * 16)(*address.packed.ljust(16, b"\0")))


def node_entry(mode: abi.NodeMode, v4: str = "", v6: str = "", mtu: int = MTU, flags: int = 0) -> abi.NodeEntry:
    return abi.NodeEntry(v6=abi.FibAddr.of(v6) if v6 else abi.FibAddr(),
                         v4=abi.be32(ipaddress.IPv4Address(v4)) if v4 else 0,
                         ifindex=UPLINK_IF, mtu=mtu, mode=mode, flags=flags)


NODES = {
    HERE: node_entry(abi.NodeMode.LOCAL, *UNDERLAY[HERE]),
    OVERLAY: node_entry(abi.NodeMode.OVERLAY, *UNDERLAY[OVERLAY]),
    OVERLAY_V6: node_entry(abi.NodeMode.OVERLAY, *UNDERLAY[OVERLAY_V6], flags=abi.NodeFlag.TUNNEL_V6),
    DIRECT: node_entry(abi.NodeMode.OVERLAY, *UNDERLAY[DIRECT], flags=abi.NodeFlag.DIRECT),
    ROUTED: node_entry(abi.NodeMode.ROUTED, *UNDERLAY[ROUTED]),
    CLOUD: node_entry(abi.NodeMode.STACK, "192.168.9.5", "fd77::5"),
}


class Cluster:
    """Maps and programs of the identity service beside those of a Datapath."""

    def __init__(self, dp: Datapath) -> None:
        self.dp = dp
        instance = dp.instance
        self._known: list[tuple[BpfMap, Any]] = []
        self._exit = contextlib.ExitStack()
        self._programs = {name: self._exit.enter_context(progs.opened(install.program_path(instance, name)))
                          for name in install.PROGRAMS}
        pins = instance.pin_dir
        self._tunnel_prog = self._exit.enter_context(progs.opened(pins / "prog/tunnel/fib_t_tunnel"))
        self._next = pins / "tunnel/next"
        self._behind = ""

        def opened(path: str, key: type, value: type) -> BpfMap:
            return self._exit.enter_context(BpfMap.open(pins / path, key, value))

        self._tunnel = opened("tunnel/tunnel", ct.c_uint32, Tunnel)
        self.addrs = opened(abi.MAPS["ipc_addr"], abi.FibAddr, abi.IpcacheEntry)
        self.prefixes = opened(abi.MAPS["ipc_prefix"], abi.IpcachePrefix, abi.IpcacheEntry)
        self._near = opened(abi.MAPS["ipc_near"], ct.c_uint32, abi.IpcacheNear)
        self.nodes = opened(abi.MAPS["nd_nodes"], ct.c_uint32, abi.NodeEntry)
        self.devices = opened(abi.MAPS["nd_config"], ct.c_uint32, abi.NetworkDevices)
        self.devices.update(0, abi.NetworkDevices(
            overlay_ifindex=OVERLAY_IF, host_ifindex=HOST_IF, uplink_ifindex=UPLINK_IF, host_mac=abi.mac_bytes(HOST_MAC),
            overlay_port=socket.htons(OVERLAY_PORT), v4=abi.be32(ipaddress.IPv4Address(UNDERLAY[HERE][0]))))
        for index, entry in NODES.items():
            self.nodes.update(index, entry)

    def close(self) -> None:
        self.forget()
        for index in NODES:
            self.nodes.update(index, abi.NodeEntry())
        self._exit.close()

    def forget_near(self) -> None:
        """Let no CPU remember what it was told."""
        for slot in range(abi.IPC_NEAR_SLOTS):
            self._near.update(slot, abi.IpcacheNear())

    def know(self, prefix: str, identity: int, node: int, *, before: int = 0, grace_s: float = 0.0,
             at_once: bool = True) -> None:
        """Put a line into the ipcache. Unless `at_once`, programs may take some milliseconds to notice."""
        network = ipaddress.ip_network(prefix)
        single = network.prefixlen == network.max_prefixlen
        entry = abi.IpcacheEntry(identity=identity, node=node, before=before,
                                 before_until=max(0, int(time.monotonic() + grace_s)) if before else 0,
                                 flags=abi.IpcacheFlag.SINGLE if single else 0)
        table, key = ((self.addrs, abi.FibAddr.of(network.network_address)) if single
                      else (self.prefixes, abi.IpcachePrefix.of(network)))
        table.update(key, entry)
        self._known.append((table, key))
        if at_once:
            self.forget_near()

    def forget(self) -> None:
        """Empty the ipcache."""
        while self._known:
            table, key = self._known.pop()
            table.delete(key)
        self.forget_near()

    def run(self, packet: bytes, program: str, tunnel: Tunnel | None = None, *, gso_size: int = 0) -> Result:
        """Run a packet through a program of the identity service, as if it had come out of `tunnel`."""
        fd = self._programs[program]
        if tunnel is not None:
            self._tunnel.update(0, tunnel)
            if self._behind != program:  # each change waits for all CPUs
                progs.set_slot(self._next, 0, fd)
                self._behind = program
            fd = self._tunnel_prog
        self.dp.programs["between nodes"] = fd
        return self.dp.run(packet, "between nodes", gso_size=gso_size)


@contextmanager
def loaded(instance: Instance) -> Iterator[None]:
    """Have the identity service's programs in an instance's pipeline."""
    import asyncio

    asyncio.run(loader.load([install.spec(), TUNNEL_SPEC], instance.pin_dir))
    try:
        yield
    finally:
        progs.clear_slot(instance.pin_dir / abi.MAPS[abi.SLOTS_MAP], abi.Slot.REMOTE)
