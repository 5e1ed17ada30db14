"""What the kernel is to hold for a service on this node. Pure.

A frontend reaches backends of its own family only, so each family of a service is planned by itself, and has a line
of its own in the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from services.lb import maglev
from services.lb.abi import BackendState, ServiceFlag
from services.lb.locality import Locality
from services.lb.model import (
    Algorithm,
    Backend,
    BackendKey,
    Backends,
    Forwarding,
    Frontend,
    FrontendType,
    NoBackend,
    Spec,
    Topology,
    TrafficPolicy,
)  # fmt: skip

LIST_MAX: Final = 4096
"""Slots of a list that repeats backends by weight; weights that would need more are rounded."""

Verdict = Callable[[str, BackendKey], str]
"""Why a backend of a service is not well, "" if it is."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Backends by slot. ordered: the slot matters (a Maglev table), else only who is in it and how often."""

    members: tuple[BackendKey, ...] = ()
    order: tuple[int, ...] = ()
    """Which of the members each slot has; empty: one slot each."""
    ordered: bool = False

    @property
    def slots(self) -> tuple[BackendKey, ...]:
        """Whom each slot has."""
        return tuple(self.members[index] for index in self.order) if self.order else self.members


NOBODY: Final = Stretch()


@dataclass(frozen=True, slots=True)
class FamilyPlan:
    """A service's part in one family on this node."""

    fronts: tuple[Frontend, ...]
    flags: ServiceFlag
    affinity_s: int
    states: Mapping[BackendKey, BackendState]
    """Of all backends of the family."""
    local: frozenset[BackendKey]
    inside: Stretch
    outside: Stretch


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a node does with services that leave it open."""

    forwarding: Forwarding = Forwarding.SNAT


def effective_state(spec: Spec, backend: Backend, verdict: Verdict) -> BackendState:
    """As declared, or quarantined here for its health."""
    if backend.state is BackendState.ACTIVE and spec.health_check and verdict(spec.name, backend.key):
        return BackendState.QUARANTINED
    return backend.state


def served(spec: Spec, here: Locality) -> tuple[Frontend, ...]:
    """The frontends that this node has."""
    return tuple(
        front
        for front in spec.frontends
        if front.type is not FrontendType.HOST_PORT or front.node == here.node
    )


def plan(
    spec: Spec, backends: Backends, verdict: Verdict, here: Locality, defaults: Defaults
) -> dict[int, FamilyPlan]:
    """By family, 4 and 6: those that this node has a frontend of."""
    fronts = served(spec, here)
    families = sorted({front.address.version for front in fronts})
    return {family: _family(spec, backends, verdict, here, defaults, fronts, family) for family in families}


def _family(
    spec: Spec,
    backends: Backends,
    verdict: Verdict,
    here: Locality,
    defaults: Defaults,
    fronts: Iterable[Frontend],
    family: int,
) -> FamilyPlan:
    mine = [backend for key, backend in backends.items() if key.address.version == family]
    if spec.health_check:
        states = {backend.key: effective_state(spec, backend, verdict) for backend in mine}
    else:
        states = {backend.key: backend.state for backend in mine}
    able = _Able(mine, states.values())
    own = tuple(front for front in fronts if front.address.version == family)
    inside = _inside(spec, able, here)
    near: Stretch | None = None
    far = NOBODY
    if any(front.outside for front in own):
        outside = _outside(spec, able, here)
        far = _table(spec, outside)
        near = far if inside == outside else None
    return FamilyPlan(
        own,
        _flags(spec, defaults),
        spec.affinity_s,
        states,
        frozenset(backend.key for backend in mine if here.is_local(backend)),
        near or _table(spec, inside),
        far,
    )


def _flags(spec: Spec, defaults: Defaults) -> ServiceFlag:
    flags = 0
    forwarding = spec.forwarding or defaults.forwarding
    for wanted, flag in (
        (spec.algorithm is Algorithm.MAGLEV, ServiceFlag.MAGLEV),
        (spec.affinity_s > 0, ServiceFlag.AFFINITY),
        (bool(spec.sources), ServiceFlag.SOURCES),
        (spec.no_backend is NoBackend.DROP, ServiceFlag.DROP),
        (forwarding in (Forwarding.DSR, Forwarding.HYBRID), ServiceFlag.DSR),
        (forwarding is Forwarding.DSR, ServiceFlag.DSR_UDP),
        (spec.external is TrafficPolicy.LOCAL, ServiceFlag.LOCAL_OUTSIDE),
    ):
        if wanted:
            flags += flag.value
    return ServiceFlag(flags)


class _Able:
    """Those that may get connections."""

    def __init__(self, backends: Iterable[Backend], states: Iterable[BackendState]) -> None:
        self.active: list[Backend] = []
        self.leaving: list[Backend] = []
        for backend, state in zip(backends, states, strict=True):
            if state is BackendState.ACTIVE:
                self.active.append(backend)
            elif state is BackendState.TERMINATING:
                self.leaving.append(backend)

    def among(self, near: Callable[[Backend], bool] | None = None) -> list[Backend]:
        """Who gets new ones: the active, or for want of any those that are on their way out."""
        if near is None:
            return self.active or self.leaving
        return list(filter(near, self.active)) or list(filter(near, self.leaving))


def _inside(spec: Spec, able: _Able, here: Locality) -> list[Backend]:
    if spec.internal is TrafficPolicy.LOCAL:
        return able.among(here.is_local)
    steps: list[Callable[[Backend], bool]] = []
    if spec.topology is Topology.SAME_NODE:
        steps.append(here.is_local)
    if spec.topology is not Topology.ANY:
        steps += [here.same_zone, here.same_cluster]
    for near in steps:
        # Only who is active is preferred: better an active one farther off than one that is leaving.
        found = list(filter(near, able.active))
        if found:
            return found
    return able.among()


def _outside(spec: Spec, able: _Able, here: Locality) -> list[Backend]:
    return able.among(here.is_local if spec.external is TrafficPolicy.LOCAL else None)


def _table(spec: Spec, backends: list[Backend]) -> Stretch:
    if spec.algorithm is Algorithm.RANDOM or not backends:
        return _list(backends)
    named = {_name(backend.key): backend for backend in backends}
    names = sorted(named)
    size = spec.maglev_size or maglev.size_for(len(backends))
    entries = maglev.table([(name, named[name].weight) for name in names], size)
    return Stretch(tuple(named[name].key for name in names), tuple(entries), ordered=True)


def _name(key: BackendKey) -> bytes:
    return key.address.packed + key.port.to_bytes(2, "big")


def _list(backends: list[Backend]) -> Stretch:
    """Each as often as its weight says, in lowest terms."""
    if not backends:
        return NOBODY
    weights = [backend.weight for backend in backends]
    members = tuple(backend.key for backend in backends)
    divisor = math.gcd(*weights)
    total = sum(weights) // divisor
    if total == len(backends):
        return Stretch(members)
    if total > LIST_MAX:
        share = max(LIST_MAX, len(backends)) / sum(weights)
        times = [max(1, round(weight * share)) for weight in weights]
    else:
        times = [weight // divisor for weight in weights]
    return Stretch(members, tuple(index for index, count in enumerate(times) for _ in range(count)))
