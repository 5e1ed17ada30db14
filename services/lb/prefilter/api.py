"""PrefilterService: fibril.prefilter.v1 to the state and back. No decisions here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any, Final

from fibril.prefilter.v1 import prefilter_pb2 as pb
from fibril.prefilter.v1 import prefilter_pb2_grpc
from services.common import errors
from services.lb.prefilter import abi
from services.lb.prefilter.keys import Keys, address_of, family_of, parse, parse_all, text_of
from services.lb.prefilter.limits import BURST_S, RATE_MAX, Limit, Traffic
from services.lb.prefilter.model import CLUSTER, PrefixSet
from services.lb.prefilter.part import PrefilterPart
from services.lb.prefilter.state import State

MESSAGE_MAX: Final = 100_000
PAGE_DEFAULT: Final = 1000
PAGE_MAX: Final = 10_000
_TTL_MAX: Final = 0xFFFFFFFF
_ON_LOOP: Final = 2_000
_ALLOW: Final[dict[int, bool | None]] = {
    pb.ACTION_UNSPECIFIED: None,
    pb.ACTION_DENY: False,
    pb.ACTION_ALLOW: True,
}


class PrefilterApi(prefilter_pb2_grpc.PrefilterServiceServicer):
    """One servicer for all servers of the process."""

    def __init__(self, part: PrefilterPart) -> None:
        self._part = part

    # -- sets

    async def SetPrefixes(
        self, requests: AsyncIterator[pb.SetPrefixesRequest], context: object
    ) -> pb.SetPrefixesResponse:
        first, entries = await _collect(requests)
        done = await self._part.change(
            State.set_prefixes, first.set, _allow(first.action), entries, first.force
        )
        return pb.SetPrefixesResponse(entries=done.entries, added=done.added, removed=done.removed)

    async def AddPrefixes(
        self, requests: AsyncIterator[pb.AddPrefixesRequest], context: object
    ) -> pb.AddPrefixesResponse:
        first, entries = await _collect(requests)
        done = await self._part.change(State.add, first.set, _allow(first.action), entries, first.force)
        return pb.AddPrefixesResponse(entries=done.entries, added=done.added)

    async def RemovePrefixes(
        self, requests: AsyncIterator[pb.RemovePrefixesRequest], context: object
    ) -> pb.RemovePrefixesResponse:
        first, entries = await _collect(requests)
        done = await self._part.change(State.remove, first.set, entries)
        return pb.RemovePrefixesResponse(entries=done.entries, removed=done.removed)

    async def DeleteSet(self, request: pb.DeleteSetRequest, context: object) -> pb.DeleteSetResponse:
        await self._part.change(State.delete, request.set)
        return pb.DeleteSetResponse()

    async def ListSets(self, request: pb.ListSetsRequest, context: object) -> pb.ListSetsResponse:
        sets = await self._part.read(_sets)
        return pb.ListSetsResponse(
            sets=sets,
            devices=self._part.devices,
            problem=self._part.problem,
            memory_bytes=await self._part.read(State.memory),
        )

    async def ListPrefixes(self, request: pb.ListPrefixesRequest, context: object) -> pb.ListPrefixesResponse:
        size = request.page.size or PAGE_DEFAULT
        if size > PAGE_MAX:
            raise errors.InvalidArgument(f"a page of {size} is larger than {PAGE_MAX}", field="page.size")
        state = self._part.state
        found = state.cluster if request.set == CLUSTER else state.own.get(request.set)
        if found is None:
            raise errors.NotFound(
                f"there is no set {request.set[:63]!r}", field="set", fix="see `fibril prefilter ls`"
            )
        try:
            after = parse(request.page.token) if request.page.token else b""
        except ValueError:
            raise errors.InvalidArgument(
                f"page token {request.page.token[:60]!r} is not one a list has given", field="page.token"
            ) from None
        answer = pb.ListPrefixesResponse()
        for keys in (found.v4, found.v6):
            if after and family_of(after) == 6 and keys is found.v4:
                continue
            index = keys.find(after + b"\0") if len(after) == keys.size else 0
            while index < len(keys):
                if len(answer.prefixes) == size:
                    answer.next_token = answer.prefixes[-1].prefix
                    return answer
                answer.prefixes.append(_entry(keys, index))
                index += 1
        return answer

    # -- addresses

    async def GetAddress(self, request: pb.GetAddressRequest, context: object) -> pb.GetAddressResponse:
        address = address_of(request.address, "address")

        def look(state: State) -> pb.GetAddressResponse:
            answer = pb.GetAddressResponse()
            matches = state.sets.matches(address)
            for number, (each, key) in enumerate(matches):
                keys = each.keys(address.version)
                entry, action = _entry(keys, keys.index(key)), _action(each)
                if number:
                    answer.others.add(set=each.name, action=action, entry=entry)
                    continue
                answer.set, answer.action = each.name, action
                answer.entry.CopyFrom(entry)
                if state.ready:
                    answer.set_traffic.CopyFrom(_traffic(state.counters.count(each.ident)))
            limits = [limit for limit in state.limits.values() if address in limit.prefix]
            limit = max(limits, key=lambda one: one.prefix.prefixlen, default=None)
            if limit is not None and limit.holds(address):
                answer.limit.CopyFrom(_limit(state, limit))
                answer.limited_now = not matches and state.ready and state.counters.limited(limit, address)
            return answer

        return await self._part.read(look)

    # -- limits

    async def SetLimit(self, request: pb.SetLimitRequest, context: object) -> pb.SetLimitResponse:
        given = request.limit
        prefix = _network(given.prefix, "limit.prefix")
        if prefix.version == 6 and prefix.prefixlen > 64:
            raise errors.InvalidArgument(
                f"{prefix} is less than one source",
                field="limit.prefix",
                fix="give at most 64 bits: an IPv6 source is a /64",
            )
        if not 1 <= given.rate_pps <= RATE_MAX:
            raise errors.InvalidArgument(
                f"{given.rate_pps} packets a second", field="limit.rate_pps", fix=f"give 1 to {RATE_MAX}"
            )
        burst = given.burst or max(1, given.rate_pps // 10)
        if burst > min(RATE_MAX, given.rate_pps * BURST_S):
            raise errors.InvalidArgument(
                f"a burst of {burst} packets is more than an hour's", field="limit.burst", fix="give less"
            )
        limit = await self._part.change(State.set_limit, prefix, given.rate_pps, burst)
        return pb.SetLimitResponse(limit=await self._part.read(lambda state: _limit(state, limit)))

    async def RemoveLimit(self, request: pb.RemoveLimitRequest, context: object) -> pb.RemoveLimitResponse:
        await self._part.change(State.remove_limit, _network(request.prefix, "prefix"))
        return pb.RemoveLimitResponse()

    async def ListLimits(self, request: pb.ListLimitsRequest, context: object) -> pb.ListLimitsResponse:
        limits = await self._part.read(_limits)
        return pb.ListLimitsResponse(limits=limits, sources_max=self._part.state.counters.sources)

    async def GetCounters(self, request: pb.GetCountersRequest, context: object) -> pb.GetCountersResponse:
        def look(state: State) -> pb.GetCountersResponse:
            sets, limits = _sets(state), _limits(state)
            return pb.GetCountersResponse(
                denied=_sum(one.traffic for one in sets if one.action == pb.ACTION_DENY),
                allowed=_sum(one.traffic for one in sets if one.action == pb.ACTION_ALLOW),
                limited=_sum(one.dropped for one in limits),
                within=_sum(one.passed for one in limits),
                sets=sets,
                limits=limits,
            )

        return await self._part.read(look)


async def _collect(requests: AsyncIterator[Any]) -> tuple[Any, dict[bytes, int]]:
    """The first message, and all prefixes with their expiry."""
    first: Any = None
    entries: dict[bytes, int] = {}
    async for request in requests:
        if first is None:
            first = request
        elif request.set not in ("", first.set):
            raise errors.InvalidArgument(
                f"set {request.set[:63]!r} in a stream for {first.set[:63]!r}",
                field="set",
                fix="use a stream for each",
            )
        if len(request.prefixes) > MESSAGE_MAX:
            raise errors.InvalidArgument(
                f"{len(request.prefixes)} prefixes in a message",
                field="prefixes",
                fix=f"send at most {MESSAGE_MAX}",
            )
        ttl = getattr(request, "ttl_s", 0)
        expiry = min(int(time.time()) + ttl, _TTL_MAX) if ttl else 0
        parsing: Callable[[Iterable[str]], list[bytes]] = parse_all
        # Others are served meanwhile.
        many = len(request.prefixes) > _ON_LOOP
        keys = await asyncio.to_thread(parsing, request.prefixes) if many else parsing(request.prefixes)
        entries.update(dict.fromkeys(keys, expiry))
    if first is None:
        raise errors.InvalidArgument("a stream without a message", field="set", fix="name the set")
    return first, entries


def _allow(action: int) -> bool | None:
    if action not in _ALLOW:
        raise errors.InvalidArgument(f"{action} is no action", field="action")
    return _ALLOW[action]


def _network(text: str, field: str) -> IPv4Network | IPv6Network:
    try:
        return ip_network(text_of(parse(text)))
    except ValueError as error:
        raise errors.InvalidArgument(str(error), field=field, fix='write "0.0.0.0/0"') from None


def _action(each: PrefixSet) -> pb.Action.ValueType:
    return pb.ACTION_ALLOW if each.allow else pb.ACTION_DENY


def _entry(keys: Keys, index: int) -> pb.Prefix:
    return pb.Prefix(prefix=text_of(keys.at(index)), expires_at=keys.expiry_at(index))


def _traffic(traffic: Traffic) -> pb.Traffic:
    return pb.Traffic(packets=traffic.packets, bytes=traffic.bytes)


def _sum(parts: Iterable[pb.Traffic]) -> pb.Traffic:
    total = Traffic()
    for part in parts:
        total += Traffic(part.packets, part.bytes)
    return _traffic(total)


def _limit(state: State, limit: Limit) -> pb.Limit:
    answer = pb.Limit(prefix=str(limit.prefix), rate_pps=limit.rate, burst=limit.burst)
    if state.ready:
        answer.passed.CopyFrom(_traffic(state.counters.count(abi.COUNT_PASSED + limit.ident)))
        answer.dropped.CopyFrom(_traffic(state.counters.count(abi.COUNT_DROPPED + limit.ident)))
    return answer


def _limits(state: State) -> list[pb.Limit]:
    ordered = sorted(
        state.limits.values(),
        key=lambda one: (one.prefix.version, one.prefix.network_address.packed, one.prefix.prefixlen),
    )
    return [_limit(state, limit) for limit in ordered]


def _sets(state: State) -> list[pb.Set]:
    sets = [*state.own.values(), state.cluster] if state.own or len(state.cluster) else []
    return [
        pb.Set(
            name=each.name,
            action=_action(each),
            entries_v4=len(each.v4),
            entries_v6=len(each.v6),
            expiring=each.v4.expiring() + each.v6.expiring(),
            traffic=_traffic(state.counters.count(each.ident) if state.ready else Traffic()),
        )
        for each in sorted(sets, key=lambda one: one.name)
    ]
