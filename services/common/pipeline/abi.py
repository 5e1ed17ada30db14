"""The contract of bpf/abi/*.h in ctypes: maps of all families, version 1.

Structures carry the C names' fields, sizes and offsets; tests/datapath compares them with what the compiler
made. Fields the C headers call __be16 or __be32 hold network order: use the helpers, not the integers.
"""

from __future__ import annotations

import ctypes as ct
import enum
import ipaddress
import socket
from typing import Final, Self

from services.common.pipeline.reasons import COUNT as REASON_COUNT

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

EP_MAX: Final = 65536
EP_NEAR_SLOTS: Final = 4096
EP_CROWDED: Final = 0x80000000
"""In the flags of an element of ep_near: of the slot, not of the pod in it."""
IPC_ADDR_MAX: Final = 524288
IPC_PREFIX_MAX: Final = 65536
IPC_NEAR_SLOTS: Final = 1024
ND_MAX: Final = 16384
SLOTS_MAP: Final = "pl_slots"
EVENTS_BYTES: Final = 1 << 20

ENDPOINT_FAMILY: Final = "endpoint/v1"
PIPELINE_FAMILY: Final = "pipeline/v1"
IPCACHE_FAMILY: Final = "ipcache/v1"
NODE_FAMILY: Final = "node/v1"
MAPS: Final = {
    **{name: f"{ENDPOINT_FAMILY}/{name}" for name in ("ep_iface", "ep_addr", "ep_near", "ep_netns", "ep_cgroup")},
    **{name: f"{PIPELINE_FAMILY}/{name}"
       for name in (SLOTS_MAP, "pl_ctx", "pl_config", "pl_counters", "pl_events")},
    **{name: f"{IPCACHE_FAMILY}/{name}" for name in ("ipc_addr", "ipc_prefix", "ipc_near")},
    **{name: f"{NODE_FAMILY}/{name}" for name in ("nd_nodes", "nd_config")},
}
"""Map -> pin path below an instance's pin directory."""
POLICY_EPS: Final = "policy/v1/pol_eps"
"""Pin path of the policies in force, for who waits for one; services.policy.abi has the family."""

_V4_PREFIX: Final = bytes(10) + b"\xff\xff"


class Slot(enum.IntEnum):
    """enum slot: entries of pl_slots."""

    LB = 0
    POLICY_EGRESS = 1
    FORWARD = 2
    POLICY_INGRESS = 3
    DELIVER = 4
    NEIGHBOUR = 5
    REMOTE = 6
    FROM_OVERLAY = 7
    LB_ANSWER = 8
    POLICY_HOST = 9


SLOT_COUNT: Final = 16


class Direction(enum.IntEnum):
    """enum direction; numbers as in fibril.monitor.v1.Direction."""

    FROM_POD = 1
    TO_POD = 2
    FROM_OVERLAY = 3
    FROM_UPLINK = 4
    FROM_HOST = 5


DIR_COUNT: Final = 8


class Verdict(enum.IntEnum):
    """enum verdict; numbers as in fibril.monitor.v1.Verdict."""

    DROPPED = 1
    DELIVERED = 2
    TO_STACK = 3
    TO_OVERLAY = 4
    TO_NODE = 5


class EndpointFlag(enum.IntFlag):
    """EP_* of struct endpoint."""

    SHAPED_IN = 0x1
    SHAPED_OUT = 0x2


class PacketFlag(enum.IntFlag):
    """PKT_* of struct pkt_ctx."""

    FRAG_FIRST = 0x1
    FRAG_LATER = 0x2
    TRANSLATED = 0x4
    VLAN = 0x8
    ANSWERS = 0x10
    ANSWER = 0x20
    QUOTED = 0x40


def addr_bytes(address: IPAddress) -> bytes:
    """An address as struct fib_addr holds it, 16 bytes."""
    packed = address.packed
    return packed if len(packed) == 16 else _V4_PREFIX + packed


