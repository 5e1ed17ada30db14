"""`fibril ipam`: pools, blocks and allocations of addresses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from services.ctl.context import Ctl, pages, pass_ctl
from services.ctl.render import Record, age, columns, short, to_record

FAMILIES = ("4", "6")


def _usage(family: str, *fields: str) -> Callable[[Record], object]:
    """Sum of usage fields of one family of a pool; "" when the pool has none of it."""

    def value(record: Record) -> object:
        for usage in record["usage"]:
            if usage["family"] == family:
                return "/".join(_count(usage[f]) for f in fields)
        return ""

    return value


def _count(number: int) -> str:
    """A count; powers of two past a million as such, for IPv6 pools."""
    return str(number) if number < 1 << 24 else f"~2^{number.bit_length() - 1}"


POOLS = columns(
    ("NAME", "pool.name"),
    ("MODE", lambda r: short(r["pool"]["mode"], "POOL_MODE_")),
    ("CIDRS", "pool.cidrs"),
    ("EXCLUDED", "pool.excluded"),
    ("V4 USED/FREE", _usage("FAMILY_IPV4", "node_allocated", "node_free")),
    ("V4 BLOCKS", _usage("FAMILY_IPV4", "blocks_claimed", "blocks_total")),
    ("V6 USED/FREE", _usage("FAMILY_IPV6", "node_allocated", "node_free")),
    ("V6 BLOCKS", _usage("FAMILY_IPV6", "blocks_claimed", "blocks_total")),
)
ALLOCATIONS = columns(
    "address",
    "owner",
    "pool",
    "block",
    "gateway",
    ("AGE", lambda r: age(r["created_unix_seconds"])),
    ("EXPIRES IN", lambda r: _left(r["expires_unix_seconds"])),
)
CHANGES = columns(
    ("CHANGE", lambda r: short(r["kind"], "WATCH_KIND_")),
    ("ADDRESS", "allocation.address"),
    ("OWNER", "allocation.owner"),
    ("POOL", "allocation.pool"),
    "revision",
)
BLOCKS = columns("cidr", "pool", "node", "gateway")
RESULTS = columns(
    "address", ("RESULT", lambda r: r["message"] or ("ok" if r["code"] == 0 else f"status {r['code']}"))
)


def _left(expires: float) -> str:
    import time

    return f"{max(0, int(expires - time.time()))}s" if expires else "never"


def _stub(channel: Any) -> Any:
    from fibril.ipam.v1 import ipam_pb2_grpc

    return ipam_pb2_grpc.IpamServiceStub(channel)


def _ask(ctl: Ctl, method: str, request: Any) -> Any:
    """One unary call of IpamService."""
    return ctl.call(lambda ch: getattr(_stub(ch), method)(request, timeout=ctl.seconds))


def _all(ctl: Ctl, method: str, make: Callable[[Any], Any], items: str) -> list[dict[str, Any]]:
    """Every element of a paged List of IpamService."""

    async def use(channel: Any) -> list[Any]:
        stub = _stub(channel)
        return await pages(lambda page: getattr(stub, method)(make(page), timeout=ctl.seconds), items)

    return [to_record(item) for item in ctl.call(use)]


@click.group(short_help="Addresses: pools, blocks, allocations.")
def command() -> None:
    """Addresses: pools, blocks, allocations."""


@command.group()
def pool() -> None:
    """Pools of the cluster."""


@pool.command("ls")
@pass_ctl
def pool_ls(ctl: Ctl) -> None:
    """List the pools and how full they are."""
    from fibril.ipam.v1 import ipam_pb2

    ctl.show(
        _all(ctl, "ListPools", lambda page: ipam_pb2.ListPoolsRequest(page=page), "pools"), POOLS, "no pools"
    )


@pool.command("get")
@click.argument("name")
@pass_ctl
def pool_get(ctl: Ctl, name: str) -> None:
    """Show one pool."""
    from fibril.ipam.v1 import ipam_pb2

    ctl.show(to_record(_ask(ctl, "GetPool", ipam_pb2.GetPoolRequest(name=name)).pool), POOLS)


@pool.command("put")
@click.argument("name")
@click.option("--cidr", "cidrs", multiple=True, help="A prefix of the pool; give it again for more.")
@click.option("--exclude", "excluded", multiple=True, help="An address or prefix never to give out.")
@click.option(
    "--block-v4", type=click.IntRange(0, 30), default=0, help="Prefix length of a node's IPv4 block. [0: 24]"
)
@click.option(
    "--block-v6",
    type=click.IntRange(0, 126),
    default=0,
    help="Prefix length of a node's IPv6 block. [0: 112]",
)
@click.option(
    "--cloud", is_flag=True, help="A provider hands out single addresses (see `fibril ipam address`)."
)
@click.option("--revision", type=int, default=0, help="Refuse unless the pool still has this revision.")
@pass_ctl
def pool_put(
    ctl: Ctl,
    name: str,
    cidrs: Sequence[str],
    excluded: Sequence[str],
    block_v4: int,
    block_v6: int,
    cloud: bool,
    revision: int,
) -> None:
    """Create a pool, or change one while it is in use. What is given replaces the whole pool."""
    from fibril.ipam.v1 import ipam_pb2

    wanted = ipam_pb2.Pool(
        name=name,
        cidrs=cidrs,
        excluded=excluded,
        block_prefix_v4=block_v4,
        block_prefix_v6=block_v6,
        mode=ipam_pb2.POOL_MODE_CLOUD if cloud else ipam_pb2.POOL_MODE_CLUSTER,
        revision=revision,
    )
    ctl.describe(to_record(_ask(ctl, "PutPool", ipam_pb2.PutPoolRequest(pool=wanted)).pool))


@pool.command("rm")
@click.argument("name")
@pass_ctl
def pool_rm(ctl: Ctl, name: str) -> None:
    """Remove a pool nothing is allocated from."""
    from fibril.ipam.v1 import ipam_pb2

    _ask(ctl, "DeletePool", ipam_pb2.DeletePoolRequest(name=name))


@command.command("ls")
@click.option("--pool", default="", help="Only this pool.")
@click.option("--owner", default="", help="Only this owner.")
@pass_ctl
def ls(ctl: Ctl, pool: str, owner: str) -> None:
    """List this node's allocations."""
    from fibril.ipam.v1 import ipam_pb2

    ctl.show(
        _all(
            ctl,
            "ListAllocations",
            lambda page: ipam_pb2.ListAllocationsRequest(pool=pool, owner=owner, page=page),
            "allocations",
        ),
        ALLOCATIONS,
        "no allocations",
    )


