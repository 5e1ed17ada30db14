"""The oracle of the other tests against what the documentation of Kubernetes and Cilium says of its examples."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address, ip_network

import pytest

from services.identity.numbers import Reserved, make
from services.policy.model import (
    ICMP,
    ICMPV6,
    NAMESPACE,
    NAMESPACE_NAME,
    SCTP,
    TCP,
    UDP,
    Action,
    CidrPeer,
    Direction,
    EndpointPeer,
    Entity,
    EntityPeer,
    Expression,
    Kind,
    NodePeer,
    Operator,
    Peer,
    Policy,
    PolicyKey,
    Port,
    Rule,
    Selector,
    ServicePeer,
    Tier,
)
from tests.policy.reference import Node, Who, decide

INGRESS, EGRESS = Direction
ALL = Selector()
WEB = Port(TCP, 80, 80)
A, B, ADMIN = (
    PolicyKey(Kind.FIBRIL, "", "a"),
    PolicyKey(Kind.FIBRIL, "", "b"),
    PolicyKey(Kind.ADMIN, "", "a"),
)
PROJECT = "io.cilium.k8s.namespace.labels.project"


def pod(address: str = "10.1.0.9", named: Mapping[str, tuple[int, int]] | None = None, **labels: str) -> Who:
    """Labels as in `app="db"`; `ns` is the namespace."""
    space = labels.pop("ns", "")
    own = {**labels, **({NAMESPACE: space} if space else {})}
    return Who(own, make(1, 7), ip_address(address), {name: [port] for name, port in (named or {}).items()})


def reserved(which: Reserved, address: str = "192.168.7.2") -> Who:
    return Who({which.label: ""}, int(which), ip_address(address))


WORLD = reserved(Reserved.WORLD, "192.0.2.1")
LOCAL_CIDR = Who({"cidr:192.0.2.0/24": ""}, make(4095, 3), ip_address("192.0.2.1"))


def of(key: PolicyKey, *rules: Rule) -> Policy:
    return Policy(key, rules)


def rule(direction: Direction = INGRESS, action: Action = Action.ALLOW, **more: object) -> Rule:
    return Rule(more.pop("subject", ALL), direction, action, **more)  # type: ignore[arg-type]


def labelled(**labels: str) -> EndpointPeer:
    space = labels.pop("ns", None)
    return EndpointPeer(Selector.of({**labels, **({NAMESPACE: space} if space else {})}))


def says(
    policies: list[Policy],
    subject: Who,
    peer: Who,
    proto: int = TCP,
    port: int = 80,
    direction: Direction = INGRESS,
    **more: object,
) -> tuple[bool, tuple[PolicyKey, int] | None]:
    made = decide(policies, subject, direction, peer, proto, port, **more)  # type: ignore[arg-type]
    return made.allowed, made.deciding


# ---- Kubernetes: network policies -------------------------------------------------------------------------------
def test_without_policies_all_is_allowed() -> None:
    made = decide([], pod(), INGRESS, WORLD, TCP, 80)
    assert made.allowed and made.deciding is None and not made.enforced


def test_default_deny_of_all_ingress() -> None:
    """podSelector: {}, policyTypes: [Ingress]."""
    policy = of(A, rule(subject=Selector.of({NAMESPACE: "shop"}), peers=(), default_deny=True))
    made = decide([policy], pod(ns="shop"), INGRESS, pod(ns="shop"), TCP, 80)
    assert not made.allowed and made.deciding is None and made.enforced
    assert says([policy], pod(ns="shop"), WORLD, direction=EGRESS) == (True, None)
    assert says([policy], pod(ns="other"), WORLD) == (True, None)


def test_allow_all_ingress_wins_over_default_deny() -> None:
    """ingress: [{}]."""
    deny = of(A, rule(peers=(), default_deny=True))
    allow = of(B, rule(default_deny=True))
    assert says([deny, allow], pod(), WORLD, 47, 0) == (True, (B, 0))


def test_network_policy_of_the_documentation() -> None:
    """test-network-policy: to db from a block with a hole, a project's namespaces and the frontends of its namespace."""
    db = Selector.of({"role": "db", NAMESPACE: "default"})
    redis = (Port(TCP, 6379, 6379),)
    peers: tuple[Peer, ...] = (
        CidrPeer(ip_network("172.17.0.0/16"), (ip_network("172.17.1.0/24"),)),
        EndpointPeer(Selector.of({PROJECT: "myproject"})),
        labelled(role="frontend", ns="default"),
    )
    policy = of(
        A,
        rule(subject=db, peers=peers, ports=redis, default_deny=True),
        rule(
            EGRESS,
            subject=db,
            peers=(CidrPeer(ip_network("10.0.0.0/24")),),
            ports=(Port(TCP, 5978, 5978),),
            default_deny=True,
        ),
    )
    server = pod(role="db")

    def may(peer: Who, port: int = 6379, direction: Direction = INGRESS) -> bool:
        allowed, deciding = says([policy], server, peer, TCP, port, direction)
        assert deciding == ((A, int(direction is EGRESS)) if allowed else None)
        return allowed

    assert may(reserved(Reserved.WORLD, "172.17.0.1"))
    assert not may(reserved(Reserved.WORLD, "172.17.1.1"))
    assert not may(reserved(Reserved.WORLD, "172.17.0.1"), 6380)
    assert may(pod(role="frontend"))
    assert not may(pod(role="frontend", ns="shop"))
    assert may(pod(ns="shop", **{PROJECT: "myproject"}))
    # A pod in the block is of the block.
    assert may(pod("172.17.9.9", ns="shop"))
    assert may(reserved(Reserved.WORLD, "10.0.0.7"), 5978, EGRESS)
    assert not may(reserved(Reserved.WORLD, "10.0.1.7"), 5978, EGRESS)


