"""Declarations, disk and kernel kept in step. Everything blocks; used by one thread, but for what is said to be read by all.

Each change is written to disk and to the kernel before it is answered, or to neither. While it is under way the
kernel's tables carry the stamp 0: a process that finds it makes them anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Network, IPv6Network
from typing import Final

from services.common import errors
from services.common.instance import Instance
from services.common.pipeline.abi import IPAddress
from services.lb.prefilter import abi
from services.lb.prefilter.keys import Keys, family_of, text_of
from services.lb.prefilter.limits import Limit, LimitTables
from services.lb.prefilter.model import CLUSTER, CLUSTER_IDENT, PrefixSet, Sets
from services.lb.prefilter.store import PrefilterDb
from services.lb.prefilter.tables import Tables

PREFIXES_MAX: Final = 8_000_000
SETS_MAX: Final = CLUSTER_IDENT - 1
Limits = Mapping[IPv4Network | IPv6Network, Limit]


@dataclass(frozen=True)
class Changed:
    """What a call has done to a set."""

    entries: int
    added: int
    removed: int


class State:
    """`sets`, `own`, `cluster` and `limits` are replaced as a whole and may be read by any thread."""

    def __init__(self, instance: Instance, sources: int) -> None:
        """Reads the disk. FailedPrecondition when it cannot be used."""
        self._db = PrefilterDb(instance.state_dir / "prefilter.db")
        self._tables = Tables(instance)
        self.counters = LimitTables(instance, sources)
        kept = {each.name: each for each in self._db.sets()}
        self.cluster = kept.pop(CLUSTER, PrefixSet(CLUSTER, CLUSTER_IDENT, True))
        self.own: dict[str, PrefixSet] = kept
        """What was declared, without the cluster's set."""
        self.limits: Limits = {one.prefix: one for one in self._db.limits()}
        self.sets = _effective(self.own, self.limits, self.cluster)
        """What is in force."""

    def close(self) -> None:
        self._tables.close()
        self.counters.close()
        self._db.close()

    @property
    def declared(self) -> bool:
        """Whether there is anything to be enforced."""
        return bool(self.sets.ranked)

    @property
    def ready(self) -> bool:
        return self._tables.ready

    def memory(self) -> int:
        return self._tables.memory()

    def use_maps(self) -> None:
        """Have the maps that are pinned say what is declared. NotFound while there are none."""
        self._tables.open()
        self.counters.open()
        self._agree()

    def _agree(self) -> None:
        stamp = self._db.stamp()
        if not stamp or self._tables.stamp != stamp:
            self._tables.stamp = 0
            self._tables.rebuild(self.sets)
        self.counters.agree(self.limits.values())
        self._tables.limits(bool(self.limits))
        self._tables.stamp = stamp

    def mend(self) -> None:
        """Make the tables anew if they do not say what is declared: they could not be made, or a change not taken back."""
        if self._tables.ready and self._tables.stamp != self._db.stamp():
            # In the maps that are open: to lose them would end all attempts.
            self._agree()

    # -- sets

    def set_prefixes(
        self, name: str, allow: bool | None, entries: Mapping[bytes, int], force: bool
    ) -> Changed:
        """Have a set be exactly this."""
        self._require()
        old = self._set(name, allow)
        allow = old.allow if allow is None else allow
        if not allow:
            _guard(entries, force)
        new = replace(old, allow=allow, v4=_some(4, entries), v6=_some(6, entries))
        before, after = set(old.v4) | set(old.v6), entries.keys()
        touched: Collection[bytes] = (
            before ^ after if old.allow == allow and name in self.own else before | after
        )
        self._put(old, new, touched)
        return Changed(len(new), len(after - before), len(before - after))

    def add(self, name: str, allow: bool | None, entries: Mapping[bytes, int], force: bool) -> Changed:
        """Add to a set, or renew what is in it."""
        self._require()
        old = self._set(name, allow)
        if allow is not None and old.allow != allow:
            what = "allows" if old.allow else "denies"
            raise errors.InvalidArgument(
                f"set {name!r} {what}", field="action", fix="use another set, or set all of it"
            )
        if not old.allow:
            _guard(entries, force)
        touched = [key for key in entries if key not in old.keys(family_of(key))]
        new = replace(old, v4=old.v4.merged(_of(4, entries)), v6=old.v6.merged(_of(6, entries)))
        self._put(old, new, touched, put=entries)
        return Changed(len(new), len(touched), 0)

    def remove(self, name: str, keys: Iterable[bytes]) -> Changed:
        """Take prefixes out of a set."""
        self._require()
        old = self._existing(name)
        gone = {key for key in keys if key in old.keys(family_of(key))}
        self._drop(old, gone)
        return Changed(len(self.own[name]), 0, len(gone))

    def delete(self, name: str) -> None:
        """Remove a set."""
        self._require()
        old = self._existing(name)
        own = {each: self.own[each] for each in self.own if each != name}
        self._change([*old.v4, *old.v6], lambda: self._db.delete_set(old), own=own)

    def expire(self) -> float:
        """Remove what has expired; when to come again, seconds since 1970, 0: never."""
        now = int(time.time())
        for each in list(self.own.values()):
            gone = {*each.v4.expired(now), *each.v6.expired(now)}
            if gone:
                self._drop(each, gone)
        times = [keys.next_expiry() for each in self.own.values() for keys in (each.v4, each.v6)]
        return min(filter(None, times), default=0)

    def protect(self, addresses: Iterable[IPAddress], keep: bool = False) -> None:
        """The cluster's own addresses, which are allowed. keep: and those of before, since not all are known."""
        wanted = {address.packed + bytes((address.max_prefixlen,)): 0 for address in addresses}
        old = {*self.cluster.v4, *self.cluster.v6}
        if keep:
            wanted |= dict.fromkeys(old, 0)
        if old != wanted.keys():
            new = replace(self.cluster, v4=_some(4, wanted), v6=_some(6, wanted))
            self._change(old ^ wanted.keys(), lambda: self._db.write_set(new), cluster=new)

    def _drop(self, old: PrefixSet, gone: set[bytes]) -> None:
        if not gone:
            return
        v4 = old.v4.merged({}, [key for key in gone if family_of(key) == 4])
        v6 = old.v6.merged({}, [key for key in gone if family_of(key) == 6])
        self._put(old, replace(old, v4=v4, v6=v6), gone, put={}, drop=gone)

    def _put(
        self, old: PrefixSet, new: PrefixSet, touched: Collection[bytes],
        put: Mapping[bytes, int] | None = None, drop: Collection[bytes] = (),
    ) -> None:  # fmt: skip
        """put, drop: what is to be written to disk; None: all of the set."""
        total = sum(len(each) for each in self.own.values() if each.name != new.name) + len(new)
        if total > PREFIXES_MAX:
            raise errors.ResourceExhausted(
                f"{total} prefixes in all sets, at most {PREFIXES_MAX} have room",
                fix="remove some, or merge neighbours",
            )
        fresh = new.name not in self.own

        def write() -> None:
            if put is None or fresh:
                self._db.write_set(new)
            else:
                self._db.write_changes(new, put, drop)

        if fresh and self._tables.ready:
            self.counters.clear_set(new.ident)
        self._change(touched, write, own={**self.own, new.name: new})

    def _change(
        self, touched: Collection[bytes], write: Callable[[], None], *, own: dict[str, PrefixSet] | None = None,
        limits: Limits | None = None, cluster: PrefixSet | None = None,
    ) -> None:  # fmt: skip
        """Have this instead of what there is; disk and kernel, or neither. touched: keys whose set may be another."""
        # A change of tables that are wrong would make them count as right.
        self.mend()
        own = self.own if own is None else own
        limits = self.limits if limits is None else limits
        cluster = cluster or self.cluster
        after = _effective(own, limits, cluster)
        ready = self._tables.ready
        stamp = self._tables.stamp if ready else 0
        try:
            write()
            if ready:
                self._tables.stamp = 0
                self._apply(after, limits, touched)
            stamp = self._db.commit()
        except BaseException:
            self._db.rollback()
            if ready and not self._tables.stamp:
                before, stamp = stamp, 0  # it stays so if this fails, too
                self._apply(self.sets, self.limits, touched)
                stamp = before
            raise
        finally:
            if ready:
                self._tables.stamp = stamp
        self.own, self.limits, self.cluster, self.sets = own, limits, cluster, after

    def _apply(self, sets: Sets, limits: Limits, touched: Collection[bytes]) -> None:
        self._tables.change(sets, touched)
        self.counters.agree(limits.values())
        self._tables.limits(bool(limits))

    def _set(self, name: str, allow: bool | None) -> PrefixSet:
        """The set of that name, or a new one."""
        _usable(name)
        if name in self.own:
            return self.own[name]
        if len(self.own) == SETS_MAX:
            raise errors.ResourceExhausted(f"{SETS_MAX} sets are there, which is the limit", fix="delete one")
        taken = {each.ident for each in self.own.values()}
        ident = next(number for number in range(1, CLUSTER_IDENT) if number not in taken)
        return PrefixSet(name, ident, bool(allow))

    def _existing(self, name: str) -> PrefixSet:
        _usable(name)
        if name not in self.own:
            raise errors.NotFound(
                f"there is no set {name[:63]!r}", field="set", fix="see `fibril prefilter ls`"
            )
        return self.own[name]

    def _require(self) -> None:
        if not self._tables.ready:
            raise errors.Unavailable("the prefilter's tables are not there", fix="see `fibril status`")

    # -- limits

    def set_limit(self, prefix: IPv4Network | IPv6Network, rate: int, burst: int) -> Limit:
        """Make or change one."""
        self._require()
        old = self.limits.get(prefix)
        if old is None and len(self.limits) == abi.RULES:
            raise errors.ResourceExhausted(
                f"{abi.RULES} limits are there, which is the limit", fix="remove one"
            )
        taken = {limit.ident for limit in self.limits.values()}
        ident = old.ident if old else next(number for number in range(abi.RULES) if number not in taken)
        new = Limit(prefix, rate, burst, ident)
        if old is None:
            self.counters.clear_limit(ident)
        self._change((), lambda: self._db.write_limit(new), limits={**self.limits, prefix: new})
        return new

    def remove_limit(self, prefix: IPv4Network | IPv6Network) -> None:
        self._require()
        if prefix not in self.limits:
            raise errors.NotFound(
                f"there is no limit for {prefix}", field="prefix", fix="see `fibril prefilter ls`"
            )
        old = self.limits[prefix]
        rest = {each: self.limits[each] for each in self.limits if each != prefix}
        self._change((), lambda: self._db.delete_limit(old), limits=rest)


