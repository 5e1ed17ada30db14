"""Identities in etcd. What is written below /fibril/v1/<cluster>/:

    cluster                       StoredCluster: which number the cluster has, said by its first node
    identities/id/<n>             StoredIdentity; retired: nobody holds it, and both keys hang on a quarantine lease
    identities/labels/<sha256>    the same
    identities/refs/<n>/<node>    empty, the node's lease: this node holds n
    identities/epochs/<node>      empty, the node's lease: see `begin`
    identities/sweeper            the name of the node that collects, its lease

Of an identity's two keys both change or none, so both have the same revision, and it stands for the identity's: whoever
changes something does so on condition that it has not moved. While a retired identity is in quarantine its labels can have no
other number, and its number no other labels. A node's references are made on condition of its epoch's
revision, too. So a request that a process has sent before it died, or has given up while etcd was slow, is without effect
once another epoch has begun, and what is read from then on stays so.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from google.protobuf.message import DecodeError

from fibril.identity.v1 import identity_pb2 as pb
from services.common import errors
from services.common.etcd.batch import Batcher, Txn
from services.common.etcd.client import TXN_OPS_MAX, EtcdClient
from services.identity.identities.model import canonical, digest, labels_of


class Record(NamedTuple):
    """An identity as it was at `revision`. Retired: its number waits in quarantine."""

    number: int
    key: str
    revision: int
    retired: bool = False


class Epoch(NamedTuple):
    """A node's right to hold identities: a lease, and the revision since when."""

    lease: int
    revision: int


class Look(NamedTuple):
    """What etcd had at `revision`.

    theirs: what the labels asked for have; occupant: what has the number asked for; epoch: revision of the node's.
    """

    theirs: Record | None
    occupant: Record | None
    epoch: int
    revision: int


