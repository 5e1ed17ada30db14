"""The maps of the family `sockaccel`, opened; what the service writes is written by difference.

For one thread. Programs read every map at any time, so the configuration, which makes anything eligible, is written last.
"""

from __future__ import annotations

import ctypes as ct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Self

from services.common.errors import ResourceExhausted
from services.common.kernel.maps import BpfMap
from services.common.pipeline import abi as pipeline
from services.common.pipeline.abi import FibAddr, IPAddress, addr_bytes
from services.sockaccel import abi

if TYPE_CHECKING:
    from services.common.instance import Instance

RUN_BYTES: Final = 65_536
PROOFS: Final = 4
BEAT_S: Final = 30.0


@dataclass(frozen=True)
class Wanted:
    """What all the maps are to hold. Masks have a bit for each class."""

    on: bool = False
    classes: int = 0
    any_port: int = 0
    any_group: int = 0
    proxies: int = 0
    nonblocking: int = 0
    same: int = 0
    pods: int = 0
    host: int = 0
    within: int = 0
    run_bytes: int = RUN_BYTES
    proofs: int = PROOFS
    beat_s: float = BEAT_S
    spaces: Mapping[int, tuple[int, int, int]] = field(default_factory=dict)
    """Network namespace cookie -> masks of clients and of servers, endpoint."""
    endpoints: frozenset[int] = frozenset()
    """All in these namespaces: a pod may have several."""
    ports: Mapping[int, tuple[int, bool]] = field(default_factory=dict)
    """Port -> mask, whether proxies listen there."""
    uids: frozenset[int] = frozenset()
    groups: Mapping[int, int] = field(default_factory=dict)
    hosts: frozenset[IPAddress] = frozenset()
    off: frozenset[int] = frozenset()
    calls: bool = True
    """Whether the programs behind recv() and send() are attached."""


