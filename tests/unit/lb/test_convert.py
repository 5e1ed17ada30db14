"""Messages to the model and back, and what is refused, by path and with what to do."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fibril.lb.v1 import lb_pb2 as pb
from services.common.errors import InvalidArgument
from services.lb import convert, fields, keys
from services.lb.abi import BackendState
from services.lb.claims import BLOCK, Claim, Claims, Place, wanted
from services.lb.model import (
    ANY_V4,
    ANY_V6,
    SCTP,
    TCP,
    UDP,
    Algorithm,
    Backend,
    BackendKey,
    Forwarding,
    Frontend,
    FrontendType,
    GrpcProbe,
    HealthCheck,
    HttpProbe,
    NoBackend,
    Spec,
    TcpProbe,
    Topology,
    TrafficPolicy,
)

PORT = st.integers(1, 65535)
V4 = st.integers(0x0A000001, 0x0AFFFFFE).map(IPv4Address)
V6 = st.integers(1, 2**64).map(lambda low: IPv6Address((0xFD00 << 112) + low))
ADDRESS = st.one_of(V4, V6)
TEXT = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=30)
NAME = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._/:-]{0,40}\Z")
NETWORK = st.builds(
    lambda address, bits: IPv4Network((int(address) >> 32 - bits << 32 - bits, bits)), V4, st.integers(8, 32)
)
STATUS = st.tuples(st.integers(100, 599), st.integers(100, 599)).map(lambda pair: (min(pair), max(pair)))
PROBE = st.one_of(
    st.just(TcpProbe()),
    st.builds(GrpcProbe, TEXT),
    st.builds(
        HttpProbe,
        st.from_regex(r"\A/[a-z%?&=]{0,20}\Z"),
        st.from_regex(r"\A[a-z.]{0,20}\Z"),
        st.lists(STATUS, min_size=1, max_size=4).map(tuple),
    ),
)


@st.composite
def checks(draw: st.DrawFn) -> HealthCheck:
    interval = draw(st.integers(100, 3_600_000))
    count = st.integers(1, 100)
    return HealthCheck(
        draw(PROBE),
        draw(st.integers(0, 65535)),
        interval / 1000,
        draw(st.integers(1, interval)) / 1000,
        draw(count),
        draw(count),
    )


@st.composite
def fronts(draw: st.DrawFn) -> Frontend:
    kind = draw(st.sampled_from(FrontendType))
    anywhere = kind in (FrontendType.NODE_PORT, FrontendType.HOST_PORT)
    first = draw(st.integers(1, 40000))
    return Frontend(
        kind,
        draw(st.sampled_from((ANY_V4, ANY_V6)) if anywhere else ADDRESS),
        draw(st.sampled_from((TCP, UDP))),
        first,
        first + draw(st.sampled_from((0, 0, 1, 100))),
        draw(st.sampled_from(("a", "b"))) if kind is FrontendType.HOST_PORT else "",
    )


def apart(given: list[Frontend]) -> tuple[Frontend, ...]:
    """Those that do not meet one before."""
    kept: list[Frontend] = []
    for front in given:
        claim = Claim(front.proto, front.port, front.port_last, front.node)
        if not any(
            other.address == front.address
            and claim.meets(Claim(other.proto, other.port, other.port_last, other.node))
            for other in kept
        ):
            kept.append(front)
    return tuple(kept)


SPEC = st.builds(
    Spec,
    name=NAME,
    frontends=st.lists(fronts(), min_size=1, max_size=6).map(apart),
    algorithm=st.sampled_from(Algorithm),
    maglev_size=st.sampled_from((0, 251, 1021, 131071)),
    affinity_s=st.integers(0, 86400),
    internal=st.sampled_from(TrafficPolicy),
    external=st.sampled_from(TrafficPolicy),
    topology=st.sampled_from(Topology),
    sources=st.lists(NETWORK, max_size=3, unique=True).map(tuple),
    forwarding=st.sampled_from(Forwarding),
    no_backend=st.sampled_from(NoBackend),
    health_check=st.none() | checks(),
    annotations=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9), TEXT
    ),
)
BACKEND = st.builds(
    Backend,
    key=st.builds(BackendKey, ADDRESS, st.integers(1, 65000)),
    weight=PORT,
    zone=TEXT,
    node=TEXT,
    cluster=TEXT,
    state=st.sampled_from([state for state in BackendState if state]),
)
BACKENDS = st.lists(BACKEND, max_size=5, unique_by=lambda b: b.key).map(lambda bs: {b.key: b for b in bs})


@given(SPEC, BACKENDS)
def test_what_is_written_reads_the_same(spec: Spec, members: dict[BackendKey, Backend]) -> None:
    message = convert.to_proto(spec, members, revision=7)
    again = pb.Service.FromString(message.SerializeToString())
    assert convert.service(again) == (spec, members)
    assert convert.to_proto(*convert.service(again), revision=7) == message


def service(**changes: Any) -> pb.Service:
    message = pb.Service(
        name="web/front:http",
        frontends=[pb.Frontend(address="10.96.0.1", port=80)],
        backends=[pb.Backend(address="10.0.1.1", port=8080)],
    )
    message.MergeFrom(pb.Service(**changes))
    return message


def test_what_is_left_open_has_a_meaning() -> None:
    spec, members = convert.service(service())
    assert spec == Spec(
        "web/front:http", (Frontend(FrontendType.CLUSTER_IP, ip_address("10.96.0.1"), TCP, 80, 80),)
    )
    assert list(members.values()) == [Backend(BackendKey(ip_address("10.0.1.1"), 8080))]
    port = pb.Frontend(type=pb.FRONTEND_TYPE_NODE_PORT, port=30000, protocol=pb.PROTOCOL_UDP)
    spec = convert.spec(service(frontends=[port], source_ranges=["10.0.0.0/8"]))
    assert [front.address for front in spec.frontends[1:]] == [ANY_V4, ANY_V6]
    assert spec.algorithm is Algorithm.MAGLEV
    assert spec.sources == (ip_network("10.0.0.0/8"),)
    check = convert.spec(service(health_check=pb.HealthCheck(http={}, interval_ms=500))).health_check
    assert check == HealthCheck(HttpProbe(), interval_s=0.5, timeout_s=0.5)


V6TEXT = "2001:db8::1"
WRONG: list[tuple[Callable[[pb.Service], Any], str]] = [
    (lambda s: setattr(s, "name", ""), "service.name"),
    (lambda s: setattr(s, "name", "a" * 254), "service.name"),
    (lambda s: setattr(s, "name", "-a"), "service.name"),
    (lambda s: setattr(s, "name", "a\n"), "service.name"),
    (lambda s: s.ClearField("frontends"), "service.frontends"),
    (lambda s: s.frontends.add(address="10.96.0.2"), "service.frontends[1].port"),
    (lambda s: s.frontends.add(address="10.96.0.2", port=65536), "service.frontends[1].port"),
    (lambda s: s.frontends.add(address="x", port=1), "service.frontends[1].address"),
    (lambda s: s.frontends.add(port=1), "service.frontends[1].address"),
    (lambda s: s.frontends.add(address="0.0.0.0", port=1), "service.frontends[1].address"),
    (lambda s: s.frontends.add(address="224.0.0.1", port=1), "service.frontends[1].address"),
    (lambda s: s.frontends.add(address="127.0.0.1", port=1), "service.frontends[1].address"),
    (lambda s: s.frontends.add(address="::ffff:10.0.0.1", port=1), "service.frontends[1].address"),
    (lambda s: s.frontends.add(address="fe80::1", port=1), "service.frontends[1].address"),
    (lambda s: s.frontends.add(address="2001:db8::1%eth0", port=1), "service.frontends[1].address"),
    (lambda s: s.frontends.add(address="169.254.42.1", port=1), "service.frontends[1].address"),
    (lambda s: s.frontends.add(address="10.0.0.1", port=9, port_last=8), "service.frontends[1].port_last"),
    (lambda s: s.frontends.add(address="10.0.0.1", port=9, node="a"), "service.frontends[1].node"),
    (lambda s: s.frontends.add(type=5, port=9), "service.frontends[1].node"),
    (lambda s: s.frontends.add(type=2, port=9, address="10.0.0.1"), "service.frontends[1].address"),
    (lambda s: s.frontends.add(type=9, port=9, address="10.0.0.1"), "service.frontends[1].type"),
    (lambda s: s.frontends.add(protocol=9, port=9, address="10.0.0.1"), "service.frontends[1].protocol"),
    (lambda s: s.frontends.add(address="10.96.0.1", port=80), "service.frontends[1]"),
    (lambda s: s.frontends.add(address="10.96.0.1", port=70, port_last=90), "service.frontends[1]"),
    (lambda s: s.frontends.add(address="10.96.0.1", port=9, port_last=65535), "service.frontends[1]"),
    (lambda s: s.frontends.add(address="10.0.0.1", port=80, protocol=3, port_last=81), "service.frontends[1].port_last"),
    (lambda s: s.frontends.add(address="10.0.0.1", port=80, protocol=3), "service.backends[0].port"),
    (lambda s: s.frontends.add(address="10.0.0.1", port=1, port_last=60000), "service.backends[0].port"),
    (lambda s: s.frontends.extend(pb.Frontend(address=f"10.1.0.{n}", port=1) for n in range(60)), "service.frontends"),
    (lambda s: s.frontends.extend(pb.Frontend(address=V6TEXT, port=n) for n in range(1, 1001)), "service.frontends"),
    (lambda s: (s.frontends.insert(0, pb.Frontend(type=2, port=99)), s.frontends.add(address="10.96.0.1", port=80)),
     "service.frontends[2]"),
    (lambda s: s.source_ranges.append("::ffff:10.0.0.0/104"), "service.source_ranges[0]"),
    (lambda s: s.backends.add(address="10.0.1.1", port=8080), "service.backends[1]"),
    (lambda s: s.backends.add(address="10.0.1.2"), "service.backends[1].port"),
    (lambda s: s.backends.add(address="", port=1), "service.backends[1].address"),
    (lambda s: s.backends.add(address="::1", port=1), "service.backends[1].address"),
    (lambda s: s.backends.add(address=V6TEXT, port=1, weight=65536), "service.backends[1].weight"),
    (lambda s: s.backends.add(address=V6TEXT, port=1, state=5), "service.backends[1].state"),
    (lambda s: s.backends.add(address=V6TEXT, port=1, zone="z" * 254), "service.backends[1].zone"),
    (lambda s: s.backends.add(address=V6TEXT, port=1, node="\0"), "service.backends[1].node"),
    (lambda s: s.backends.add(address=V6TEXT, port=1, cluster="\t"), "service.backends[1].cluster"),
    (lambda s: setattr(s, "algorithm", 3), "service.algorithm"),
    (lambda s: setattr(s, "maglev_size", 250), "service.maglev_size"),
    (lambda s: setattr(s, "maglev_size", 1000), "service.maglev_size"),
    (lambda s: setattr(s, "maglev_size", 131072), "service.maglev_size"),
    (lambda s: setattr(s, "affinity_timeout_s", 86401), "service.affinity_timeout_s"),
    (lambda s: setattr(s, "internal_traffic_policy", 3), "service.internal_traffic_policy"),
    (lambda s: setattr(s, "external_traffic_policy", 3), "service.external_traffic_policy"),
    (lambda s: setattr(s, "topology", 4), "service.topology"),
    (lambda s: setattr(s, "forwarding", 4), "service.forwarding"),
    (lambda s: setattr(s, "no_backend", 3), "service.no_backend"),
    (lambda s: setattr(s, "health_check_node_port", 70000), "service.health_check_node_port"),
    (lambda s: s.source_ranges.extend(["10.0.0.0/8", "10.0.0.1/8"]), "service.source_ranges[1]"),
    (lambda s: s.source_ranges.extend(["10.0.0.0/8", "10.0.0.0/8"]), "service.source_ranges[1]"),
    (lambda s: s.source_ranges.append("nonsense"), "service.source_ranges[0]"),
    (lambda s: s.annotations.update({"a": "b" * 254}), "service.annotations[a]"),
    (lambda s: s.annotations.update({"": "b"}), "service.annotations[]"),
    (lambda s: s.annotations.update({str(n): "" for n in range(65)}), "service.annotations"),
    (lambda s: s.health_check.SetInParent(), "service.health_check"),
    (lambda s: s.health_check.MergeFrom(pb.HealthCheck(tcp={}, interval_ms=99)), "service.health_check.interval_ms"),
    (lambda s: s.health_check.MergeFrom(pb.HealthCheck(tcp={}, timeout_ms=10001)), "service.health_check.timeout_ms"),
    (lambda s: s.health_check.MergeFrom(pb.HealthCheck(tcp={}, port=65536)), "service.health_check.port"),
    (lambda s: s.health_check.MergeFrom(pb.HealthCheck(tcp={}, healthy_after=101)), "service.health_check.healthy_after"),
    (lambda s: s.health_check.MergeFrom(pb.HealthCheck(tcp={}, unhealthy_after=101)), "service.health_check.unhealthy_after"),
    (lambda s: s.health_check.MergeFrom(pb.HealthCheck(http={"path": "x"})), "service.health_check.http.path"),
    (lambda s: s.health_check.MergeFrom(pb.HealthCheck(http={"path": "/\r\nx"})), "service.health_check.http.path"),
    (lambda s: s.health_check.MergeFrom(pb.HealthCheck(http={"host": "a b"})), "service.health_check.http.host"),
    (lambda s: s.health_check.MergeFrom(pb.HealthCheck(http={"statuses": ["600"]})), "service.health_check.http.statuses[0]"),
    (lambda s: s.health_check.MergeFrom(pb.HealthCheck(http={"statuses": ["9-2"]})), "service.health_check.http.statuses[0]"),
    (lambda s: s.health_check.MergeFrom(pb.HealthCheck(grpc={"service": "\n"})), "service.health_check.grpc.service"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "field"), WRONG)
def test_what_is_wrong_is_named(spoil: Callable[[pb.Service], Any], field: str) -> None:
    message = service()
    spoil(message)
    with pytest.raises(InvalidArgument) as caught:
        convert.service(message)
    assert caught.value.field == field
    assert caught.value.fix


ANYTHING = st.integers(0, 2**32 - 1).map(lambda number: str(IPv4Address(number)))
EDGES = ("0.0.0.0", "0.0.0.1", "127.0.0.1", "169.254.42.1", "223.255.255.255", "224.0.0.1", "255.255.255.255", "10.0.0.01",
         "10.0.0", "010.0.0.1", "10.0.0.1 ", "10.0.0.1\0", "1e1.0.0.1", "10.0.0.256", "\u0661.0.0.1", "", "fd00::1",
         "::1")  # fmt: skip


@given(st.one_of(ANYTHING, st.sampled_from(EDGES)))
def test_an_address_is_taken_or_refused_alike_by_the_short_way(text: str) -> None:
    try:
        wanted = fields._checked(text, "x")
    except InvalidArgument as refusal:
        with pytest.raises(InvalidArgument) as caught:
            fields.address(text, "x")
        assert str(caught.value) == str(refusal)
    else:
        assert fields.address(text, "x") == wanted


def test_a_backends_key_and_value_belong_together() -> None:
    made = Backend(BackendKey(ip_address("fd00::1"), 80), weight=3, node="n")
    value = keys.encode_backend(made)
    assert keys.read_backend("backends/shop%2Fweb/fd00::1:80", value) == ("shop/web", made)
    for wrong in ("backends/shop%2Fweb/fd00::1:81", "backends/shop%2Fweb/fd00:0::1:80", "backends/shop%2fweb/fd00::1:80",
                  "backends/shop/web/fd00::1:80", "fd00::1:80"):  # fmt: skip
        with pytest.raises(ValueError):
            keys.read_backend(wrong, value)


def test_ports_of_different_nodes_do_not_meet() -> None:
    def front(node: str, kind: int = pb.FRONTEND_TYPE_HOST_PORT) -> pb.Frontend:
        return pb.Frontend(type=pb.FrontendType.ValueType(kind), port=80, node=node)

    spec = convert.spec(service(frontends=[front("a"), front("b")], health_check_node_port=81))
    assert wanted(spec)[Place(ANY_V6, 0)] == (
        Claim(TCP, 80, 80, "a"),
        Claim(TCP, 80, 80, "b"),
        Claim(TCP, 81, 81),
    )
    for other in (front("a"), front("", pb.FRONTEND_TYPE_NODE_PORT)):
        with pytest.raises(InvalidArgument):
            convert.spec(service(frontends=[front("a"), other]))
    with pytest.raises(InvalidArgument) as caught:
        convert.spec(service(frontends=[front("a")], health_check_node_port=80))
    assert caught.value.field == "service.health_check_node_port"


def test_a_range_is_claimed_wherever_it_reaches() -> None:
    every = pb.Frontend(address="10.0.0.1", port=1, port_last=65535 - 8080)
    spec = convert.spec(service(frontends=[every]))
    places = [place.block for place in wanted(spec) if place.address == ip_address("10.0.0.1")]
    assert places == list(range((65535 - 8080) // BLOCK + 1))
    many = [pb.Frontend(address=f"10.0.0.{n}", port=1, port_last=40000) for n in range(2, 9)]
    with pytest.raises(InvalidArgument) as caught:
        convert.spec(service(frontends=many))
    assert caught.value.field == "service.frontends" and str(BLOCK) in str(caught.value)


CLAIM = st.builds(
    lambda proto, first, more, node: Claim(proto, first, first + more, node),
    st.sampled_from((TCP, SCTP)),
    st.integers(1, 12),
    st.sampled_from((0, 0, 1, 5)),
    st.sampled_from(("", "a", "b")),
)


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.lists(CLAIM, max_size=4)), max_size=6), CLAIM)
def test_claims_know_who_has_what(changes: list[tuple[str, list[Claim]]], asked: Claim) -> None:
    claims, model = Claims(), dict[str, list[Claim]]()
    for service, claimed in changes:
        claims.set(service, claimed)
        model[service] = claimed
    for me in "xyz":
        owners = {o for o, theirs in model.items() if o != me and any(c.meets(asked) for c in theirs)}
        assert (claims.taken(me, asked) in owners) if owners else (claims.taken(me, asked) == "")
    assert sorted(claims) == sorted((o, c) for o, theirs in model.items() for c in theirs)
    assert sorted(claims.copy()) == sorted(claims)
