"""The pure part of endpoints: what is asked for, what is recorded, which states follow which, which number
is next.

Nothing here touches the kernel or a file.
"""

from __future__ import annotations

import heapq
import json
import re
import secrets
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import IntEnum
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import Any, Final

from services.common import errors

ID_MAX: Final = 65_535
MTU_MIN, MTU_MAX = 1280, 65_535
LABELS_MAX, LABEL_LENGTH_MAX, POD_LENGTH_MAX = 64, 253, 253
PATH_MAX: Final = 4095
DEFAULT_IFNAME: Final = "eth0"
DEFAULT_POOL: Final = "default"
IDENTITY_INIT: Final = 5
"""Reserved identity of a pod whose labels have none yet."""

_CONTAINER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_NO_LABELS: Final[Mapping[str, str]] = {}

Key = tuple[str, str]
"""(container id, interface name in the pod): what a runtime knows an endpoint by."""


class State(IntEnum):
    """As fibril.endpoint.v1.EndpointState, number for number."""

    CREATING = 1
    READY = 2
    DEGRADED = 3
    DELETING = 4


FOLLOWING: Final[Mapping[State, frozenset[State]]] = {
    State.CREATING: frozenset({State.READY, State.DELETING}),
    State.READY: frozenset({State.READY, State.DEGRADED, State.DELETING}),
    State.DEGRADED: frozenset({State.READY, State.DEGRADED, State.DELETING}),
    State.DELETING: frozenset(),
}


class Recovery(IntEnum):
    """What to do at start with an endpoint that was recorded in a state."""

    UNDO = 1
    ADOPT = 2
    FINISH = 3


RECOVERY: Final[Mapping[State, Recovery]] = {
    State.CREATING: Recovery.UNDO,
    State.READY: Recovery.ADOPT,
    State.DEGRADED: Recovery.ADOPT,
    State.DELETING: Recovery.FINISH,
}


@dataclass(frozen=True, slots=True)
class EndpointSpec:
    """The interface wanted; see fibril.endpoint.v1.CreateEndpointRequest for the fields."""

    container_id: str
    ifname: str = DEFAULT_IFNAME
    netns: str = ""
    pool: str = ""
    ipv4: str = ""
    ipv6: str = ""
    mtu: int = 0
    pod: str = ""
    labels: Mapping[str, str] = field(default_factory=lambda: _NO_LABELS)
    cgroup_path: str = ""
    ingress_qdisc: bool = False
    """Leave the place of the ingress qdisc free: the CNI bandwidth plugin will limit what the pod sends."""

    @property
    def key(self) -> Key:
        return self.container_id, self.ifname

    def checked(self) -> EndpointSpec:
        """The same with defaults filled in and addresses in canonical form. InvalidArgument names the
        field.
        """
        container_id, ifname = check_key(self.container_id, self.ifname)
        if not self.netns.startswith("/") or "\0" in self.netns or len(self.netns) > PATH_MAX:
            raise errors.InvalidArgument(
                f"network namespace {self.netns[:100]!r} is not an absolute path",
                field="netns",
                fix="name a file such as /run/netns/NAME",
            )
        if self.mtu and not MTU_MIN <= self.mtu <= MTU_MAX:
            raise errors.InvalidArgument(
                f"MTU {self.mtu} is outside {MTU_MIN}..{MTU_MAX}", field="mtu", fix="use 0 for the uplink's"
            )
        if len(self.pod) > POD_LENGTH_MAX or not self.pod.isprintable():
            raise errors.InvalidArgument(
                f"the pod name is longer than {POD_LENGTH_MAX} characters or not printable", field="pod"
            )
        check_labels(self.labels)
        cgroup = self.cgroup_path.strip("/")
        if "\0" in cgroup or len(cgroup) > PATH_MAX or ".." in cgroup.split("/"):
            raise errors.InvalidArgument(
                f"cgroup path {self.cgroup_path[:100]!r} is malformed",
                field="cgroup_path",
                fix="give a path below the cgroup v2 mount, without '..'",
            )
        return replace(
            self,
            container_id=container_id,
            ifname=ifname,
            pool=self.pool or DEFAULT_POOL,
            ipv4=_canonical(self.ipv4, IPv4Address, "ipv4"),
            ipv6=_canonical(self.ipv6, IPv6Address, "ipv6"),
            labels=dict(self.labels) or _NO_LABELS,
            cgroup_path=cgroup,
        )


def check_key(container_id: str, ifname: str) -> Key:
    """The key with its default interface name. InvalidArgument names the field."""
    if not _CONTAINER_ID.fullmatch(container_id):
        raise errors.InvalidArgument(
            f"container id {container_id[:140]!r} is malformed",
            field="container_id",
            fix="use 1 to 128 of [A-Za-z0-9_.-], beginning with a letter or digit",
        )
    name = ifname or DEFAULT_IFNAME
    if len(name.encode()) > 15 or name in (".", "..") or re.search(r"[/:\s\0]", name):
        raise errors.InvalidArgument(
            f"interface name {name[:40]!r} is malformed",
            field="ifname",
            fix="use 1 to 15 bytes without '/', ':' and blanks",
        )
    return container_id, name


def check_labels(labels: Mapping[str, str]) -> None:
    """InvalidArgument for labels no endpoint may have."""
    if len(labels) > LABELS_MAX:
        raise errors.InvalidArgument(
            f"{len(labels)} labels, at most {LABELS_MAX} are allowed", field="labels"
        )
    for key, value in labels.items():
        if not 0 < len(key) <= LABEL_LENGTH_MAX or len(value) > LABEL_LENGTH_MAX:
            raise errors.InvalidArgument(
                f"label {key[:60]!r} is empty or longer than {LABEL_LENGTH_MAX} characters in key or value",
                field="labels",
            )


