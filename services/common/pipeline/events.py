"""Records of the ring buffer pl_events made readable, and the switch that makes the programs write them."""

from __future__ import annotations

import ctypes as ct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.common.errors import InvalidArgument
from services.common.kernel.maps import BpfMap
from services.common.pipeline import abi

if TYPE_CHECKING:
    from services.common.instance import Instance

ConfigMap = BpfMap[ct.c_uint32, abi.NodeConfig]


@dataclass(frozen=True)
class Event:
    """One packet. Ports, ethertype and length in host order; numbers as in abi.Verdict, Reason and abi.Direction."""

    time_unix_ns: int
    verdict: int
    reason: int
    direction: int
    source_endpoint: int
    """Endpoint number; 0: not a pod of this node, or dropped before it was looked up."""
    destination_endpoint: int
    source: str
    """Address; the MAC if the packet is not IP."""
    destination: str
    source_port: int
    destination_port: int
    protocol: int
    """IP protocol; 0 if the packet is not IP."""
    ethertype: int
    length: int
    """Bytes with the Ethernet header."""
    tcp_flags: int
    icmp_type: int
    icmp_code: int
    ifindex: int
    source_identity: int = 0
    """0: not known."""
    destination_identity: int = 0


def decode(record: bytes | memoryview, clock_offset_ns: int | None = None) -> Event:
    """A record of pl_events. ValueError if it is too short to be one.

    `clock_offset_ns` is what clock_offset() gives; pass it when decoding many.
    """
    raw = abi.Event.from_buffer_copy(record)
    return Event(
        time_unix_ns=raw.time + (clock_offset() if clock_offset_ns is None else clock_offset_ns),
        verdict=raw.verdict, reason=raw.reason, direction=raw.direction, source_endpoint=raw.src_id,
        destination_endpoint=raw.dst_id, source=_address(raw.src, raw.family),
        destination=_address(raw.dst, raw.family), source_port=abi.host16(raw.sport),
        destination_port=abi.host16(raw.dport), protocol=raw.proto, ethertype=abi.host16(raw.ethertype),
        length=raw.len, tcp_flags=raw.tcp_flags, icmp_type=raw.icmp_type, icmp_code=raw.icmp_code,
        ifindex=raw.ifindex, source_identity=raw.src_identity, destination_identity=raw.dst_identity)


def clock_offset() -> int:
    """Nanoseconds to add to the kernel's monotonic time for Unix time. Moves when the clock is set."""
    # Whoever loses the CPU between the two clocks finds too little.
    return max(time.time_ns() - time.monotonic_ns() for _ in range(3))


def _address(address: abi.FibAddr, family: int) -> str:
    if family:
        return str(address.ip() or "::")
    return ":".join(f"{byte:02x}" for byte in bytes(address)[:6])


def open_config(instance: Instance) -> ConfigMap:
    """The instance's pl_config; the caller closes it. NotFound if the pipeline is not installed."""
    return BpfMap.open(instance.pin_dir / abi.MAPS["pl_config"], ct.c_uint32, abi.NodeConfig)


def watch(config: ConfigMap, *, drops: bool, forward_every: int = 0) -> None:
    """Have programs report every drop, and one in `forward_every` other packets (0: none). Costs them nothing when off.

    Takes effect with the next packet and outlives this process. InvalidArgument unless 0 <= forward_every < 2^32.
    """
    if not 0 <= forward_every < 1 << 32:
        raise InvalidArgument(f"cannot report one in {forward_every} packets", field="forward_every",
                              fix="use 0 for none, 1 for all, or a larger number to sample")
    value = config.lookup(0) or abi.NodeConfig()
    value.watch_drops, value.watch_forward = int(drops), forward_every
    config.update(0, value)
