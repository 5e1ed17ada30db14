"""The map family `node`: how programs reach each node, and by which devices of this one.

What is in the kernel is compared first and only differences are written. Index 0 stands for no node and stays zero.
"""

from __future__ import annotations

import ctypes as ct
from collections.abc import Mapping
from typing import Any, Final

from services.common import errors
from services.common.instance import Instance
from services.common.kernel.maps import BpfMap
from services.common.kernel.netlink import Netlink
from services.common.pipeline import abi

_EMPTY: Final = bytes(ct.sizeof(abi.NodeEntry))


class NodeMap:
    """Ops of a reconciler whose keys are node indexes and whose objects are struct node_entry's bytes.

    `open` before use, and again after maps were made anew; Unavailable before.
    """

    def __init__(self, instance: Instance, netlink: Netlink) -> None:
        self._instance = instance
        self._netlink = netlink
        self._nodes: BpfMap[Any, abi.NodeEntry] | None = None
        self._config: BpfMap[Any, abi.NetworkDevices] | None = None

    def open(self) -> None:
        """Use the pinned maps. Raises what BpfMap.open raises. Blocks: netlink thread."""
        pins = self._instance.pin_dir
        nodes = BpfMap.open(pins / abi.MAPS["nd_nodes"], ct.c_uint32, abi.NodeEntry)
        try:
            config = BpfMap.open(pins / abi.MAPS["nd_config"], ct.c_uint32, abi.NetworkDevices)
        except errors.FibrilError:
            nodes.close()
            raise
        self.close()
        self._nodes, self._config = nodes, config

    def close(self) -> None:
        for each in (self._nodes, self._config):
            if each is not None:
                each.close()
        self._nodes = self._config = None

    async def actual(self) -> Mapping[int, bytes]:
        return await self._netlink.run(self._read)

    async def same(self, desired: bytes, actual: bytes) -> bool:
        return desired == actual

    async def update(self, key: int, desired: bytes) -> None:
        if not 0 < key < abi.ND_MAX:
            raise errors.ResourceExhausted(
                f"node index {key} is outside 1..{abi.ND_MAX - 1}", fix="delete nodes that are gone for good"
            )
        await self._netlink.run(self._write, key, desired)

    async def delete(self, key: int) -> None:
        await self._netlink.run(self._write, key, _EMPTY)

    def set_devices(self, devices: abi.NetworkDevices) -> bool:
        """Have programs use these devices; whether they were others before. Blocks: netlink thread."""
        if self._config is None:
            raise _unavailable()
        present = self._config.lookup(0)
        if present is not None and bytes(present) == bytes(devices):
            return False
        self._config.update(0, devices)
        return True

    def _read(self) -> dict[int, bytes]:
        if self._nodes is None:
            raise _unavailable()
        return {
            key.value: raw for key, value in self._nodes.items() if (raw := bytes(value)) != _EMPTY
        }  # fmt: skip

    def _write(self, key: int, raw: bytes) -> None:
        if self._nodes is None:
            raise _unavailable()
        self._nodes.update(key, abi.NodeEntry.from_buffer_copy(raw))


def _unavailable() -> errors.FibrilError:
    return errors.Unavailable("the network's BPF maps are not there yet")
