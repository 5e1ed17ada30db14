"""What a change of services rests on: read from etcd itself, many services in few calls."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from services.common.errors import FailedPrecondition, FibrilError
from services.common.etcd.client import TXN_OPS_MAX, EtcdClient, KeyValue, Listing
from services.lb import claims, keys
from services.lb.claims import Claims, Place
from services.lb.model import Backend, BackendKey, Spec


@dataclass(slots=True)
class Known:
    """A service as etcd has it.

    own: revision of its key, 0 if it is not there; value: that key's. spec and backends are None where what etcd has is not
    usable: then it counts as different from everything. claims: with their revisions, 0 for none; to be changed freely.
    """

    own: int = 0
    value: bytes = b""
    spec: Spec | None = None
    backends: dict[BackendKey, Backend | None] = field(default_factory=dict)
    revisions: dict[BackendKey, int] = field(default_factory=dict)
    claims: dict[Place, tuple[int, Claims]] = field(default_factory=dict)

    @property
    def latest(self) -> int:
        """Revision of the last change; 0 if it is not there."""
        return max(self.own, *self.revisions.values(), 0) if self.own else 0


class Reader:
    """Names keys, and reads them."""

    def __init__(self, etcd: EtcdClient, cluster: str) -> None:
        self._etcd = etcd
        self._root = keys.root(cluster)
        self._vips = keys.vips(cluster)

    def key(self, name: str) -> str:
        return self._root + keys.service_key(name)

    def backends(self, name: str) -> str:
        """What its backends' keys begin with."""
        return self._root + keys.backends_prefix(name)

    def backend(self, name: str, key: BackendKey) -> str:
        return self._root + keys.backend_key(name, key)

    def vip(self, place: Place) -> str:
        return f"{self._vips}{place.address}/{place.block}"

    async def service(self, name: str) -> Known:
        """One, with all its backends and claims."""
        found, claimed = await self.services({name: ()})
        known = found[name]
        known.claims = claimed
        return known

    async def services(
        self, wanted: Mapping[str, Iterable[Place]]
    ) -> tuple[dict[str, Known], dict[Place, tuple[int, Claims]]]:
        """All these with their backends, and the claims at the places given and at those they have."""
        found = {name: Known() for name in wanted}
        for kv in await self._all(self._etcd.get_many, [self.key(name) for name in wanted]):
            self._take_spec(found[keys.service_of(kv.key.removeprefix(self._root))], kv)
        for kv in await self._all(self._etcd.get_below, [self.backends(name) for name in wanted]):
            self._take_backend(found, kv)
        places = {place for each in wanted.values() for place in each}
        places |= {place for known in found.values() if known.spec for place in claims.wanted(known.spec)}
        if lost := {name for name, known in found.items() if known.own and known.spec is None}:
            places |= await self._claimed_by(lost)
        claimed = {place: (0, Claims()) for place in places}
        for kv in await self._all(self._etcd.get_many, [self.vip(place) for place in places]):
            try:
                claimed[keys.place_of(kv.key.removeprefix(self._vips))] = (
                    kv.mod_revision,
                    keys.decode_claims(kv.value),
                )
            except DecodeError as error:
                raise FailedPrecondition(
                    f"etcd's key {kv.key} is not usable: {error}",
                    fix="remove it with etcdctl and apply all services",
                ) from None
        return found, claimed

    async def _claimed_by(self, names: set[str]) -> set[Place]:
        """Where services have claims of which nobody knows the frontends, since what etcd has is not usable."""
        found = set()
        for kv in (await self._etcd.get_prefix(self._vips)).kvs:
            # One that is not usable is told by who wants to claim there.
            with contextlib.suppress(DecodeError, ValueError):
                if any(service in names for service, _ in keys.decode_claims(kv.value)):
                    found.add(keys.place_of(kv.key.removeprefix(self._vips)))
        return found

    async def some(self, name: str, members: Sequence[BackendKey]) -> Known:
        """One with those of its backends; at most 127."""
        found = {name: Known()}
        wanted = [self.key(name), *(self.backend(name, key) for key in members)]
        for kv in (await self._etcd.get_many(wanted)).kvs:
            if kv.key == wanted[0]:
                self._take_spec(found[name], kv)
            else:
                self._take_backend(found, kv)
        return found[name]

    @staticmethod
    async def _all(
        read: Callable[[Sequence[str]], Awaitable[Listing]], wanted: Sequence[str]
    ) -> list[KeyValue]:
        kvs: list[KeyValue] = []
        for at in range(0, len(wanted), TXN_OPS_MAX):
            kvs += (await read(wanted[at : at + TXN_OPS_MAX])).kvs
        return kvs

    def _take_spec(self, known: Known, kv: KeyValue) -> None:
        known.own, known.value = kv.mod_revision, kv.value
        try:
            known.spec = keys.decode_spec(kv.value)
        except (FibrilError, DecodeError):
            known.spec = None

    def _take_backend(self, found: Mapping[str, Known], kv: KeyValue) -> None:
        try:
            name, key = keys.backend_of(kv.key.removeprefix(self._root))
        except ValueError:
            return  # goes with the service
        known = found[name]
        known.revisions[key] = kv.mod_revision
        try:
            known.backends[key] = keys.decode_backend(kv.value)
        except (FibrilError, DecodeError):
            known.backends[key] = None
