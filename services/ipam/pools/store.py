"""Pools and blocks in etcd, shared by all nodes of a cluster.

    /fibril/v1/<cluster>/pools/<pool>               fibril.ipam.v1.Pool
    /fibril/v1/<cluster>/blocks/<pool>/<a.b.c.d_n>  fibril.ipam.v1.Block

Two keys order what must not happen at once. `generation` is written by every change of any pool, on condition that
it has not moved since the pools were read: two pools can never come to overlap. `claims/<pool>` is written by every
claim of a block, and a change of a pool is made on condition that it has not moved since the blocks were read, while a claim is
made on condition that the pool has not moved: no block can be claimed out of a prefix that is being taken away.
"""

from __future__ import annotations

from ipaddress import ip_network

from fibril.ipam.v1 import ipam_pb2 as pb
from services.common import errors
from services.common.etcd.client import EtcdClient
from services.ipam.pools.model import Network
from services.ipam.pools.types import BlockInfo, Pool, check_overlap, checked_pool, inside

_TRIES = 8


def to_proto(pool: Pool) -> pb.Pool:
    """As the contract has it."""
    return pb.Pool(
        name=pool.name,
        mode=pb.PoolMode.ValueType(pool.mode),
        cidrs=[str(n) for n in pool.cidrs],
        excluded=[str(n) for n in pool.excluded],
        block_prefix_v4=pool.block_prefix[4],
        block_prefix_v6=pool.block_prefix[6],
        revision=pool.revision,
    )


def from_proto(message: pb.Pool, revision: int) -> Pool:
    """From the contract; InvalidArgument names the field."""
    return checked_pool(
        message.name,
        message.mode,
        list(message.cidrs),
        list(message.excluded),
        message.block_prefix_v4,
        message.block_prefix_v6,
        revision,
    )


def decode_pool(value: bytes, revision: int) -> Pool:
    """From etcd. DecodeError or InvalidArgument for what no Fibril wrote."""
    return from_proto(pb.Pool.FromString(value), revision)


class PoolStore:
    """Every method raises Unavailable when etcd is away."""

    def __init__(self, etcd: EtcdClient, cluster: str) -> None:
        root = f"/fibril/v1/{cluster}/"
        self._etcd = etcd
        self.pools_prefix = f"{root}pools/"
        self._blocks_prefix = f"{root}blocks/"
        self._claims_prefix = f"{root}claims/"
        self._generation = f"{root}generation"

    async def put(self, pool: Pool, previous: int) -> Pool:
        """Create (previous 0) or change a pool last changed at revision `previous`.

        AlreadyExists for an overlap, Aborted when it has changed meanwhile, FailedPrecondition when a block in use would
        fall out.
        """
        for _ in range(_TRIES):
            generation = await self._revision(self._generation)
            claims = await self._revision(self._claims_prefix + pool.name)
            listing = await self._etcd.get_prefix(self.pools_prefix)
            check_overlap(pool, [decode_pool(kv.value, kv.mod_revision) for kv in listing.kvs])
            for block in await self.blocks(pool.name):
                network = ip_network(block.cidr)
                if not any(inside(network, n) for n in pool.cidrs):
                    raise errors.FailedPrecondition(
                        f"block {block.cidr} of pool {pool.name} is held by node {block.node}",
                        field="pool.cidrs",
                        fix="keep its prefix until the block is empty and given back",
                    )
            key = self.pools_prefix + pool.name
            revision = await self._etcd.transact(
                {key: previous, self._generation: generation, self._claims_prefix + pool.name: claims},
                put={key: to_proto(pool).SerializeToString(), self._generation: b""},
            )
            if revision is not None:
                return Pool(pool.name, pool.mode, pool.cidrs, pool.excluded, pool.block_prefix, revision)
            if await self._revision(key) != previous:
                raise errors.Aborted(
                    f"pool {pool.name} has been changed by another client", fix="read it again and repeat"
                )
        raise errors.Aborted(f"pool {pool.name} is being changed by too many clients", fix="repeat the call")

    async def delete(self, pool: Pool, own_blocks: list[str], node: str) -> None:
        """Delete a pool and this node's (empty) blocks of it. FailedPrecondition when another node holds a block."""
        claims = await self._revision(self._claims_prefix + pool.name)
        others = [b for b in await self.blocks(pool.name) if b.node != node]
        if others:
            raise errors.FailedPrecondition(
                f"pool {pool.name} is in use: node {others[0].node} holds block {others[0].cidr}"
                + (f" ({len(others)} blocks in all)" if len(others) > 1 else ""),
                fix="remove the pods that use it; empty blocks are given back",
            )
        for cidr in own_blocks:
            await self.release(pool.name, cidr, node)
        key = self.pools_prefix + pool.name
        done = await self._etcd.transact(
            {key: pool.revision, self._claims_prefix + pool.name: claims},
            put={self._generation: b""},
            delete=(key,),
        )
        if done is None:
            raise errors.Aborted(
                f"pool {pool.name} has been changed by another client", fix="repeat the call"
            )

    async def claim(self, pool: Pool, network: Network, gateway: str, node: str) -> bool | None:
        """Claim a block; False if another has it; None if the pool has changed: read it again."""
        key = self._block_key(pool.name, str(network))
        value = pb.Block(cidr=str(network), pool=pool.name, node=node, gateway=gateway).SerializeToString()
        pool_key = self.pools_prefix + pool.name
        if (
            await self._etcd.transact(
                {key: 0, pool_key: pool.revision}, put={key: value, self._claims_prefix + pool.name: b""}
            )
            is not None
        ):
            return True
        taken = await self._etcd.get(key)
        if taken is None:
            return None
        # An earlier attempt of ours whose answer was lost is a success.
        return bool(pb.Block.FromString(taken.value).node == node)

    async def release(self, pool: str, cidr: str, node: str) -> None:
        """Give a block back if it is this node's."""
        key = self._block_key(pool, cidr)
        held = await self._etcd.get(key)
        if held is not None and pb.Block.FromString(held.value).node == node:
            await self._etcd.delete_if(key, held.mod_revision)

    async def blocks(self, pool: str = "") -> list[BlockInfo]:
        """Blocks of a pool, or of all, of every node."""
        listing = await self._etcd.get_prefix(self._blocks_prefix + (f"{pool}/" if pool else ""))
        found = [pb.Block.FromString(kv.value) for kv in listing.kvs]
        return [BlockInfo(b.cidr, b.pool, b.node, b.gateway) for b in found]

    async def _revision(self, key: str) -> int:
        kv = await self._etcd.get(key)
        return kv.mod_revision if kv else 0

    def _block_key(self, pool: str, cidr: str) -> str:
        return f"{self._blocks_prefix}{pool}/{cidr.replace('/', '_')}"
