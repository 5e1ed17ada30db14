"""Forgetting a node that is gone for good: its record, its blocks, what is left of its pods' addresses and probes.

Every step is on the condition that the node gives no sign of life, so one that comes back meanwhile keeps what is left, and
claims what it lacks. Done again, it completes what was left undone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from google.protobuf.message import DecodeError

from fibril.ipam.v1 import ipam_pb2
from fibril.ipcache.v1 import ipcache_pb2
from services.common import errors
from services.common.etcd.client import EtcdClient, KeyValue
from services.identity.nodes.directory import ALIVE, BLOCKS, NODES, root_of

_BATCH: Final = 100


async def remove(etcd: EtcdClient, cluster: str, name: str) -> list[str]:
    """The blocks that are free again. FailedPrecondition when the node lives, Unavailable, Aborted when something changed
    meanwhile.
    """
    root = root_of(cluster)
    alive = root + ALIVE + name
    if await etcd.get(alive) is not None:
        raise _lives(name)
    blocks = [kv for kv in (await etcd.get_prefix(root + BLOCKS)).kvs if _block_of(kv) == name]
    addresses = [kv for kv in (await etcd.get_prefix(f"{root}ip/")).kvs if _address_of(kv) == name]
    probes = list((await etcd.get_prefix(f"{root}health/{name}/")).kvs)
    record = await etcd.get(root + NODES + name)
    # The record last: until then the call can be made again.
    for group in (blocks, addresses, probes, [record] if record is not None else []):
        await _delete(etcd, alive, name, group)
    return sorted(ipam_pb2.Block.FromString(kv.value).cidr for kv in blocks)


async def _delete(etcd: EtcdClient, alive: str, name: str, kvs: Sequence[KeyValue]) -> None:
    for start in range(0, len(kvs), _BATCH):
        group = kvs[start : start + _BATCH]
        expect = {alive: 0, **{kv.key: kv.mod_revision for kv in group}}
        if await etcd.transact(expect, delete=[kv.key for kv in group]) is None:
            if await etcd.get(alive) is not None:
                raise _lives(name)
            raise errors.Aborted(
                f"what node {name} had was changed by another client meanwhile", fix="repeat the call"
            )


def _lives(name: str) -> errors.FibrilError:
    return errors.FailedPrecondition(
        f"node {name} is alive", field="name", fix="stop it first: fibril down, on that node"
    )


def _block_of(kv: KeyValue) -> str:
    try:
        return ipam_pb2.Block.FromString(kv.value).node
    except DecodeError:
        return ""


def _address_of(kv: KeyValue) -> str:
    try:
        return ipcache_pb2.StoredAddress.FromString(kv.value).node
    except DecodeError:
        return ""
