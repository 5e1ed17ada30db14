"""The other nodes' addresses, as the identity service keeps them in the kernel for its own programs."""

from __future__ import annotations

import ctypes as ct
from ipaddress import IPv4Address

from services.common import errors
from services.common.instance import Instance
from services.common.kernel.maps import BpfMap
from services.common.pipeline import abi
from services.common.pipeline.abi import IPAddress


def addresses(instance: Instance) -> frozenset[IPAddress]:
    """None where there is no identity service. Raises FibrilError, OSError if they cannot be read."""
    found: set[IPAddress] = set()
    try:
        with BpfMap.open(instance.pin_dir / abi.MAPS["nd_nodes"], ct.c_uint32, abi.NodeEntry) as nodes:
            for _, node in nodes.items():
                if node.mode != abi.NodeMode.NONE:
                    v6 = node.v6.ip()
                    found |= {IPv4Address(int(node.v4).to_bytes(4, "little"))} if node.v4 else set()
                    found |= {v6} if v6 is not None and not v6.is_unspecified else set()
    except errors.NotFound:
        return frozenset()
    return frozenset(found)