def _effective(own: Mapping[str, PrefixSet], limits: Limits, cluster: PrefixSet) -> Sets:
    """Where nothing is declared nobody needs to be allowed."""
    return Sets([*own.values(), cluster] if limits or any(map(len, own.values())) else ())


def _usable(name: str) -> None:
    if (
        not 0 < len(name) <= 63
        or not name.isascii()
        or name.strip("-_.") != name
        or not name.replace("-", "").replace("_", "").replace(".", "").isalnum()
    ):
        raise errors.InvalidArgument(
            f"{name[:63]!r} is no name", field="set", fix='use letters, digits, "-", "_" and "." (at most 63)'
        )
    if name == CLUSTER:
        raise errors.InvalidArgument(
            f"set {CLUSTER!r} is the node's own", field="set", fix="use another name"
        )


def _guard(entries: Iterable[bytes], force: bool) -> None:
    everything: Sequence[bytes] = () if force else [key for key in entries if key[-1] == 0]
    if everything:
        raise errors.FailedPrecondition(
            f"denying {text_of(everything[0])} leaves nobody but the cluster and what other sets allow",
            fix="set force if that is meant",
        )


def _of(family: int, entries: Mapping[bytes, int]) -> dict[bytes, int]:
    return {key: expiry for key, expiry in entries.items() if family_of(key) == family}


def _some(family: int, entries: Mapping[bytes, int]) -> Keys:
    return Keys.of(family, _of(family, entries))