@command.command("get")
@click.argument("address")
@pass_ctl
def get(ctl: Ctl, address: str) -> None:
    """Show who holds an address."""
    from fibril.ipam.v1 import ipam_pb2

    answer = _ask(ctl, "GetAllocation", ipam_pb2.GetAllocationRequest(address=address))
    ctl.describe(to_record(answer.allocation))


@command.command("allocate")
@click.argument("owner")
@click.option("--pool", default="", help='Pool; by default "default".')
@click.option(
    "--family", type=click.Choice(FAMILIES), help="Only this family; by default all that the pool has."
)
@click.option("--address", default="", help="This very address.")
@click.option(
    "--ttl",
    type=click.FloatRange(min=0),
    default=0.0,
    help="Seconds until it lapses unless renewed; 0: never.",
)
@pass_ctl
def allocate(ctl: Ctl, owner: str, pool: str, family: str | None, address: str, ttl: float) -> None:
    """Give OWNER an address of each family; asking again gives the same."""
    from fibril.ipam.v1 import ipam_pb2

    wanted = {None: ipam_pb2.FAMILY_UNSPECIFIED, "4": ipam_pb2.FAMILY_IPV4, "6": ipam_pb2.FAMILY_IPV6}[family]
    answer = _ask(
        ctl,
        "Allocate",
        ipam_pb2.AllocateRequest(owner=owner, pool=pool, family=wanted, address=address, ttl_seconds=ttl),
    )
    ctl.show([to_record(a) for a in answer.allocations], ALLOCATIONS)