def test_one_peer_with_both_selectors_is_not_two_peers() -> None:
    both = of(A, rule(peers=(labelled(user="alice", role="client"),), default_deny=True))
    either = of(A, rule(peers=(labelled(user="alice"), labelled(role="client")), default_deny=True))
    assert says([both], pod(), pod(user="alice")) == (False, None)
    assert says([both], pod(), pod(user="alice", role="client")) == (True, (A, 0))
    assert says([either], pod(), pod(user="alice")) == (True, (A, 0))


@pytest.mark.parametrize(
    ("port", "allowed"), [(31999, False), (32000, True), (32768, True), (32769, False), (0, False)]
)
def test_range_of_ports_has_both_its_ends(port: int, allowed: bool) -> None:
    policy = of(A, rule(EGRESS, ports=(Port(TCP, 32000, 32768),), default_deny=True))
    assert says([policy], pod(), WORLD, TCP, port, EGRESS) == (allowed, (A, 0) if allowed else None)
    assert says([policy], pod(), WORLD, UDP, port, EGRESS) == (False, None)


def test_policies_add_up() -> None:
    first = of(A, rule(peers=(labelled(app="x"),), default_deny=True))
    second = of(B, rule(peers=(labelled(app="y"),), default_deny=True))
    assert says([second, first], pod(), pod(app="x")) == (True, (A, 0))
    assert says([second, first], pod(), pod(app="y")) == (True, (B, 0))
    assert says([second, first], pod(), pod(app="z")) == (False, None)


def test_namespace_by_its_name() -> None:
    policy = of(A, rule(peers=(EndpointPeer(Selector.of({NAMESPACE_NAME: "default"})),), default_deny=True))
    assert says([policy], pod(), pod(app="x")) == (True, (A, 0))
    assert says([policy], pod(), pod(ns="shop")) == (False, None)


def test_names_of_ports_are_the_servers() -> None:
    ingress = of(A, rule(ports=(Port(TCP, name="http"),), default_deny=True))
    egress = of(A, rule(EGRESS, ports=(Port(TCP, name="http"),), default_deny=True))
    server = pod(named={"http": (TCP, 8080), "dns": (UDP, 53)})
    client = pod(named={"http": (TCP, 80)})
    assert says([ingress], server, client, TCP, 8080) == (True, (A, 0))
    assert says([ingress], server, client, TCP, 80) == (False, None)
    assert says([egress], client, server, TCP, 8080, EGRESS) == (True, (A, 0))
    assert says([egress], client, server, TCP, 80, EGRESS) == (False, None)
    assert says([egress], client, WORLD, TCP, 8080, EGRESS) == (False, None)
    dns = of(A, rule(ports=(Port(TCP, name="dns"),), default_deny=True))
    assert says([dns], server, client, UDP, 53) == (False, None)
    assert says([dns], server, client, TCP, 53) == (False, None)
    any_dns = of(A, rule(ports=(Port(0, name="dns"),), default_deny=True))
    assert says([any_dns], server, client, UDP, 53) == (True, (A, 0))


