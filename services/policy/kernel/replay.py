"""The programs' answer, found in their own tables: bpf/policy/lookup.h once more, for people who ask why."""

from __future__ import annotations

import ctypes as ct
import struct
from collections.abc import Callable
from dataclasses import dataclass

from services.common.errors import FibrilError
from services.common.instance import Instance
from services.common.kernel.maps import BpfMap
from services.common.pipeline import abi as pipeline
from services.common.pipeline.abi import FibAddr, IPAddress, addr_bytes
from services.identity.numbers import Reserved
from services.policy import abi
from services.policy.kernel.tables import Tables
from services.policy.model import Direction


@dataclass(frozen=True)
class Answer:
    """What a program would find. policy 0: nothing is known of the endpoint; cell 0 otherwise: broken tables."""

    policy: int
    revision: int
    flags: int
    enforced: bool
    cell: int

    @property
    def verdict(self) -> int:
        return self.cell >> 32 & 0xFF

    @property
    def rule(self) -> int:
        return self.cell & 0xFFFFFFFF

    @property
    def allowed(self) -> bool:
        return self.verdict & abi.VERDICT == abi.Verdict.ALLOW


def identity_of(instance: Instance, address: IPAddress) -> int:
    """Identity that programs give an address: of a pod of this node, else by the ipcache, else the world's."""
    pins, key = instance.pin_dir, FibAddr.of(address)
    try:
        with BpfMap.open(pins / pipeline.MAPS["ep_addr"], FibAddr, pipeline.Endpoint) as pods:
            pod = pods.lookup(key)
            if pod is not None:
                return int(pod.identity)
        with BpfMap.open(pins / pipeline.MAPS["ipc_addr"], FibAddr, pipeline.IpcacheEntry) as singles:
            entry = singles.lookup(key)
        if entry is None:
            with BpfMap.open(pins / pipeline.MAPS["ipc_prefix"], pipeline.IpcachePrefix, pipeline.IpcacheEntry) as tree:
                entry = tree.lookup(pipeline.IpcachePrefix(bits=128, addr=(ct.c_uint8 * 16)(*bytes(key))))
    except FibrilError:
        return int(Reserved.WORLD)
    return int(entry.identity) if entry is not None else int(Reserved.WORLD)


def ask(
    tables: Tables, endpoint: int, direction: Direction, peer: int, address: IPAddress, protocol: int, port: int
) -> Answer:
    """The verdict of an endpoint's policy on a connection with a peer."""
    ep = tables.ep(endpoint)
    if not ep.policy:
        return Answer(0, 0, ep.flags, True, 0)
    policy = tables.policies.at(ep.policy, abi.Policy)
    enforced = bool(policy.sides[direction].flags & abi.ENFORCED)
    local = direction is Direction.INGRESS and peer == Reserved.HOST
    if local and tables.config.flags & abi.ConfigFlag.HOST:
        cell = abi.cell_range(0, 0, int(abi.Verdict.ALLOW), abi.RULE_HOST)
    elif not enforced:
        cell = abi.cell_range(0, 0, int(abi.Verdict.ALLOW), abi.RULE_NONE)
    else:
        cell = _look(tables, policy, direction, peer, address, protocol, port)
    return Answer(ep.policy, ep.revision, ep.flags, enforced, cell)


def _look(
    tables: Tables,
    policy: abi.Policy,
    direction: Direction,
    peer: int,
    address: IPAddress,
    protocol: int,
    port: int,
) -> int:
    found = tables.peers.lookup(abi.Peer(policy.peers, peer))
    if found is not None:
        kind = found.value
    else:
        kind = 0 if tables.peers.lookup(abi.Peer(abi.KNOWN, peer)) is not None else policy.unknown
    prefix = 0
    if policy.prefixes:
        key = abi.Prefix(bits=160, table=policy.prefixes, addr=(ct.c_uint8 * 16)(*addr_bytes(address)))
        there = tables.prefixes.lookup(key)
        prefix = there.value if there is not None else 0
    side = policy.sides[direction]
    memory = tables.cells.mem

    def cell(at: int) -> int:
        return int(struct.unpack_from("=Q", memory, at * 8)[0])

    return _find(cell, cell(side.cells + kind * side.prefixes + prefix), protocol, port)


def _find(cell: Callable[[int], int], kind: int, protocol: int, port: int) -> int:
    first, count = kind & 0xFFFFFFFF, kind >> 32
    wanted = abi.cell_range(protocol, port, 0xFF, 0xFFFFFFFF)
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        if cell(first + middle) <= wanted:
            low = middle
        else:
            high = middle
    return cell(first + low) if count else 0