@command.command("release")
@click.argument("owner")
@click.option("--address", default="", help="Only this address; by default all that the owner holds.")
@pass_ctl
def release(ctl: Ctl, owner: str, address: str) -> None:
    """Take back what OWNER holds."""
    from fibril.ipam.v1 import ipam_pb2

    answer = _ask(ctl, "Release", ipam_pb2.ReleaseRequest(owner=owner, address=address))
    ctl.show([{"released": a} for a in answer.released], columns("released"), "nothing was held")


@command.command("renew")
@click.argument("owner")
@click.option("--ttl", type=click.FloatRange(min=0), required=True, help="Seconds from now; 0: never lapse.")
@pass_ctl
def renew(ctl: Ctl, owner: str, ttl: float) -> None:
    """Move the expiry of OWNER's allocations."""
    from fibril.ipam.v1 import ipam_pb2

    answer = _ask(ctl, "Renew", ipam_pb2.RenewRequest(owner=owner, ttl_seconds=ttl))
    ctl.show([to_record(a) for a in answer.allocations], ALLOCATIONS)


@command.command("watch")
@click.option("--pool", default="", help="Only this pool.")
@pass_ctl
def watch(ctl: Ctl, pool: str) -> None:
    """Show allocations as they come and go, until interrupted."""
    from fibril.ipam.v1 import ipam_pb2

    live = ctl.live(CHANGES, (8, 39, 30, 10, 0))
    ctl.stream(
        lambda ch: _stub(ch).WatchAllocations(ipam_pb2.WatchAllocationsRequest(pool=pool)),
        lambda message: live.put(to_record(message)),
    )


@command.group()
def block() -> None:
    """Blocks nodes have carved from pools."""


@block.command("ls")
@click.option("--pool", default="", help="Only this pool.")
@click.option("--all-nodes", is_flag=True, help="Of every node of the cluster.")
@pass_ctl
def block_ls(ctl: Ctl, pool: str, all_nodes: bool) -> None:
    """List blocks."""
    from fibril.ipam.v1 import ipam_pb2

    answer = _ask(ctl, "ListBlocks", ipam_pb2.ListBlocksRequest(pool=pool, all_nodes=all_nodes))
    ctl.show([to_record(b) for b in answer.blocks], BLOCKS, "no blocks")


@command.group()
def address() -> None:
    """Addresses a provider gives to this node (pools in cloud mode)."""


def _batch(ctl: Ctl, method: str, request: Any) -> int:
    """A batch: one result an address; 1 when one of them failed."""
    results = [to_record(r) for r in _ask(ctl, method, request).results]
    ctl.show(results, RESULTS)
    return int(any(r["code"] for r in results))


@address.command("add")
@click.argument("pool")
@click.argument("addresses", nargs=-1, required=True)
@pass_ctl
def address_add(ctl: Ctl, pool: str, addresses: Sequence[str]) -> int:
    """Give ADDRESSES of POOL to this node."""
    from fibril.ipam.v1 import ipam_pb2

    return _batch(ctl, "AddAddresses", ipam_pb2.AddAddressesRequest(pool=pool, addresses=addresses))


@address.command("rm")
@click.argument("pool")
@click.argument("addresses", nargs=-1, required=True)
@pass_ctl
def address_rm(ctl: Ctl, pool: str, addresses: Sequence[str]) -> int:
    """Withdraw ADDRESSES of POOL from this node."""
    from fibril.ipam.v1 import ipam_pb2

    return _batch(ctl, "RemoveAddresses", ipam_pb2.RemoveAddressesRequest(pool=pool, addresses=addresses))