# ---- Cilium -----------------------------------------------------------------------------------------------------
def test_deny_wins_over_allow() -> None:
    """deny-wins: fromEntities all allowed, but not those with a label."""
    allow = of(A, rule(peers=(EntityPeer(Entity.ALL),), default_deny=True))
    deny = of(B, rule(action=Action.DENY, peers=(labelled(bad="yes"),), default_deny=True))
    assert says([allow, deny], pod(), pod(bad="yes")) == (False, (B, 0))
    assert says([allow, deny], pod(), pod()) == (True, (A, 0))


def test_rules_without_default_deny_leave_the_rest_alone() -> None:
    """enableDefaultDeny: {ingress: false}."""
    policy = of(A, rule(action=Action.DENY, peers=(labelled(bad="yes"),)), rule(peers=(labelled(app="x"),)))
    assert says([policy], pod(), pod(bad="yes")) == (False, (A, 0))
    assert says([policy], pod(), pod(app="x")) == (True, (A, 1))
    made = decide([policy], pod(), INGRESS, pod(), TCP, 80)
    assert made.allowed and made.deciding is None and made.enforced


@pytest.mark.parametrize(
    ("who", "entities"),
    [
        (pod(), {Entity.CLUSTER}),
        (WORLD, {Entity.WORLD}),
        (LOCAL_CIDR, {Entity.WORLD}),
        (reserved(Reserved.HOST), {Entity.CLUSTER, Entity.HOST}),
        (reserved(Reserved.REMOTE_NODE), {Entity.CLUSTER, Entity.REMOTE_NODE}),
        (reserved(Reserved.INIT), {Entity.CLUSTER, Entity.INIT}),
        (reserved(Reserved.HEALTH), {Entity.CLUSTER, Entity.HEALTH}),
        (reserved(Reserved.UNMANAGED), {Entity.CLUSTER, Entity.UNMANAGED}),
        (reserved(Reserved.KUBE_APISERVER), {Entity.CLUSTER, Entity.KUBE_APISERVER}),
        (reserved(Reserved.INGRESS), {Entity.CLUSTER}),
    ],
)
def test_entities(who: Who, entities: set[Entity]) -> None:
    for entity in Entity:
        policy = of(A, rule(peers=(EntityPeer(entity),), default_deny=True))
        allowed = entity in entities | {Entity.ALL}
        assert says([policy], pod(), who) == (allowed, (A, 0) if allowed else None), entity


@pytest.mark.parametrize(
    ("who", "allowed"),
    [
        (pod(), True),
        (reserved(Reserved.INIT), True),
        (reserved(Reserved.HEALTH), True),
        (reserved(Reserved.HOST), False),
        (reserved(Reserved.REMOTE_NODE), False),
        (reserved(Reserved.KUBE_APISERVER), False),
        (WORLD, False),
        (LOCAL_CIDR, False),
    ],
)
def test_empty_selector_is_all_endpoints(who: Who, allowed: bool) -> None:
    """fromEndpoints: [{}]: "all endpoints", nobody outside and no host."""
    policy = of(A, rule(peers=(EndpointPeer(ALL),), default_deny=True))
    assert says([policy], pod(), who) == (allowed, (A, 0) if allowed else None)
    without = EndpointPeer(Selector.of({}, Expression("app", Operator.NOT_IN, ("x",))))
    assert says([of(A, rule(peers=(without,), default_deny=True))], pod(), who)[0] is allowed


def test_reserved_labels_select_by_name() -> None:
    peer = EndpointPeer(Selector.of({"reserved:remote-node": ""}))
    exists = EndpointPeer(Selector.of({}, Expression("reserved:remote-node", Operator.EXISTS)))
    for each in (peer, exists):
        policy = of(A, rule(peers=(each,), default_deny=True))
        assert says([policy], pod(), reserved(Reserved.REMOTE_NODE)) == (True, (A, 0))
        assert says([policy], pod(), reserved(Reserved.HOST)) == (False, None)
        assert says([policy], pod(), pod()) == (False, None)


