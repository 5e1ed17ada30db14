"""The balancer's tc programs beside those of a Cluster, and what packets become on their way."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from services.common.instance import Instance
from services.common.kernel import loader, progs
from services.common.pipeline import abi as pipeline
from services.lb import abi, install
from tests.datapath.cluster import Cluster, loaded
from tests.datapath.lbtables import LbTables

VIP = {4: "10.96.0.1", 6: "fd00:96::1"}
NODE = {4: "192.168.7.1", 6: "fd77::1"}
HAIRPIN = {4: "169.254.42.1", 6: "fd00:fb:42::1"}
PROTO = {TCP: 6, UDP: 17}


@contextlib.contextmanager
def installed(instance: Instance) -> Iterator[None]:
    """Have identity's and the balancer's programs in an instance's pipeline."""
    with loaded(instance):
        asyncio.run(loader.load([install.packets()], instance.pin_dir))
        try:
            yield
        finally:
            progs.clear_slot(instance.pin_dir / pipeline.MAPS[pipeline.SLOTS_MAP], pipeline.Slot.LB)


class Lab:
    """Tables that are fresh, and a cluster around them."""

    def __init__(self, cluster: Cluster, **sizes: int) -> None:
        self.cluster, self.dp = cluster, cluster.dp
        self.tables = LbTables(cluster.dp.instance.pin_dir, **sizes)
        self.tables.snat(*NODE.values())

    def close(self) -> None:
        self.tables.close()

    def serve(
        self,
        family: int,
        backends: list[tuple[str, int]],
        layer: Any = TCP,
        port: int = 80,
        flags: int = abi.ServiceFlag.MAGLEV,
        **fields: Any,
    ) -> tuple[int, list[int]]:
        """A service at the VIP."""
        return self.tables.service([(VIP[family], port)], backends, PROTO[layer], flags, **fields)


def exact(data: bytes) -> bytes:
    """The frame with all lengths and checksums computed anew: equal to the frame if they were right."""
    copy = Ether(data)
    for layer in copy.layers():
        for name in ("chksum", "cksum", "len", "plen"):
            fields = copy[layer].fields
            if name in fields and not (layer is UDP and name == "chksum" and not copy[UDP].chksum):
                del fields[name]
    return bytes(copy)


def rewritten(
    packet: Any, src: str = "", dst: str = "", sport: int = 0, dport: int = 0, ttl: int = 0
) -> bytes:
    """What a packet is, from IP on, with other ends and one hop less (or `ttl` left)."""
    after = Ether(bytes(packet))
    ip = after[1]
    ip.src, ip.dst = src or ip.src, dst or ip.dst
    for layer in (TCP, UDP):
        if layer in after:
            after[layer].sport, after[layer].dport = sport or after[layer].sport, dport or after[layer].dport
            if layer is TCP or after[layer].chksum:
                del after[layer].chksum
    if isinstance(ip, IP):
        ip.ttl = ttl or ip.ttl - 1
        del ip.chksum
    else:
        assert isinstance(ip, IPv6)
        ip.hlim = ttl or ip.hlim - 1
    return bytes(ip)
