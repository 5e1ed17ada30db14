"""The cluster's policies in etcd: changed in transactions, followed by every node.

    /fibril/v1/<cluster>/policies/<kind>/<namespace>/<name>   fibril.policy.v1.Policy

Names are quoted as in URLs; a namespace is "-" for none, which no namespace is called.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Final
from urllib.parse import quote

from google.protobuf.message import DecodeError

from fibril.policy.v1 import policy_pb2 as pb
from services.common.errors import Aborted, FailedPrecondition, FibrilError, NotFound, ResourceExhausted
from services.common.etcd.client import EtcdClient
from services.common.etcd.seen import Seen
from services.common.etcd.watch import Delete, Put, Snapshot, Synced, watch_prefix
from services.common.feed import Feed
from services.policy import convert
from services.policy.model import Policy, PolicyKey

log = logging.getLogger(__name__)

ATOMIC_MAX: Final = 100
"""Policies changed together: etcd's limit of a transaction."""
BYTES_MAX: Final = 1 << 20
RETRIES: Final = 8
_NOWHERE: Final = "-"

Callback = Callable[[PolicyKey, Policy | None], None]


def root(cluster: str) -> str:
    return f"/fibril/v1/{cluster}/policies/"


def key_text(key: PolicyKey) -> str:
    """Below root."""
    return f"{int(key.kind)}/{quote(key.namespace, safe='') or _NOWHERE}/{quote(key.name, safe='')}"


def encode(policy: Policy) -> bytes:
    message = convert.policy_message(policy)
    message.revision = 0
    return message.SerializeToString(deterministic=True)


