"""Identities in etcd. What is written below /fibril/v1/<cluster>/:

    cluster                       StoredCluster: which number the cluster has, said by its first node
    identities/id/<n>             StoredIdentity; retired: nobody holds it, and both keys hang on a quarantine lease
    identities/labels/<sha256>    the same
    identities/refs/<n>/<node>    empty, the node's lease: this node holds n
    identities/epochs/<node>      empty, the node's lease: see `begin`
    identities/sweeper            the name of the node that collects, its lease

Of an identity's two keys both change or none, so both have the same revision, and it stands for the identity's: whoever
changes something does so on condition that it has not moved. While a retired identity is in quarantine its labels can have
no other number, and its number no other labels. Whoever follows the keys by labels knows everything.

A node's references are made on condition of its epoch's revision, too. So a request that a process has sent before it died,
or has given up while etcd was slow, is without effect once another epoch has begun, and what is read from then on stays so.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from google.protobuf.message import DecodeError

from fibril.identity.v1 import identity_pb2 as pb
from services.common import errors
from services.common.etcd.batch import Batcher, Txn
from services.common.etcd.client import TXN_OPS_MAX, EtcdClient
from services.common.telemetry import Counter, Meter
from services.identity.identities.model import Identity, canonical, digest, labels_of


class Record(NamedTuple):
    """An identity as it was at `revision`. Retired: its number waits in quarantine.

    name: digest of the labels; value: as in etcd. There may be very many identities, and few of them are ever looked into.
    """

    number: int
    name: str
    revision: int
    retired: bool
    value: bytes

    @property
    def identity(self) -> Identity:
        """The number and its labels."""
        return Identity(self.number, self._key)

    def _key(self) -> str:
        return canonical(pb.StoredIdentity.FromString(self.value).labels)


class Epoch(NamedTuple):
    """A node's right to hold identities: a lease, and the revision since when."""

    lease: int
    revision: int


class Reference(NamedTuple):
    """That this node holds a number: since which revision, and the lease it goes with."""

    revision: int
    lease: int


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
        self._changes = Counter()
        self._cluster = cluster
        self._node = node
        self._cluster_key = f"{root}cluster"
        self.labels_prefix = f"{root}identities/labels/"
        self.refs_prefix = f"{root}identities/refs/"
        self.sweeper_key = f"{root}identities/sweeper"
        self._ids_prefix = f"{root}identities/id/"
        self._epoch_key = f"{root}identities/epochs/{node}"

    def measure(self, meter: Meter) -> None:
        """Count changes from now on."""
        self._changes = meter.counter("fibril.identity.changes", description="changes made in etcd, by kind")

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

    async def refs(self, numbers: Iterable[int]) -> dict[int, Reference]:
        """Which of these this node has references to."""
        keys = [self._ref_key(number) for number in numbers]
        found: dict[int, Reference] = {}
        for start in range(0, len(keys), TXN_OPS_MAX):
            for kv in (await self._etcd.get_many(keys[start : start + TXN_OPS_MAX])).kvs:
                found[self.of_ref(kv.key)[0]] = Reference(kv.mod_revision, kv.lease)
        return found

    # -- identities. Each gives it as it is now; None: something was not as supposed, nothing has changed.

    async def create(self, number: int, key: str, epoch: Epoch) -> Record | None:
        """Make an identity and hold it, if neither its number nor its labels are taken."""
        value = pb.StoredIdentity(number=number, labels=labels_of(key)).SerializeToString()
        return await self._hold("create", Record(number, digest(key), 0, False, value), epoch)

    async def revive(self, record: Record, epoch: Epoch) -> Record | None:
        """Hold a retired identity again."""
        return await self._hold("revive", _changed(record, retired=False), epoch)

    async def take(self, record: Record, epoch: Epoch) -> int | None:
        """Hold an identity that exists; the reference's revision, the identity's stays."""
        ref = self._ref_key(record.number)
        expect = {self._id_key(record.number): record.revision, self._epoch_key: epoch.revision}
        return await self._make("take", Txn(expect, put={ref: b""}, leases={ref: epoch.lease}))

    async def drop(self, number: int, revision: int) -> None:
        """Hold it no more, unless it has been taken again since."""
        ref = self._ref_key(number)
        await self._make("drop", Txn({ref: revision}, delete=(ref,)))

    async def retire(self, record: Record, quarantine: int) -> Record | None:
        """Free labels and number of an identity nobody holds, once the lease `quarantine` has ended."""
        labels_key, id_key = self._labels_key(record.name), self._id_key(record.number)
        retired = _changed(record, retired=True)
        revision = await self._make(
            "retire",
            Txn(
                {id_key: record.revision, labels_key: record.revision},
                nothing_below=(f"{self.refs_prefix}{record.number}/",),
                put={id_key: retired.value, labels_key: retired.value},
                leases={id_key: quarantine, labels_key: quarantine},
            ),
        )
        return None if revision is None else retired._replace(revision=revision)

    async def look(self, name: str, number: int) -> Look:
        """What is there now."""
        labels_key, id_key = self._labels_key(name), self._id_key(number)
        listing = await self._etcd.get_many((labels_key, id_key, self._epoch_key))
        found = {kv.key: kv for kv in listing.kvs}
        theirs, occupant, epoch = map(found.get, (labels_key, id_key, self._epoch_key))
        return Look(
            None if theirs is None else decode(name, theirs.value, theirs.mod_revision),
            None if occupant is None else decode("", occupant.value, occupant.mod_revision),
            0 if epoch is None else epoch.mod_revision,
            listing.revision,
        )

    async def _hold(self, kind: str, record: Record, epoch: Epoch) -> Record | None:
        labels_key, id_key = self._labels_key(record.name), self._id_key(record.number)
        ref = self._ref_key(record.number)
        revision = await self._make(
            kind,
            Txn(
                {
                    labels_key: record.revision,
                    id_key: record.revision,
                    self._epoch_key: epoch.revision,
                },
                put={id_key: record.value, labels_key: record.value, ref: b""},
                leases={ref: epoch.lease},
            ),
        )
        return None if revision is None else record._replace(revision=revision)

    async def _make(self, kind: str, txn: Txn) -> int | None:
        revision = await self._batcher.transact(txn)
        self._changes.add(1, kind="conflict" if revision is None else kind)
        return revision

    # -- keys

    def of_ref(self, ref_key: str) -> tuple[int, str]:
        """Number and node in a key below `refs_prefix`; (0, "") for another key."""
        number, _, node = ref_key.removeprefix(self.refs_prefix).partition("/")
        return (int(number), node) if number.isdecimal() else (0, "")

    def _id_key(self, number: int) -> str:
        return f"{self._ids_prefix}{number}"

    def _labels_key(self, name: str) -> str:
        return self.labels_prefix + name

    def _ref_key(self, number: int) -> str:
        return f"{self.refs_prefix}{number}/{self._node}"


def decode(name: str, value: bytes, revision: int) -> Record | None:
    """From etcd; name: the labels', "" when it is to be found. None for what no Fibril wrote."""
    try:
        message = pb.StoredIdentity.FromString(value)
    except DecodeError:
        return None
    if not message.number:
        return None
    name = name or digest(canonical(message.labels))
    return Record(message.number, name, revision, message.retired, value)


def _changed(record: Record, *, retired: bool) -> Record:
    message = pb.StoredIdentity.FromString(record.value)
    message.retired = retired
    return record._replace(retired=retired, value=message.SerializeToString())