def test_nobody_is_not_everybody() -> None:
    """fromEndpoints: [] selects no endpoint; a rule without peers all."""
    assert says([of(A, rule(peers=(), default_deny=True))], pod(), pod()) == (False, None)
    assert says([of(A, rule(peers=None, default_deny=True))], pod(), pod()) == (True, (A, 0))


def test_cidr_set_with_holes() -> None:
    """toCIDR: 20.1.1.1/32; toCIDRSet: 10.0.0.0/8 except 10.96.0.0/12."""
    policy = of(
        A,
        rule(
            EGRESS,
            peers=(
                CidrPeer(ip_network("20.1.1.1/32")),
                CidrPeer(ip_network("10.0.0.0/8"), (ip_network("10.96.0.0/12"),)),
            ),
            default_deny=True,
        ),
    )
    for address, allowed in (
        ("20.1.1.1", True),
        ("20.1.1.2", False),
        ("10.95.255.255", True),
        ("10.96.0.0", False),
        ("10.111.255.255", False),
        ("10.112.0.0", True),
        ("2001:db8::1", False),
    ):
        peer = reserved(Reserved.WORLD, address)
        assert says([policy], pod(), peer, direction=EGRESS) == (allowed, (A, 0) if allowed else None), (
            address
        )
    assert says([policy], pod(), Who({}, make(1, 9)), direction=EGRESS) == (False, None)


def test_hole_of_one_prefix_is_in_another() -> None:
    wide = CidrPeer(ip_network("10.0.0.0/8"), (ip_network("10.96.0.0/12"),))
    policy = of(A, rule(peers=(wide, CidrPeer(ip_network("10.96.1.0/24"))), default_deny=True))
    assert says([policy], pod(), pod("10.96.1.1")) == (True, (A, 0))
    assert says([policy], pod(), pod("10.96.2.1")) == (False, None)


def test_icmp_by_type() -> None:
    """icmps: fields: [{type: 8, family: IPv4}]."""
    policy = of(A, rule(ports=(Port(ICMP, 8, 8),), default_deny=True))
    assert says([policy], pod(), WORLD, ICMP, 8) == (True, (A, 0))
    assert says([policy], pod(), WORLD, ICMP, 13) == (False, None)
    assert says([policy], pod(), WORLD, ICMPV6, 8) == (False, None)
    assert says([policy], pod(), WORLD, TCP, 8) == (False, None)
    every = of(A, rule(ports=(Port(ICMPV6, 0, 255),), default_deny=True))
    assert says([every], pod(), WORLD, ICMPV6, 255) == (True, (A, 0))


def test_any_protocol_is_those_with_ports() -> None:
    policy = of(A, rule(ports=(Port(0, 80, 80),), default_deny=True))
    for proto, allowed in ((TCP, True), (UDP, True), (SCTP, True), (ICMP, False), (47, False), (50, False)):
        assert says([policy], pod(), WORLD, proto, 80)[0] is allowed
    every = of(A, rule(ports=(Port(0),), default_deny=True))
    assert says([every], pod(), WORLD, TCP, 0) == (True, (A, 0))
    assert says([every], pod(), WORLD, 47, 0) == (False, None)
    assert says([of(A, rule(default_deny=True))], pod(), WORLD, 47, 0) == (True, (A, 0))


def test_services_and_nodes_are_their_addresses() -> None:
    services = {"shop/db": [ip_address("10.1.0.5"), ip_address("192.0.2.7")]}
    nodes = {
        "n1": Node({"kubernetes.io/hostname": "n1", "zone": "a"}, [ip_address("192.168.7.1")]),
        "n2": Node({"kubernetes.io/hostname": "n2", "zone": "b"}, [ip_address("192.168.7.2")]),
    }
    policy = of(
        A,
        rule(EGRESS, peers=(ServicePeer("shop/db"),), default_deny=True),
        rule(EGRESS, peers=(NodePeer(Selector.of({"zone": "b"})),)),
    )

    def to(peer: Who) -> tuple[bool, tuple[PolicyKey, int] | None]:
        return says([policy], pod(), peer, direction=EGRESS, services=services, nodes=nodes)

    assert to(pod("10.1.0.5")) == (True, (A, 0))
    assert to(reserved(Reserved.WORLD, "192.0.2.7")) == (True, (A, 0))
    assert to(pod("10.1.0.6")) == (False, None)
    assert to(reserved(Reserved.REMOTE_NODE, "192.168.7.2")) == (True, (A, 1))
    assert to(reserved(Reserved.HOST, "192.168.7.1")) == (False, None)