class IdentityStore:
    """Every method raises Unavailable when etcd is away; a change may have been made all the same."""

    def __init__(self, etcd: EtcdClient, cluster: str, node: str) -> None:
        root = f"/fibril/v1/{cluster}/"
        self._etcd = etcd
        self._batcher = Batcher(etcd)
        self._cluster = cluster
        self._node = node
        self._cluster_key = f"{root}cluster"
        self.ids_prefix = f"{root}identities/id/"
        self.refs_prefix = f"{root}identities/refs/"
        self.sweeper_key = f"{root}identities/sweeper"
        self._labels_prefix = f"{root}identities/labels/"
        self._epoch_key = f"{root}identities/epochs/{node}"

    # -- the node

    async def claim(self, cluster_id: int) -> None:
        """Make it the cluster's number, if that has none yet. FailedPrecondition if it has another."""
        mine = pb.StoredCluster(name=self._cluster, cluster_id=cluster_id).SerializeToString()
        while (found := await self._etcd.get(self._cluster_key)) is None:
            await self._etcd.cas(self._cluster_key, 0, mine)
        try:
            theirs = pb.StoredCluster.FromString(found.value).cluster_id
        except DecodeError:
            theirs = 0
        if theirs != cluster_id:
            raise errors.FailedPrecondition(
                f"cluster {self._cluster!r} has the number {theirs}, this node is configured for {cluster_id}",
                field="etcd.cluster_id",
                fix=f"set etcd.cluster_id to {theirs} here, or etcd.cluster to another name",
            )

    async def begin(self, lease: int) -> Epoch:
        """Begin an epoch of this node. NotFound when the lease has ended."""
        return Epoch(lease, await self._etcd.put(self._epoch_key, b"", lease=lease))

    async def refs_under(self, lease: int) -> set[int]:
        """The numbers whose references by this node hang on a lease."""
        found = (self.of_ref(key) for key in await self._etcd.keys_of(lease))
        return {number for number, node in found if node == self._node}

    async def refs(self, numbers: Iterable[int]) -> dict[int, int]:
        """Which of these this node has references to, and their revisions."""
        keys = [self._ref_key(number) for number in numbers]
        found: dict[int, int] = {}
        for start in range(0, len(keys), TXN_OPS_MAX):
            listing = await self._etcd.get_many(keys[start : start + TXN_OPS_MAX])
            found |= {self.of_ref(kv.key)[0]: kv.mod_revision for kv in listing.kvs}
        return found

    # -- identities. Each gives the revision at which it happened; None: something was not as supposed, nothing has changed.

    async def create(self, number: int, key: str, epoch: Epoch) -> int | None:
        """Make an identity and hold it, if neither its number nor its labels are taken."""
        labels_key, id_key = self._labels_key(key), self._id_key(number)
        return await self._hold(number, key, {labels_key: 0, id_key: 0}, epoch)

    async def revive(self, record: Record, epoch: Epoch) -> int | None:
        """Hold a retired identity again."""
        expect = {
            self._labels_key(record.key): record.revision,
            self._id_key(record.number): record.revision,
        }
        return await self._hold(record.number, record.key, expect, epoch)

    async def take(self, record: Record, epoch: Epoch) -> int | None:
        """Hold an identity that exists; the reference's revision, the identity's stays."""
        ref = self._ref_key(record.number)
        expect = {self._id_key(record.number): record.revision, self._epoch_key: epoch.revision}
        return await self._batcher.transact(Txn(expect, put={ref: b""}, leases={ref: epoch.lease}))

    async def drop(self, number: int, revision: int) -> None:
        """Hold it no more, unless it has been taken again since."""
        ref = self._ref_key(number)
        await self._batcher.transact(Txn({ref: revision}, delete=(ref,)))

    async def retire(self, record: Record, quarantine: int) -> int | None:
        """Free labels and number of an identity nobody holds, once the lease `quarantine` has ended."""
        labels_key, id_key = self._labels_key(record.key), self._id_key(record.number)
        value = _encode(record.number, record.key, retired=True)
        return await self._batcher.transact(
            Txn(
                {id_key: record.revision, labels_key: record.revision},
                nothing_below=(f"{self.refs_prefix}{record.number}/",),
                put={id_key: value, labels_key: value},
                leases={id_key: quarantine, labels_key: quarantine},
            )
        )

    async def look(self, key: str, number: int) -> Look:
        """What is there now."""
        labels_key, id_key = self._labels_key(key), self._id_key(number)
        listing = await self._etcd.get_many((labels_key, id_key, self._epoch_key))
        found = {kv.key: kv for kv in listing.kvs}
        theirs = occupant = None
        if (kv := found.get(labels_key)) is not None and (its := _number(kv.value)):
            theirs = decode(its, kv.value, kv.mod_revision)
        if (kv := found.get(id_key)) is not None:
            occupant = decode(number, kv.value, kv.mod_revision)
        kv = found.get(self._epoch_key)
        return Look(theirs, occupant, 0 if kv is None else kv.mod_revision, listing.revision)

    async def _hold(self, number: int, key: str, expect: dict[str, int], epoch: Epoch) -> int | None:
        ref, value = self._ref_key(number), _encode(number, key)
        return await self._batcher.transact(
            Txn(
                expect | {self._epoch_key: epoch.revision},
                put={self._id_key(number): value, self._labels_key(key): value, ref: b""},
                leases={ref: epoch.lease},
            )
        )

    # -- keys

    def number_of(self, id_key: str) -> int:
        """The number in a key below `ids_prefix`; 0 for what no Fibril wrote."""
        text = id_key.removeprefix(self.ids_prefix)
        return int(text) if text.isdecimal() else 0

    def of_ref(self, ref_key: str) -> tuple[int, str]:
        """Number and node in a key below `refs_prefix`; (0, "") for another key."""
        number, _, node = ref_key.removeprefix(self.refs_prefix).partition("/")
        return (int(number), node) if number.isdecimal() else (0, "")

    def _id_key(self, number: int) -> str:
        return f"{self.ids_prefix}{number}"

    def _labels_key(self, key: str) -> str:
        return f"{self._labels_prefix}{digest(key)}"

    def _ref_key(self, number: int) -> str:
        return f"{self.refs_prefix}{number}/{self._node}"


def decode(number: int, value: bytes, revision: int) -> Record:
    """From etcd. What no Fibril wrote keeps its number from being used, and stands for no labels."""
    try:
        message = pb.StoredIdentity.FromString(value)
    except DecodeError:
        return Record(number, "", revision, retired=True)
    return Record(number, canonical(message.labels), revision, message.retired)


def _number(value: bytes) -> int:
    try:
        return pb.StoredIdentity.FromString(value).number
    except DecodeError:
        return 0


def _encode(number: int, key: str, *, retired: bool = False) -> bytes:
    return pb.StoredIdentity(number=number, labels=labels_of(key), retired=retired).SerializeToString()
