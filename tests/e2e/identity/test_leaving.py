"""A node that is taken down is gone from a shared etcd at once, not only when its lease ends."""

from __future__ import annotations

import asyncio

from services.common.etcd.embedded import EmbeddedEtcd
from tests.e2e.identity.identitynode import IdentityNode
from tests.interop.etcd.etcdrig import workplace


def test_down_withdraws_what_vanishes_with_the_node() -> None:
    node = IdentityNode()
    try:
        with workplace() as root:
            etcd = EmbeddedEtcd(root / "data", root / "run")
            asyncio.run(etcd.start())
            node.etcd = etcd.endpoint
            node.up("--etcd", etcd.endpoint)
            node.pod("a", {"app": "web"})
            node.settle()
            kinds = {key.split("/")[0] for key in node.keys("")}
            assert {"ip", "alive", "nodes", "identities"} <= kinds
            node.disconnect()
            node.fibril("down")
            kinds = {key.split("/")[0] for key in node.keys("")}
            assert not {"ip", "alive"} & kinds and "nodes" in kinds
            assert not node.keys("identities/refs/")
            # Without etcd it takes no longer than it takes.
            node.up("--etcd", etcd.endpoint)
    finally:
        node.close()