def test_policies_of_hosts_are_of_hosts_only() -> None:
    """nodeSelector: {type: worker}."""
    host = Who({"type": "worker"}, int(Reserved.HOST), ip_address("192.168.7.1"), is_node=True)
    other = Who({"type": "control"}, int(Reserved.HOST), ip_address("192.168.7.1"), is_node=True)
    node = of(
        A, rule(subject=Selector.of({"type": "worker"}), subject_is_node=True, peers=(), default_deny=True)
    )
    pods = of(B, rule(peers=(), default_deny=True))
    assert says([node], host, WORLD) == (False, None)
    assert says([node], other, WORLD) == (True, None)
    assert says([node], pod(type="worker"), WORLD) == (True, None)
    assert says([pods], host, WORLD) == (True, None)


# ---- tiers ------------------------------------------------------------------------------------------------------
def test_admin_rules_by_priority_then_policy_then_place() -> None:
    def admin(action: Action, priority: int, **more: object) -> Rule:
        return rule(action=action, tier=Tier.ADMIN, priority=priority, **more)

    low = of(A, admin(Action.ALLOW, 20), admin(Action.DENY, 10, ports=(WEB,)))
    assert says([low], pod(), WORLD) == (False, (A, 1))
    assert says([low], pod(), WORLD, TCP, 81) == (True, (A, 0))
    tie = [of(B, admin(Action.DENY, 5)), of(A, admin(Action.ALLOW, 5), admin(Action.DENY, 5))]
    assert says(tie, pod(), WORLD) == (True, (A, 0))
    by_kind = [of(ADMIN, admin(Action.ALLOW, 5)), of(B, admin(Action.DENY, 5))]
    assert says(by_kind, pod(), WORLD) == (False, (B, 0))


def test_admin_comes_before_network_policies() -> None:
    allow = of(ADMIN, rule(tier=Tier.ADMIN))
    closed = of(A, rule(peers=(), default_deny=True), rule(action=Action.DENY))
    assert says([closed, allow], pod(), WORLD) == (True, (ADMIN, 0))


def test_pass_leaves_it_to_network_policies_and_those_to_baseline() -> None:
    admin = of(
        ADMIN,
        rule(action=Action.PASS, tier=Tier.ADMIN, priority=1, ports=(WEB,)),
        rule(action=Action.DENY, tier=Tier.ADMIN, priority=2),
    )
    normal = of(A, rule(peers=(labelled(app="x"),), default_deny=True))
    base = of(B, rule(action=Action.DENY, tier=Tier.BASELINE))
    assert says([admin, normal, base], pod(), WORLD, TCP, 81) == (False, (ADMIN, 1))
    assert says([admin, normal, base], pod(), pod(app="x")) == (True, (A, 0))
    assert says([admin, normal, base], pod(), WORLD) == (False, None)
    assert says([admin, base], pod(), WORLD) == (False, (B, 0))
    assert says([admin], pod(), WORLD) == (True, None)


def test_baseline_by_priority_and_after_allowing_network_policies() -> None:
    base = of(
        B,
        rule(action=Action.DENY, tier=Tier.BASELINE, priority=9),
        rule(tier=Tier.BASELINE, priority=3, ports=(WEB,)),
    )
    allow = of(A, rule(ports=(Port(TCP, 81, 81),)))
    assert says([base, allow], pod(), WORLD) == (True, (B, 1))
    assert says([base, allow], pod(), WORLD, TCP, 81) == (True, (A, 0))
    assert says([base, allow], pod(), WORLD, TCP, 82) == (False, (B, 0))


def test_refusals_say_how() -> None:
    policy = of(
        A,
        rule(ports=(WEB,), default_deny=True, reject=True),
        rule(action=Action.DENY, ports=(Port(TCP, 81, 81),), keep_established=True),
    )
    default = decide([policy], pod(), INGRESS, WORLD, TCP, 1)
    assert (default.allowed, default.reject, default.keep) == (False, True, False)
    denied = decide([policy], pod(), INGRESS, WORLD, TCP, 81)
    assert (denied.allowed, denied.reject, denied.keep) == (False, False, True)