class Store:
    """Used from one event loop."""

    def __init__(self, etcd: EtcdClient, cluster: str, changed: Callback, told: Callable[[int], None]) -> None:
        """told: all that etcd has said up to a revision has been told."""
        self._etcd, self._root = etcd, root(cluster)
        self._changed, self._told = changed, told
        self.policies: dict[PolicyKey, Policy] = {}
        self.revisions: dict[PolicyKey, int] = {}
        self._by_text: dict[str, PolicyKey] = {}
        self.synced = asyncio.Event()
        self.feed: Feed[PolicyKey] = Feed(lambda: list(self.policies))
        self._unusable: dict[str, str] = {}
        self._seen = Seen()

    # ---- following ------------------------------------------------------------------------------------------
    async def run(self) -> None:
        """Until cancelled."""
        async with aclosing(watch_prefix(self._etcd, self._root, self._seen.restart)) as events:
            async for event in events:
                match event:
                    case Snapshot(kvs, revision):
                        for count, kv in enumerate(kvs):
                            self._put(kv.key.removeprefix(self._root), kv.value, kv.mod_revision)
                            if count % 64 == 63:
                                await asyncio.sleep(0)
                        self._reached(revision)
                    case Put(key, value, revision):
                        self._put(key.removeprefix(self._root), value, revision)
                        self._reached(revision)
                    case Delete(key, revision):
                        self._delete(key.removeprefix(self._root))
                        self._reached(revision)
                    case Synced(revision):
                        self._reached(revision)
                        self.synced.set()

    def _reached(self, revision: int) -> None:
        self._told(revision)
        self._seen.reach(revision)

    async def _settle(self, revision: int) -> None:
        """Wait until what was written is known here too, so that who asks next is told of it."""
        if self.synced.is_set():
            await self._seen.wait(revision)

    def _put(self, text: str, value: bytes, revision: int) -> None:
        self._unusable.pop(text, None)
        try:
            policy = convert.policy(pb.Policy.FromString(value))
            if key_text(policy.key) != text:
                raise ValueError(f"it holds {policy.key}")
        except (FibrilError, ValueError, DecodeError) as error:
            # Written by another version, or by hand: what was known before goes on.
            self._unusable[text] = str(error)
            log.error("not usable", extra={"key": self._root + text, "cause": str(error)})
            return
        self.policies[policy.key], self.revisions[policy.key] = policy, revision
        self._by_text[text] = policy.key
        self._changed(policy.key, policy)
        self.feed.publish("put", policy.key)

    def _delete(self, text: str) -> None:
        self._unusable.pop(text, None)
        key = self._by_text.pop(text, None)
        if key is not None:
            del self.policies[key], self.revisions[key]
            self._changed(key, None)
            self.feed.publish("delete", key)

    @property
    def problem(self) -> str:
        """One sentence; empty when all that etcd says is understood."""
        if not self._unusable:
            return ""
        text, why = min(self._unusable.items())
        return f"etcd's key {self._root}{text} is not usable, what was known before goes on: {why}"

    # ---- changing -------------------------------------------------------------------------------------------
    async def upsert(self, policies: Sequence[Policy], expected: int = 0) -> tuple[Mapping[PolicyKey, str], int]:
        """Have exactly these: what became of each ("created", "changed", "unchanged"), and etcd's revision. All or none.

        expected: 0, or the revision that the one policy must have: else FailedPrecondition. Aborted: too many others change
        the same; ResourceExhausted: too large to be changed together. Unavailable: etcd is away.
        """
        values = self.require_room(policies)
        for _ in range(RETRIES):
            listing = await self._etcd.get_many([self._root + text for text in values])
            there = {kv.key.removeprefix(self._root): kv for kv in listing.kvs}
            if expected:
                own = there.get(next(iter(values)))
                if own is None or own.mod_revision != expected:
                    raise FailedPrecondition(
                        f"the policy is at revision {own.mod_revision if own else 0}, not {expected}",
                        field="expected_revision",
                        fix="read it again",
                    )
            result = {
                policy.key: "created" if text not in there else "unchanged" if there[text].value == value else "changed"
                for policy, (text, value) in zip(policies, values.items(), strict=True)
            }
            put = {
                self._root + text: value
                for text, value in values.items()
                if text not in there or there[text].value != value
            }
            if not put:
                await self._settle(max((kv.mod_revision for kv in listing.kvs), default=0))
                return result, listing.revision
            expect = {key: there[text].mod_revision if (text := key.removeprefix(self._root)) in there else 0 for key in put}
            done = await self._etcd.transact(expect, put=put)
            if done is not None:
                await self._settle(done)
                return result, done
        raise Aborted("others keep changing the same policies", fix="try again")

    @staticmethod
    def require_room(policies: Sequence[Policy]) -> dict[str, bytes]:
        """What is recorded of policies that are changed together. ResourceExhausted: it is too much."""
        values = {key_text(policy.key): encode(policy) for policy in policies}
        size = sum(map(len, values.values()))
        if len(values) > ATOMIC_MAX or size > BYTES_MAX:
            one = f"{policies[0].key} takes" if len(policies) == 1 else f"{len(policies)} policies take"
            raise ResourceExhausted(
                f"{one} {size} bytes, the limits are {BYTES_MAX} bytes and {ATOMIC_MAX} policies at once",
                field="policies",
                fix="make several of it",
            )
        return values

    async def delete(self, keys: Sequence[PolicyKey]) -> int:
        """Remove these; etcd's revision. All or none. NotFound names the first that is not there."""
        for _ in range(RETRIES):
            listing = await self._etcd.get_many([self._root + key_text(key) for key in keys])
            there = {kv.key: kv.mod_revision for kv in listing.kvs}
            for at, key in enumerate(keys):
                if self._root + key_text(key) not in there:
                    raise NotFound(f"there is no {key}", field=f"keys[{at}]", fix="see: fibril policy ls")
            done = await self._etcd.transact(there, delete=list(there))
            if done is not None:
                await self._settle(done)
                return done
        raise Aborted("others keep changing the same policies", fix="try again")

    def parts(self, policies: Iterable[Policy]) -> Iterable[list[Policy]]:
        """In pieces that can each be changed at once."""
        part: list[Policy] = []
        size = 0
        for policy in policies:
            own = len(encode(policy))
            if part and (len(part) >= ATOMIC_MAX or size + own > BYTES_MAX):
                yield part
                part, size = [], 0
            part.append(policy)
            size += own
        if part:
            yield part