def _canonical(text: str, kind: type[IPv4Address] | type[IPv6Address], name: str) -> str:
    if not text:
        return ""
    try:
        return str(kind(text))
    except AddressValueError:
        family = "IPv4" if kind is IPv4Address else "IPv6"
        raise errors.InvalidArgument(f"{text[:60]!r} is not an {family} address", field=name) from None


@dataclass(frozen=True, slots=True)
class EndpointRecord:
    """One endpoint as recorded. Names as in fibril.endpoint.v1.Endpoint.

    relabelled: labels set after creation, which count instead of the spec's; None: never.
    """

    id: int
    spec: EndpointSpec
    state: State
    created_unix_seconds: float
    netns_cookie: int = 0
    cgroup_id: int = 0
    ipv4: str = ""
    ipv6: str = ""
    ipv4_gateway: str = ""
    ipv6_gateway: str = ""
    mac: str = ""
    host_mac: str = ""
    host_ifname: str = ""
    host_ifindex: int = 0
    mtu: int = 0
    message: str = ""
    identity: int = IDENTITY_INIT
    relabelled: Mapping[str, str] | None = None

    @property
    def key(self) -> Key:
        return self.spec.key

    @property
    def container_id(self) -> str:
        return self.spec.container_id

    @property
    def ifname(self) -> str:
        return self.spec.ifname

    @property
    def netns(self) -> str:
        return self.spec.netns

    @property
    def pool(self) -> str:
        return self.spec.pool

    @property
    def pod(self) -> str:
        return self.spec.pod

    @property
    def labels(self) -> Mapping[str, str]:
        return self.spec.labels if self.relabelled is None else self.relabelled

    @property
    def owner(self) -> str:
        """Under which name the address book holds its addresses."""
        return owner_of(self.key)

    def to(self, state: State, message: str = "", **changes: Any) -> EndpointRecord:
        """The record in another state. Internal if that state may not follow."""
        if state not in FOLLOWING[self.state]:
            raise errors.Internal(f"endpoint {self.id} cannot go from {self.state.name} to {state.name}")
        return replace(self, state=state, message=message, **changes)

    def encode(self) -> bytes:
        """For the database: JSON without what is empty."""
        values = {
            name: value
            for name, value in asdict(self).items()
            if value or name == "state" or (name == "relabelled" and value is not None)
        }
        values["spec"] = {name: value for name, value in values["spec"].items() if value}
        return json.dumps(values, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, data: bytes) -> EndpointRecord:
        """What `encode` gave; fields of a newer version are ignored. ValueError if it is something else."""
        try:
            values = json.loads(data)
            known = {name: value for name, value in values.items() if name in cls.__dataclass_fields__}
            spec = {
                name: value
                for name, value in known.pop("spec").items()
                if name in EndpointSpec.__dataclass_fields__
            }
            return cls(**{**known, "spec": EndpointSpec(**spec), "state": State(known["state"])})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not an endpoint record: {error!r}") from None


@dataclass(frozen=True)
class Place:
    """Where a pod lives: cookie of its network namespace, id of its cgroup (0: not known)."""

    netns_cookie: int
    cgroup_id: int = 0


@dataclass(frozen=True)
class Lease:
    """Addresses an endpoint got, "" for a family its pool lacks, and the gateway of each."""

    ipv4: str = ""
    ipv4_gateway: str = ""
    ipv6: str = ""
    ipv6_gateway: str = ""


@dataclass(frozen=True)
class Heirs:
    """Endpoints that share the namespace or cgroup of one that goes: they take its map entries over (0:
    none).
    """

    netns: int = 0
    cgroup: int = 0


OWNER_PREFIX: Final = "endpoint/"


def owner_of(key: Key) -> str:
    return f"{OWNER_PREFIX}{key[0]}/{key[1]}"


def differing_options(have: EndpointSpec, want: EndpointSpec) -> list[str]:
    """Options in which two checked specs for one key differ. A namespace may have several paths: see its
    cookie.
    """
    return [
        name
        for name in ("pool", "ipv4", "ipv6", "mtu", "pod", "labels", "cgroup_path", "ingress_qdisc")
        if getattr(have, name) != getattr(want, name)
    ]


def random_mac() -> str:
    """A unicast, locally administered MAC address."""
    return "02:" + secrets.token_bytes(5).hex(":")


class Ids:
    """Endpoint numbers 1..65,535: the lowest that is free and was not among the last `rest` ones given back.

    A number that rests is taken only when no other is left. What rests is forgotten by a restart.
    """

    def __init__(self, used: Iterable[int] = (), rest: int = 256, limit: int = ID_MAX) -> None:
        self._used = set(used)
        self._limit = limit
        self._rest = rest
        self._resting: deque[int] = deque()
        # Free numbers below `_next`, which itself and all above were never used.
        self._next = max(self._used, default=0) + 1
        self._free = [number for number in range(1, self._next) if number not in self._used]

    def __len__(self) -> int:
        return len(self._used)

    def __contains__(self, number: object) -> bool:
        return number in self._used

    def take(self) -> int:
        """ResourceExhausted when all are in use."""
        if self._free:
            number = heapq.heappop(self._free)
        elif self._next <= self._limit:
            number = self._next
            self._next += 1
        elif self._resting:
            number = self._resting.popleft()
        else:
            raise errors.ResourceExhausted(
                f"all {self._limit} endpoint numbers of this node are in use", fix="delete endpoints"
            )
        self._used.add(number)
        return number

    def give_back(self, number: int) -> None:
        """One not in use is fine."""
        if number in self._used:
            self._used.remove(number)
            self._resting.append(number)
            if len(self._resting) > self._rest:
                heapq.heappush(self._free, self._resting.popleft())
