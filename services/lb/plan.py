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

    slots: tuple[BackendKey, ...] = ()
    ordered: bool = False


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
    states = {backend.key: effective_state(spec, backend, verdict) for backend in mine}
    inside, outside = _inside(spec, mine, states, here), _outside(spec, mine, states, here)
    own = tuple(front for front in fronts if front.address.version == family)
    open_to_world = any(front.outside for front in own)
    far = _table(spec, outside) if open_to_world else NOBODY
    near = far if open_to_world and inside == outside else _table(spec, inside)
    return FamilyPlan(
        own,
        _flags(spec, defaults),
        spec.affinity_s,
        states,
        frozenset(backend.key for backend in mine if here.is_local(backend)),
        near,
        far,
    )


def _flags(spec: Spec, defaults: Defaults) -> ServiceFlag:
    flags = ServiceFlag(0)
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
            flags |= flag
    return flags


def _among(backends: Iterable[Backend], states: Mapping[BackendKey, BackendState]) -> list[Backend]:
    """Who gets new connections: the active ones, or for want of any those that are on their way out."""
    given = list(backends)
    active = [backend for backend in given if states[backend.key] is BackendState.ACTIVE]
    return active or [backend for backend in given if states[backend.key] is BackendState.TERMINATING]


def _inside(
    spec: Spec, backends: list[Backend], states: Mapping[BackendKey, BackendState], here: Locality
) -> list[Backend]:
    if spec.internal is TrafficPolicy.LOCAL:
        return _among(filter(here.is_local, backends), states)
    steps: list[Callable[[Backend], bool]] = []
    if spec.topology is Topology.SAME_NODE:
        steps.append(here.is_local)
    if spec.topology is not Topology.ANY:
        steps += [here.same_zone, here.same_cluster]
    for near in steps:
        # Only who is active is preferred: better an active one farther off than one that is leaving.
        found = [b for b in backends if states[b.key] is BackendState.ACTIVE and near(b)]
        if found:
            return found
    return _among(backends, states)


def _outside(
    spec: Spec, backends: list[Backend], states: Mapping[BackendKey, BackendState], here: Locality
) -> list[Backend]:
    if spec.external is TrafficPolicy.LOCAL:
        return _among(filter(here.is_local, backends), states)
    return _among(backends, states)


def _table(spec: Spec, backends: list[Backend]) -> Stretch:
    if spec.algorithm is Algorithm.RANDOM or not backends:
        return _list(backends)
    names = sorted((_name(backend.key), backend) for backend in backends)
    size = spec.maglev_size or maglev.size_for(len(backends))
    entries = maglev.table([(name, backend.weight) for name, backend in names], size)
    return Stretch(tuple(names[index][1].key for index in entries), ordered=True)


def _name(key: BackendKey) -> bytes:
    return key.address.packed + key.port.to_bytes(2, "big")


def _list(backends: list[Backend]) -> Stretch:
    """Each as often as its weight says, in lowest terms."""
    if not backends:
        return NOBODY
    weights = [backend.weight for backend in backends]
    divisor = math.gcd(*weights)
    total = sum(weights) // divisor
    if total == len(backends):
        return Stretch(tuple(backend.key for backend in backends))
    if total > LIST_MAX:
        share = max(LIST_MAX, len(backends)) / sum(weights)
        times = [max(1, round(weight * share)) for weight in weights]
    else:
        times = [weight // divisor for weight in weights]
    return Stretch(tuple(b.key for b, count in zip(backends, times, strict=True) for _ in range(count)))