class Tables:
    """Opened with the pins of an instance; NotFound if the programs are not loaded."""

    def __init__(self, instance: Instance) -> None:
        self._open: list[BpfMap[Any, Any]] = []
        try:
            self.pairs = self._map(instance, "sa_pairs", ct.c_uint64, abi.Pair)
            self._socks = self._map(instance, "sa_socks", ct.c_uint64, ct.c_uint32)
            self.stats = self._map(instance, "sa_stats", ct.c_uint32, ct.c_uint64)
            self._config = self._map(instance, "sa_config", ct.c_uint32, abi.Config)
            self._spaces = self._map(instance, "sa_spaces", ct.c_uint64, abi.Space)
            self._ports = self._map(instance, "sa_ports", ct.c_uint32, abi.Port)
            self._uids = self._map(instance, "sa_uids", ct.c_uint32, ct.c_uint32)
            self._groups = self._map(instance, "sa_groups", ct.c_uint64, ct.c_uint32)
            self._hosts = self._map(instance, "sa_hosts", FibAddr, ct.c_uint32)
            self._off = self._map(instance, "sa_off", ct.c_uint64, ct.c_uint32)
            self._pods: BpfMap[FibAddr, pipeline.Endpoint] = BpfMap.open(
                instance.pin_dir / pipeline.MAPS["ep_addr"], FibAddr, pipeline.Endpoint
            )
            self._open.append(self._pods)
        except BaseException:
            self.close()
            raise

    def _map(self, instance: Instance, name: str, key: Any, value: Any) -> BpfMap[Any, Any]:
        made: BpfMap[Any, Any] = BpfMap.open(instance.pin_dir / abi.MAPS[name], key, value)
        self._open.append(made)
        return made

    def close(self) -> None:
        for each in self._open:
            each.close()
        self._open = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def capacity(self) -> int:
        """Pairs there can be."""
        return self.pairs.info.max_entries

    def config(self) -> abi.Config:
        """As it is now."""
        return self._config.lookup(0) or abi.Config()

    def identities(self, endpoints: Collection[int]) -> dict[str, int]:
        """Of these pods, as programs know them now, by address in hexadecimal digits."""
        return {bytes(address).hex(): int(pod.identity) for address, pod in self._pods.items() if pod.id in endpoints}

    def write(self, wanted: Wanted, judge: bool = False, begin: Callable[[], None] = lambda: None) -> int:
        """Make it so; how many entries were changed. If any was, or `judge`, every pair is judged anew.

        begin: called before the first change. ResourceExhausted, before anything is changed, if something has no room.
        """
        for name, entries, room in (
            ("ports", wanted.ports, abi.PORTS_MAX),
            ("uids", wanted.uids, abi.UIDS_MAX),
            ("cgroups", wanted.groups, abi.GROUPS_MAX),
            ("addresses of the host", wanted.hosts, abi.HOSTS_MAX),
            ("switched off pairs", wanted.off, abi.OFF_MAX),
        ):
            if len(entries) > room:
                raise ResourceExhausted(f"{len(entries)} {name}, the limit is {room}", fix="name fewer")
        changes = [
            *self._changed_spaces(wanted),
            *_changes(self._ports, {port: abi.Port(mask, int(proxy)) for port, (mask, proxy) in wanted.ports.items()}),
            *_changes(self._uids, {uid: ct.c_uint32(1) for uid in wanted.uids}),
            *_changes(self._groups, {group: ct.c_uint32(mask) for group, mask in wanted.groups.items()}),
            *_changes(self._hosts, {addr_bytes(address): ct.c_uint32(1) for address in wanted.hosts}),
            *_changes(self._off, {cookie: ct.c_uint32(1) for cookie in wanted.off}),
        ]
        before = self.config()
        after = abi.Config(
            flags=(abi.ConfigFlag.ON if wanted.on else 0)
            | (abi.ConfigFlag.GROUPS if wanted.groups else 0)
            | (abi.ConfigFlag.NONBLOCKING if wanted.nonblocking else 0)
            | (abi.ConfigFlag.CALLS if wanted.calls else 0),
            epoch=before.epoch,
            classes=wanted.classes,
            any_port=wanted.any_port,
            any_group=wanted.any_group,
            proxies=wanted.proxies,
            same=wanted.same,
            pods=wanted.pods,
            host=wanted.host,
            within=wanted.within,
            run_bytes=wanted.run_bytes,
            proofs=wanted.proofs,
            beat_ns=int(wanted.beat_s * 1e9),
            nonblocking=wanted.nonblocking,
        )
        if not (changes or judge or bytes(after) != bytes(before)):
            return 0
        begin()
        for change in changes:
            change()
        # Programs read it while it is written: who sees the new epoch is to see all the rest.
        self._config.update(0, after)
        after.epoch = (before.epoch + 1) & 0xFFFFFFFF
        self._config.update(0, after)
        return len(changes) + 1

    def _changed_spaces(self, wanted: Wanted) -> list[Callable[[], object]]:
        there = {int(key.value): value for key, value in self._spaces.items()}
        changes: list[Callable[[], object]] = []
        for cookie, (client, server, endpoint) in wanted.spaces.items():
            old = there.pop(cookie, None)
            if old is None or (old.client, old.server, old.endpoint) != (client, server, endpoint):
                # That a proxy is at work there is the programs' knowledge.
                proxied = old.flags if old is not None and old.endpoint == endpoint else 0
                changes.append(partial(self._spaces.update, cookie, abi.Space(client, server, endpoint, proxied)))
        return changes + [partial(self._spaces.delete, cookie) for cookie in there]

    def stat(self, which: int) -> int:
        """Sum of a counter over all CPUs."""
        return sum(int(each.value) for each in self.stats.lookup_percpu(which) or ())

    def switched_off(self) -> set[int]:
        """Pairs that an earlier process switched off."""
        return {int(key.value) for key in self._off.keys()}  # noqa: SIM118 - it is no mapping

    def any_pair(self) -> bool:
        """Whether there is one, shortened or not."""
        return next(self.pairs.keys(), None) is not None

    def all_pairs(self) -> list[abi.Pair]:
        """Those whose server is known."""
        return [pair for _, pair in self.pairs.items() if pair.ends[1].cookie]

    def tidy(self, doubtful: Collection[int]) -> tuple[set[int], set[int]]:
        """Forget pairs that ended while no program was there to see it: neither socket is in the map of sockets any more.

        doubtful: those that were so the last time; walking a map that changes may miss something once. Pairs there are now, and
        which of them are doubtful.
        """
        pairs = self.all_pairs()
        sockets = {int(key.value) for key in self._socks.keys()} if pairs else set()  # noqa: SIM118 - it is no mapping
        there = {int(pair.ends[0].cookie) for pair in pairs}
        dead = {int(pair.ends[0].cookie) for pair in pairs if not sockets & {int(end.cookie) for end in pair.ends}}
        for cookie in dead.intersection(doubtful):
            self.pairs.delete(cookie)
        return there - dead.intersection(doubtful), dead.difference(doubtful)


def _changes(table: BpfMap[Any, Any], wanted: Mapping[Any, Any]) -> list[Callable[[], object]]:
    """What makes a map hold exactly these. Keys are integers, or bytes of a structure."""
    there = {_key(key): value for key, value in table.items()}
    changes: list[Callable[[], object]] = []
    for key, value in wanted.items():
        old = there.pop(key, None)
        if old is None or bytes(old) != bytes(value):
            changes.append(partial(table.update, _made(key), value))
    return changes + [partial(table.delete, _made(key)) for key in there]


def _made(key: Any) -> Any:
    return FibAddr.from_buffer_copy(key) if isinstance(key, bytes) else key


def _key(key: Any) -> Any:
    return bytes(key) if isinstance(key, ct.Structure) else key.value
