"""Named ports of endpoints: kept in etcd by the node of the endpoint, so that egress policies of all nodes know them.

    /fibril/v1/<cluster>/policy-ports/<node>/<endpoint>   fibril.policy.v1.StoredNamedPorts
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Final
from urllib.parse import quote

from google.protobuf.message import DecodeError

from fibril.policy.v1 import policy_pb2 as pb
from services.common import errors
from services.common.etcd.client import EtcdClient
from services.common.etcd.watch import Delete, Put, Snapshot, watch_prefix
from services.policy.contents import HOST, Endpoint
from services.policy.enforcer import Enforcer
from services.policy.model import PORT_MAX, SCTP, TCP, UDP
from services.policy.resolve.world import NamedPort

log = logging.getLogger(__name__)

PORTS_MAX: Final = 64
RETRY_S: Final = 2.0
_NAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")


def ports(messages: Mapping[str, pb.NamedPort], at: str) -> dict[str, NamedPort]:
    """From messages. InvalidArgument names the field."""
    if len(messages) > PORTS_MAX:
        raise errors.InvalidArgument(f"{len(messages)} named ports", field=at, fix=f"give at most {PORTS_MAX}")
    found: dict[str, NamedPort] = {}
    for name, message in messages.items():
        where = f"{at}[{name[:70]!r}]"
        if not _NAME.fullmatch(name):
            raise errors.InvalidArgument("that is no name of a port", field=where, fix="letters, digits and '-'")
        if message.protocol not in (TCP, UDP, SCTP):
            raise errors.InvalidArgument("a named port needs a protocol", field=f"{where}.protocol", fix="TCP, UDP or SCTP")
        if not 1 <= message.port <= PORT_MAX:
            raise errors.InvalidArgument(f"{message.port} is outside 1..{PORT_MAX}", field=f"{where}.port")
        found[name] = int(message.protocol), message.port
    return found


def to_proto(found: Mapping[str, NamedPort]) -> dict[str, pb.NamedPort]:
    return {
        name: pb.NamedPort(protocol=pb.PortProtocol.ValueType(protocol), port=port)
        for name, (protocol, port) in found.items()
    }


class NamedPorts:
    """Used from one event loop."""

    def __init__(self, etcd: EtcdClient, cluster: str, node: str, enforcer: Enforcer) -> None:
        self._etcd, self._enforcer = etcd, enforcer
        self._root = f"/fibril/v1/{cluster}/policy-ports/"
        self._own = f"{self._root}{quote(node, safe='')}/"
        self._stored: dict[str, pb.StoredNamedPorts] = {}
        self._by_name: dict[str, dict[NamedPort, set[int]]] = {}
        self.synced = asyncio.Event()
        self._changing = asyncio.Lock()
        """Of what is stored of this node's endpoints: what two write at once etcd may take in either order."""

    def of(self, endpoint: int, container: str) -> dict[str, NamedPort]:
        """Of an endpoint of this node."""
        stored = self._stored.get(self._key(endpoint))
        return ports(stored.ports, "ports") if stored is not None and _is_of(stored, container) else {}

    def _key(self, endpoint: int) -> str:
        return f"{self._own}{endpoint}"

    async def set(self, endpoint: int, found: Mapping[str, NamedPort]) -> None:
        """All named ports of an endpoint of this node. NotFound: it has gone meanwhile. Unavailable: etcd is away."""
        container = self._enforcer.endpoints[endpoint].container
        async with self._changing:
            known = self._enforcer.endpoints.get(endpoint)
            if known is not None and known.container == container:
                await self._set(known, found)
        known = self._enforcer.endpoints.get(endpoint)
        if known is None or known.container != container:
            raise errors.NotFound(
                f"endpoint {endpoint} has gone", field="endpoint", fix="see: fibril endpoint ls"
            )

    async def _set(self, known: Endpoint, found: Mapping[str, NamedPort]) -> None:
        key = self._key(known.number)
        if found:
            stored = pb.StoredNamedPorts(
                identity=known.identity, ports=to_proto(found), container=known.container
            )
            await self._etcd.put(key, stored.SerializeToString(deterministic=True))
            self._put(key, stored)
        else:
            await self._etcd.delete(key)
            self._delete(key)

    async def run(self) -> None:
        """Until cancelled."""
        async with aclosing(watch_prefix(self._etcd, self._root)) as events:
            async for event in events:
                match event:
                    case Snapshot(kvs):
                        for kv in kvs:
                            self._read(kv.key, kv.value)
                        self.synced.set()
                    case Put(key, value):
                        self._read(key, value)
                    case Delete(key):
                        self._delete(key)

    def _read(self, key: str, value: bytes) -> None:
        try:
            stored = pb.StoredNamedPorts.FromString(value)
            ports(stored.ports, key)
        except (DecodeError, errors.FibrilError) as error:
            log.error("not usable", extra={"key": key, "cause": str(error)})
            return
        self._put(key, stored)

    def _put(self, key: str, stored: pb.StoredNamedPorts) -> None:
        if self._stored.get(key) == stored:
            return
        self._stored[key] = stored
        self._tell(key)

    def _delete(self, key: str) -> None:
        if self._stored.pop(key, None) is not None:
            self._tell(key)

    def _tell(self, key: str) -> None:
        """Everybody who may care for a change."""
        found: dict[str, dict[NamedPort, set[int]]] = {}
        for stored in self._stored.values():
            for name, port in ports(stored.ports, key).items():
                found.setdefault(name, {}).setdefault(port, set()).add(stored.identity)
        for name in found.keys() | self._by_name.keys():
            if found.get(name) != self._by_name.get(name):
                self._enforcer.set_named(name, found.get(name, {}))
        self._by_name = found
        text = key.removeprefix(self._own)
        if key != text and text.isdigit() and (known := self._enforcer.endpoints.get(int(text))) is not None:
            self._enforcer.set_endpoint(replace(known, named=self.of(known.number, known.container)))

    async def tidy(self) -> None:
        """Until cancelled: what is stored of this node's endpoints follows them."""
        while True:
            await asyncio.sleep(RETRY_S)
            if not (self.synced.is_set() and self._enforcer.ready):
                continue
            for key in [key for key in self._stored if key.startswith(self._own)]:
                try:
                    async with self._changing:
                        await self._tidy(key)
                except errors.FibrilError:
                    # etcd is away.
                    break

    async def _tidy(self, key: str) -> None:
        stored = self._stored.get(key)
        if stored is None:
            # Others have been waited for.
            return
        text = key.removeprefix(self._own)
        known = self._enforcer.endpoints.get(int(text)) if text.isdigit() else None
        if known is None or known.number == HOST or not _is_of(stored, known.container):
            await self._etcd.delete(key)
            self._delete(key)
        elif (known.identity, known.container) != (stored.identity, stored.container):
            await self._set(known, ports(stored.ports, "ports"))


def _is_of(stored: pb.StoredNamedPorts, container: str) -> bool:
    """Whether they are of the container that has the endpoint's number now."""
    return stored.container in ("", container)