class FibAddr(ct.Structure):
    """struct fib_addr: an address of either family, IPv4 as ::ffff:a.b.c.d. `bytes()` of it can be hashed."""

    _fields_ = (("q", ct.c_uint64 * 2),)

    @classmethod
    def of(cls, address: IPAddress | str) -> Self:
        """From an address or its text. ValueError if it is none."""
        if isinstance(address, str):
            address = ipaddress.ip_address(address)
        return cls.from_buffer_copy(addr_bytes(address))

    def ip(self) -> IPAddress | None:
        """The address; None if all zero."""
        raw = bytes(self)
        if raw.startswith(_V4_PREFIX):
            return ipaddress.IPv4Address(raw[12:])
        return ipaddress.IPv6Address(raw) if any(raw) else None


def be32(address: ipaddress.IPv4Address) -> int:
    """An IPv4 address as the integer a __be32 field takes."""
    return int.from_bytes(address.packed, "little")


def mac_bytes(mac: str) -> ct.Array[ct.c_uint8]:
    """"02:00:00:00:00:01" as a field value. ValueError if it is no MAC."""
    raw = bytes.fromhex(mac.replace(":", ""))
    if len(raw) != 6:
        raise ValueError(f"{mac!r} is not a MAC address")
    return (ct.c_uint8 * 6)(*raw)


class Endpoint(ct.Structure):
    """struct endpoint: the value of ep_iface and ep_addr."""

    _fields_ = (
        ("v6", FibAddr), ("v4", ct.c_uint32), ("id", ct.c_uint32), ("ifindex", ct.c_uint32),
        ("identity", ct.c_uint32), ("flags", ct.c_uint32), ("host_mac", ct.c_uint8 * 6),
        ("pod_mac", ct.c_uint8 * 6), ("mtu", ct.c_uint16), ("pad", ct.c_uint16),
        ("reserved", ct.c_uint32 * 3),
    )

    @classmethod
    def of(cls, *, id: int, ifindex: int, mac: str, host_mac: str, mtu: int, ipv4: str = "", ipv6: str = "",
           identity: int = 0, flags: int = 0) -> Self:
        """From text addresses, empty for a family the pod does not have. ValueError for a malformed one."""
        return cls(
            v6=FibAddr.of(ipaddress.IPv6Address(ipv6)) if ipv6 else FibAddr(),
            v4=be32(ipaddress.IPv4Address(ipv4)) if ipv4 else 0, id=id, ifindex=ifindex, identity=identity,
            flags=flags, host_mac=mac_bytes(host_mac), pod_mac=mac_bytes(mac), mtu=mtu)

    @property
    def ipv4(self) -> ipaddress.IPv4Address | None:
        return ipaddress.IPv4Address(self.v4.to_bytes(4, "little")) if self.v4 else None

    @property
    def ipv6(self) -> ipaddress.IPv6Address | None:
        address = self.v6.ip()
        return address if isinstance(address, ipaddress.IPv6Address) else None


class PktCtx(ct.Structure):
    """struct pkt_ctx: for tests and debugging; a packet's context means nothing to user space."""

    _fields_ = (
        ("src", FibAddr), ("dst", FibAddr), ("orig_dst", FibAddr), ("src_id", ct.c_uint32),
        ("dst_id", ct.c_uint32), ("src_identity", ct.c_uint32), ("dst_identity", ct.c_uint32),
        ("src_flags", ct.c_uint32), ("dst_flags", ct.c_uint32), ("dst_ifindex", ct.c_uint32),
        ("flags", ct.c_uint32), ("sport", ct.c_uint16), ("dport", ct.c_uint16), ("orig_dport", ct.c_uint16),
        ("ethertype", ct.c_uint16), ("l4_off", ct.c_uint16), ("l4_len", ct.c_uint8), ("family", ct.c_uint8),
        ("proto", ct.c_uint8), ("tcp_flags", ct.c_uint8), ("icmp_type", ct.c_uint8),
        ("icmp_code", ct.c_uint8), ("direction", ct.c_uint8), ("pad", ct.c_uint8 * 7),
        ("room", ct.c_uint32 * 8),
    )


class NodeConfig(ct.Structure):
    """struct node_config: the one value of pl_config."""

    _fields_ = (("watch_drops", ct.c_uint32), ("watch_forward", ct.c_uint32), ("reserved", ct.c_uint32 * 6))


class PlCounter(ct.Structure):
    """struct pl_counter: a value of pl_counters, one a CPU."""

    _fields_ = (("packets", ct.c_uint64), ("bytes", ct.c_uint64))


