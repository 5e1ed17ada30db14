"""Identity numbers: 12 bits cluster, 20 bits number."""

from __future__ import annotations

import enum
from typing import Final

NUMBER_BITS: Final = 20
NUMBERS: Final = 1 << NUMBER_BITS
"""Numbers of one cluster; number 0 is not given out."""
LOCAL_CLUSTER: Final = 4095
"""Stands for "this node only": CIDR and FQDN identities."""


class Reserved(enum.IntEnum):
    """Identities of cluster 0, which mean the same everywhere."""

    HOST = 1
    WORLD = 2
    UNMANAGED = 3
    HEALTH = 4
    INIT = 5
    REMOTE_NODE = 6
    KUBE_APISERVER = 7
    INGRESS = 8

    @property
    def label(self) -> str:
        """Its one label's key: "reserved:remote-node"."""
        return "reserved:" + self.name.lower().replace("_", "-")


def make(cluster_id: int, number: int) -> int:
    """The 32-bit identity of a cluster's number."""
    return cluster_id << NUMBER_BITS | number


def cluster_of(identity: int) -> int:
    return identity >> NUMBER_BITS


def number_of(identity: int) -> int:
    return identity & NUMBERS - 1
