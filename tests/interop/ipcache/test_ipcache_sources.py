"""Everything that the table is made from, put together."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from pathlib import Path

from services.common.etcd.client import EtcdClient
from services.common.etcd.embedded import EmbeddedEtcd
from services.identity.ipcache.model import Source, prefix_key
from services.identity.ipcache.publisher import Published
from tests.interop.etcd.etcdrig import until
from tests.interop.ipcache.ipcacherig import CLUSTER, Member, member, put_block, put_node

NODES = f"/fibril/v1/{CLUSTER}/nodes/"


def says(who: Member, address: str) -> tuple[int, str, Source] | None:
    entry = who.entry(address)
    return None if entry is None else (entry.identity, entry.node, entry.source)


async def test_nodes_and_their_blocks_are_known(etcd: EmbeddedEtcd, place: Path, client: EtcdClient) -> None:
    for number, name in enumerate(("a", "b"), 1):
        await put_node(client, name, f"198.18.77.{number}", f"2001:db8:77::{number}")
        await put_block(client, name, f"10.0.{number}.0/24", f"10.0.{number}.1")
    async with member(etcd.endpoint, "a", place) as a:
        a.publisher.want({ip_address("10.0.1.9"): Published(100)})
        await until(lambda: says(a, "10.0.1.9") == (100, "a", Source.POD), "the pod")
        await until(a.ipcache.synced.is_set, "the nodes")
        for address, wanted in {
            "198.18.77.1": (1, "a", Source.NODE),
            "2001:db8:77::1": (1, "a", Source.NODE),
            "10.0.1.1": (1, "a", Source.NODE),
            "10.0.1.7": (3, "a", Source.BLOCK),
            "198.18.77.2": (6, "b", Source.NODE),
            "10.0.2.1": (6, "b", Source.NODE),
            "10.0.2.7": (3, "b", Source.BLOCK),
            "10.0.3.1": None,
        }.items():
            assert says(a, address) == wanted, address


async def test_a_node_that_moves_or_leaves_takes_its_addresses_along(
    etcd: EmbeddedEtcd, place: Path, client: EtcdClient
) -> None:
    async with member(etcd.endpoint, "a", place) as a:
        await put_node(client, "b", "198.18.77.2")
        await put_block(client, "b", "10.0.2.0/24", "10.0.2.1")
        await until(lambda: says(a, "10.0.2.7") is not None, "b's block")
        await put_node(client, "b", "198.18.77.3")
        await until(lambda: says(a, "198.18.77.3") == (6, "b", Source.NODE), "the new address")
        assert says(a, "198.18.77.2") is None
        # Another node takes over an address before its former owner has left it.
        await put_node(client, "c", "198.18.77.3")
        await until(lambda: says(a, "198.18.77.3") == (6, "c", Source.NODE), "the newest owner")
        await put_node(client, "b", "198.18.77.2")
        await until(lambda: says(a, "198.18.77.2") == (6, "b", Source.NODE), "the old address")
        assert says(a, "198.18.77.3") == (6, "c", Source.NODE)
        await client.delete(f"{NODES}b")
        await until(lambda: says(a, "198.18.77.2") is None, "b's end")
        assert says(a, "10.0.2.7") is None
        assert says(a, "198.18.77.3") == (6, "c", Source.NODE)


async def test_the_hosts_own_addresses_are_the_hosts(etcd: EmbeddedEtcd, place: Path) -> None:
    async with member(etcd.endpoint, "a", place) as a:
        await a.ipcache.synced.wait()
        own = a.ipcache._host.addresses
        for address in own:
            assert not address.is_loopback and not address.is_link_local
            assert says(a, str(address)) == (1, "a", Source.NODE)
        assert says(a, "127.0.0.1") is None


async def test_of_several_declarations_the_strongest_counts(
    etcd: EmbeddedEtcd, place: Path, client: EtcdClient
) -> None:
    async with member(etcd.endpoint, "a", place) as a, member(etcd.endpoint, "b", place) as b:
        await a.ipcache.synced.wait()
        key, wide = prefix_key(ip_network("10.0.0.9/32")), prefix_key(ip_network("10.0.0.0/8"))
        a.ipcache.put_local("policy", {key: 0xFFF00001, wide: 0xFFF00002})
        assert says(a, "10.0.0.9") == (0xFFF00001, "", Source.LOCAL)
        assert says(b, "10.0.0.9") is None
        b.publisher.want({ip_address("10.0.0.9"): Published(100)})
        await until(lambda: says(a, "10.0.0.9") == (100, "b", Source.POD), "the pod")
        await put_node(client, "c", "10.0.0.9")
        await until(lambda: says(a, "10.0.0.9") == (6, "c", Source.NODE), "the node")
        await client.delete(f"{NODES}c")
        await until(lambda: says(a, "10.0.0.9") == (100, "b", Source.POD), "the pod again")
        b.publisher.want({})
        await until(lambda: says(a, "10.0.0.9") == (0xFFF00001, "", Source.LOCAL), "the declaration again")
        a.ipcache.delete_local("policy", [key])
        assert says(a, "10.0.0.9") == (0xFFF00002, "", Source.LOCAL)
