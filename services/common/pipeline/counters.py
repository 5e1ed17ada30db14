"""The data path's counters: packets and bytes by reason and direction, summed over all CPUs."""

from __future__ import annotations

import ctypes as ct
from typing import TYPE_CHECKING

from services.common.kernel.maps import BpfMap
from services.common.pipeline import abi
from services.common.pipeline.reasons import Reason

if TYPE_CHECKING:
    from services.common.instance import Instance

CounterMap = BpfMap[ct.c_uint32, abi.PlCounter]


def open_counters(instance: Instance) -> CounterMap:
    """The instance's counters; the caller closes them. NotFound if the pipeline is not installed."""
    return BpfMap.open(instance.pin_dir / abi.MAPS["pl_counters"], ct.c_uint32, abi.PlCounter)


def read_counters(counters: CounterMap) -> dict[tuple[int, int], tuple[int, int]]:
    """{(reason, direction): (packets, bytes)} of those that are not zero, since the map was made.

    Reason 0 (Reason.NONE) counts what was not dropped. Reasons and directions a newer program has are plain numbers.
    Bytes include the Ethernet header; a super-packet (GSO) counts as one packet.
    """
    sums: dict[tuple[int, int], tuple[int, int]] = {}
    for key, values in counters.items_percpu():
        packets = sum(int(value.packets) for value in values)
        if packets:
            sums[divmod(key.value, abi.DIR_COUNT)] = packets, sum(int(value.bytes) for value in values)
    return sums


def reason_name(number: int) -> str:
    """The metric label of a reason: "spoofed_mac", or the number if this program does not know it."""
    return Reason(number).label if number in Reason._value2member_map_ else str(number)