class Event(ct.Structure):
    """struct event: a record of pl_events. `services.common.pipeline.events` makes it readable."""

    _fields_ = (
        ("time", ct.c_uint64), ("src", FibAddr), ("dst", FibAddr), ("src_id", ct.c_uint32),
        ("dst_id", ct.c_uint32), ("src_identity", ct.c_uint32), ("dst_identity", ct.c_uint32),
        ("len", ct.c_uint32), ("ifindex", ct.c_uint32), ("reason", ct.c_uint16),
        ("ethertype", ct.c_uint16), ("sport", ct.c_uint16), ("dport", ct.c_uint16), ("verdict", ct.c_uint8),
        ("direction", ct.c_uint8),
        ("family", ct.c_uint8), ("proto", ct.c_uint8), ("tcp_flags", ct.c_uint8), ("icmp_type", ct.c_uint8),
        ("icmp_code", ct.c_uint8), ("pad", ct.c_uint8),
    )


class PolicyEp(ct.Structure):
    """struct pol_ep: what is in force for an endpoint. policy 0: nothing is known, everything is denied."""

    _fields_ = (
        ("policy", ct.c_uint32), ("revision", ct.c_uint32), ("flags", ct.c_uint32), ("owner", ct.c_uint32),
    )  # fmt: skip


class IpcacheFlag(enum.IntFlag):
    """IPC_* of struct ipcache_entry."""

    SINGLE = 0x1


class IpcacheEntry(ct.Structure):
    """struct ipcache_entry: the value of ipc_addr and ipc_prefix."""

    _fields_ = (("identity", ct.c_uint32), ("before", ct.c_uint32), ("before_until", ct.c_uint32),
                ("node", ct.c_uint16), ("flags", ct.c_uint16))


class IpcachePrefix(ct.Structure):
    """struct ipcache_prefix: the key of ipc_prefix."""

    _fields_ = (("bits", ct.c_uint32), ("addr", ct.c_uint8 * 16))

    @classmethod
    def of(cls, prefix: ipaddress.IPv4Network | ipaddress.IPv6Network) -> Self:
        raw = addr_bytes(prefix.network_address)
        return cls(bits=prefix.prefixlen + (96 if prefix.version == 4 else 0), addr=(ct.c_uint8 * 16)(*raw))

    def network(self) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
        raw = bytes(self.addr)
        if raw.startswith(_V4_PREFIX) and self.bits >= 96:
            return ipaddress.IPv4Network((raw[12:], self.bits - 96))
        return ipaddress.IPv6Network((raw, self.bits))


class IpcacheNear(ct.Structure):
    """struct ipcache_near: the value of ipc_near, one a CPU, for tests; programs alone write it."""

    _fields_ = (("addr", FibAddr), ("entry", IpcacheEntry), ("time", ct.c_uint64), ("pad", ct.c_uint64 * 3))


class NodeMode(enum.IntEnum):
    """enum node_mode."""

    NONE = 0
    LOCAL = 1
    OVERLAY = 2
    ROUTED = 3
    STACK = 4


class NodeFlag(enum.IntFlag):
    """NODE_* flags of struct node_entry."""

    TUNNEL_V6 = 0x1
    HOP_V6 = 0x2
    DIRECT = 0x4


class NodeEntry(ct.Structure):
    """struct node_entry: a value of nd_nodes."""

    _fields_ = (("v6", FibAddr), ("v4", ct.c_uint32), ("ifindex", ct.c_uint32), ("mtu", ct.c_uint16),
                ("mode", ct.c_uint8), ("flags", ct.c_uint8), ("pad", ct.c_uint32))


class NetworkDevices(ct.Structure):
    """struct network_config: the one value of nd_config."""

    _fields_ = (("overlay_ifindex", ct.c_uint32), ("host_ifindex", ct.c_uint32),
                ("uplink_ifindex", ct.c_uint32), ("host_mac", ct.c_uint8 * 6), ("overlay_port", ct.c_uint16),
                ("v4", ct.c_uint32), ("v6", FibAddr), ("reserved", ct.c_uint32 * 6))


def host16(value: int) -> int:
    """A __be16 field's integer in host order."""
    return socket.ntohs(value)


COUNTERS: Final = REASON_COUNT * DIR_COUNT
"""Entries of pl_counters."""
