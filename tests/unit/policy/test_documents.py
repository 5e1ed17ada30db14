"""Documents as people have them: what they allow, by the reference, and what is refused, by its path."""

from __future__ import annotations

import ipaddress
import json
import time
from itertools import pairwise
from typing import Any

import pytest
import yaml

from fibril.policy.v1 import policy_pb2 as pb
from services.common.errors import InvalidArgument
from services.policy import convert, documents
from services.policy.model import Direction, Policy
from tests.policy.reference import Who, decide

NAMESPACE_LABELS = "io.cilium.k8s.namespace.labels."


def read(text: str, namespace: str = "default") -> list[Policy]:
    found = documents.parse(text, namespace)
    policies = [convert.policy(each) for each in found]
    # What is stored is what was meant.
    assert [convert.policy(convert.policy_message(policy)) for policy in policies] == policies
    return policies


def pod(namespace: str = "default", address: str = "10.1.0.9", team: str = "", **labels: str) -> Who:
    own = {**labels, "io.kubernetes.pod.namespace": namespace, NAMESPACE_LABELS + "kubernetes.io/metadata.name": namespace}
    if team:
        own[NAMESPACE_LABELS + "team"] = team
    return Who(own, 1 << 20 | 77, ipaddress.ip_address(address))


WORLD = Who({"reserved:world": ""}, 2, ipaddress.ip_address("203.0.113.9"))
HOST = Who({"reserved:host": ""}, 1, ipaddress.ip_address("172.30.1.1"))


def ingress(policies: list[Policy], subject: Who, peer: Who, port: int = 80, proto: int = 6) -> bool:
    return decide(policies, subject, Direction.INGRESS, peer, proto, port).allowed


def egress(policies: list[Policy], subject: Who, peer: Who, port: int = 80, proto: int = 6) -> bool:
    return decide(policies, subject, Direction.EGRESS, peer, proto, port).allowed


def network_policy(spec: str, namespace: str = "shop") -> list[Policy]:
    return read(
        f"apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: p, namespace: {namespace}}}\nspec: {spec}"
    )


def cilium(spec: str, clusterwide: bool = False) -> list[Policy]:
    kind = "CiliumClusterwideNetworkPolicy" if clusterwide else "CiliumNetworkPolicy"
    where = "" if clusterwide else ", namespace: shop"
    return read(f"apiVersion: cilium.io/v2\nkind: {kind}\nmetadata: {{name: p{where}}}\nspec: {spec}")


# -- NetworkPolicy


def test_default_deny_and_allow_all() -> None:
    web, other = pod("shop", app="web"), pod("shop", app="other")
    deny = network_policy("{podSelector: {}, policyTypes: [Ingress]}")
    assert not ingress(deny, web, other) and egress(deny, web, other)
    assert ingress(deny, pod("elsewhere"), other)
    both = network_policy("{podSelector: {}, policyTypes: [Ingress, Egress]}")
    assert not ingress(both, web, other) and not egress(both, web, other)
    assert ingress(network_policy("{podSelector: {}, ingress: [{}]}"), web, WORLD)
    assert not egress(network_policy("{podSelector: {}, egress: [{to: [{podSelector: {}}]}]}"), web, WORLD)
    # Without policyTypes it is rules of egress that count, not the list.
    for nothing in ("[]", "null"):
        silent = network_policy(f"{{podSelector: {{}}, egress: {nothing}}}")
        assert egress(silent, web, WORLD) and not ingress(silent, web, other)


@pytest.mark.parametrize("empty", ["''", "null"])
def test_an_empty_namespace_is_the_default_one(empty: str) -> None:
    (found,) = network_policy("{podSelector: {}, ingress: [{from: [{podSelector: {}}]}]}", empty)
    assert found.key.namespace == "default"
    assert ingress([found], pod("default"), pod("default")) and not ingress([found], pod("default"), pod("x"))
    assert ingress([found], pod("x"), pod("y"))


def test_peers_and_ports_of_a_network_policy() -> None:
    policies = network_policy("""
      podSelector: {matchLabels: {app: db}}
      ingress:
      - from:
        - podSelector: {matchLabels: {app: web}}
        - namespaceSelector: {matchLabels: {team: ops}}
          podSelector: {matchExpressions: [{key: tool, operator: In, values: [backup, probe]}]}
        - ipBlock: {cidr: 203.0.113.0/24, except: [203.0.113.128/25]}
        ports: [{port: 5432}, {port: 8000, endPort: 8010, protocol: UDP}, {port: metrics}]
    """)
    db = Who({"app": "db", "io.kubernetes.pod.namespace": "shop"}, 1 << 20 | 1, None, {"metrics": [(6, 9100)]})
    web = pod("shop", app="web")
    assert ingress(policies, db, web, 5432) and not ingress(policies, db, web, 5433)
    assert ingress(policies, db, web, 9100) and not ingress(policies, db, web, 9100, 17)
    assert ingress(policies, db, web, 8010, 17) and not ingress(policies, db, web, 8011, 17)
    assert not ingress(policies, db, pod("else", app="web"), 5432)
    assert ingress(policies, db, pod("ops", team="ops", tool="probe"), 5432)
    assert not ingress(policies, db, pod("ops", team="ops", tool="x"), 5432)
    assert not ingress(policies, db, pod("shop", tool="probe"), 5432)
    assert ingress(policies, db, WORLD, 5432)
    assert not ingress(policies, db, Who(WORLD.labels, 2, ipaddress.ip_address("203.0.113.200")), 5432)
    assert ingress(policies, pod("shop", app="other"), WORLD)


def test_an_empty_namespace_selector_is_every_pod_and_nobody_else() -> None:
    policies = network_policy("{podSelector: {}, ingress: [{from: [{namespaceSelector: {}}]}]}")
    assert ingress(policies, pod("shop"), pod("anywhere")) and not ingress(policies, pod("shop"), WORLD)


def test_selectors_that_exclude_select_pods_only_and_of_their_own_namespace() -> None:
    """NotIn holds where the label is missing: with pods that have none, not with those who are no pods."""
    init, web = Who({"reserved:init": ""}, 5, ipaddress.ip_address("10.1.0.3")), pod("shop")
    not_prod = "matchExpressions: [{key: team, operator: NotIn, values: [prod]}]"
    by_namespace = network_policy(f"{{podSelector: {{}}, ingress: [{{from: [{{namespaceSelector: {{{not_prod}}}}}]}}]}}")
    assert ingress(by_namespace, web, pod("x")) and ingress(by_namespace, web, pod("x", team="ops"))
    assert not ingress(by_namespace, web, pod("x", team="prod")) and not ingress(by_namespace, web, init)
    by_pod = network_policy(
        f"{{podSelector: {{}}, ingress: [{{from: [{{namespaceSelector: {{}}, podSelector: {{{not_prod}}}}}]}}]}}"
    )
    assert ingress(by_pod, web, pod("x")) and not ingress(by_pod, web, init)
    own = network_policy(
        "{podSelector: {}, ingress: [{from: [{podSelector: {matchExpressions:"
        " [{key: io.kubernetes.pod.namespace, operator: Exists}]}}]}]}"
    )
    assert ingress(own, web, pod("shop")) and not ingress(own, web, pod("x"))


def test_a_prefix_whose_exceptions_cover_all_of_it_is_nobody() -> None:
    holes = "{cidr: 0.0.0.0/0, except: [0.0.0.0/1, 128.0.0.0/1]}"
    policies = network_policy(f"{{podSelector: {{}}, ingress: [{{from: [{{ipBlock: {holes}}}]}}]}}")
    assert not ingress(policies, pod("shop"), WORLD) and not ingress(policies, pod("shop"), pod("shop"))


def test_two_sources_of_one_label_are_two_conditions() -> None:
    found = convert.selector(pb.LabelSelector(match_labels={"k8s:app": "a", "any:app": "b"}), "at")
    assert not found.matches({"app": "a"}) and not found.matches({"app": "b"})


# -- Cilium


def test_cilium_selects_its_own_namespace_unless_it_names_another() -> None:
    policies = cilium("""
      endpointSelector: {matchLabels: {"k8s:app": web}}
      ingress:
      - fromEndpoints: [{matchLabels: {app: front}}]
      - fromEndpoints: [{matchLabels: {"k8s:io.kubernetes.pod.namespace": ops, "any:app": probe}}]
    """)
    web = pod("shop", app="web")
    assert ingress(policies, web, pod("shop", app="front")) and not ingress(policies, web, pod("ops", app="front"))
    assert ingress(policies, web, pod("ops", app="probe")) and ingress(policies, pod("ops", app="web"), WORLD)


def test_cilium_denies_win_and_switch_default_deny_on() -> None:
    policies = cilium("""
      endpointSelector: {}
      ingress: [{fromEntities: [cluster]}]
      ingressDeny: [{fromEndpoints: [{matchLabels: {app: bad}}], toPorts: [{ports: [{port: "22", protocol: TCP}]}]}]
    """)
    web = pod("shop", app="web")
    assert ingress(policies, web, pod("x", app="bad")) and not ingress(policies, web, pod("shop", app="bad"), 22)
    assert not ingress(policies, web, WORLD) and ingress(policies, web, HOST)
    only = cilium("{endpointSelector: {}, egressDeny: [{toCIDR: [203.0.113.0/24]}]}")
    assert not egress(only, web, pod("shop"))
    open_ = cilium(
        "{endpointSelector: {}, enableDefaultDeny: {egress: false}, egressDeny: [{toCIDR: [203.0.113.0/24]}]}"
    )
    assert egress(open_, web, pod("shop")) and not egress(open_, web, WORLD)


def test_cilium_sets_entities_services_nodes_and_icmp() -> None:
    policies = cilium("""
      endpointSelector: {}
      egress:
      - toCIDRSet: [{cidr: 10.0.0.0/8, except: [10.96.0.0/12]}]
        toPorts: [{ports: [{port: "443"}, {port: "8000", endPort: 8080, protocol: UDP}]}]
      - toEntities: [world]
        icmps: [{fields: [{type: EchoRequest}, {family: IPv6, type: 128}]}]
    """)
    web = pod("shop")
    assert egress(policies, web, pod("x", "10.1.2.3"), 443) and egress(policies, web, pod("x", "10.1.2.3"), 443, 17)
    assert not egress(policies, web, pod("x", "10.97.0.1"), 443)
    assert egress(policies, web, WORLD, 8, 1) and not egress(policies, web, WORLD, 0, 1)
    services = cilium("{endpointSelector: {}, egress: [{toServices: [{k8sService: {serviceName: db, namespace: x}}]}]}")
    address = ipaddress.ip_address("10.1.0.9")
    found = decide(services, web, Direction.EGRESS, pod("x"), 6, 80, services={"x/db": [address]})
    assert found.allowed and not egress(services, web, pod("x"))
    for servers in ("toEntities: [kube-apiserver]", "toEndpoints: [{matchLabels: {'reserved:kube-apiserver': ''}}]"):
        policies = cilium(f"{{endpointSelector: {{}}, egress: [{{{servers}}}]}}")
        found = decide(policies, web, Direction.EGRESS, pod("x"), 6, 6443, services={"default/kubernetes": [address]})
        assert found.allowed and not egress(policies, web, pod("x"), 6443)
        assert egress(policies, web, Who({"reserved:kube-apiserver": ""}, 7), 6443)
    nodes = cilium("{nodeSelector: {}, ingress: [{fromEntities: [world]}]}", clusterwide=True)
    assert nodes[0].rules[0].subject_is_node


def test_cilium_lists_that_are_empty_select_nobody() -> None:
    web = pod("shop")
    assert not ingress(cilium("{endpointSelector: {}, ingress: [{fromEndpoints: []}]}"), web, pod("shop"))
    assert ingress(cilium("{endpointSelector: {}, ingress: [{toPorts: [{ports: [{port: '80'}]}]}]}"), web, WORLD)


def test_a_list_of_cilium_that_is_empty_leaves_nobody_to_the_others() -> None:
    web = pod("shop")
    for action, allowed in (("ingress", False), ("ingressDeny", True)):
        policies = cilium(f"""
          endpointSelector: {{}}
          enableDefaultDeny: {{ingress: {"true" if action == "ingress" else "false"}}}
          {action}: [{{fromEndpoints: [], fromCIDR: [10.0.0.0/8]}}]
        """)
        assert ingress(policies, web, pod("shop")) is allowed


def test_an_empty_selector_of_a_clusterwide_policy_is_every_pod_with_a_namespace() -> None:
    init, web = Who({"reserved:init": ""}, 5, ipaddress.ip_address("10.1.0.3")), pod("shop")
    for peers in ("{}", "{matchExpressions: [{key: app, operator: NotIn, values: [bad]}]}"):
        found = cilium(f"{{endpointSelector: {{}}, ingress: [{{fromEndpoints: [{peers}]}}]}}", clusterwide=True)
        assert ingress(found, web, pod("x")) and not ingress(found, web, init) and not ingress(found, web, HOST)
    about_init = "{endpointSelector: {matchLabels: {'reserved:init': ''}}, ingress: [{fromEndpoints: [{}]}]}"
    assert ingress(cilium(about_init, clusterwide=True), init, init)


def test_nodes_are_selected_by_name() -> None:
    found = cilium("{nodeSelector: {matchLabels: {kubernetes.io/hostname: n1}}, ingress: [{}]}", clusterwide=True)
    assert found[0].rules[0].subject_is_node
    with pytest.raises(InvalidArgument) as refused:
        cilium("{nodeSelector: {matchLabels: {type: worker}}, ingress: [{}]}", clusterwide=True)
    assert refused.value.field == "spec.nodeSelector"
    with pytest.raises(InvalidArgument) as refused:
        cilium("{endpointSelector: {}, egressDeny: [{toNodes: [{matchExpressions: [{key: a, operator: Exists}]}]}]}")
    assert refused.value.field == "spec.egressDeny[0].toNodes[0]"
    rule = pb.Rule(peers=[pb.Peer(), pb.Peer(node=pb.NodePeer(nodes=pb.LabelSelector(match_labels={"a": "b"})))])
    with pytest.raises(InvalidArgument) as refused:
        convert.check_nodes(pb.Policy(rules=[rule]), "policies[0]")
    assert refused.value.field == "policies[0].rules[0].peers[1].node.nodes"


def test_an_entry_of_cilium_without_anything_only_switches_default_deny_on() -> None:
    """As Cilium's own examples deny by default: `egress: [{}]`."""
    web = pod("shop")
    for nothing in ("{}", "{toPorts: []}", "{fromEndpoints: null}"):
        closed = cilium(f"{{endpointSelector: {{}}, ingress: [{nothing}]}}")
        assert not ingress(closed, web, pod("shop")) and not ingress(closed, web, WORLD) and egress(closed, web, WORLD)
    denies = cilium("{endpointSelector: {}, ingress: [{fromEntities: [all]}], ingressDeny: [{}]}")
    assert ingress(denies, web, WORLD)
    other = cilium("{endpointSelector: {}, ingress: [], egress: [{}]}")
    assert ingress(other, web, WORLD) and not egress(other, web, WORLD)


def test_cilium_reaches_those_without_a_namespace_by_their_reserved_label() -> None:
    policies = cilium("{endpointSelector: {}, ingress: [{fromEndpoints: [{matchLabels: {'reserved:init': ''}}]}]}")
    init = Who({"reserved:init": ""}, 5, ipaddress.ip_address("10.1.0.3"))
    assert ingress(policies, pod("shop"), init) and not ingress(policies, pod("shop"), pod("shop"))


# -- policies of administrators


def test_tiers_and_priorities() -> None:
    text = """
apiVersion: policy.networking.k8s.io/v1alpha1
kind: AdminNetworkPolicy
metadata: {name: a}
spec:
  priority: 10
  subject: {namespaces: {}}
  ingress:
  - {name: monitor, action: Allow, from: [{namespaces: {matchLabels: {team: ops}}}], ports: [{portNumber: {port: 9100}}]}
  - {action: Pass, from: [{pods: {namespaceSelector: {}, podSelector: {matchLabels: {app: front}}}}]}
  - {action: Deny, from: [{namespaces: {}}], ports: [{portRange: {start: 9000, end: 9999}}]}
---
apiVersion: policy.networking.k8s.io/v1alpha1
kind: BaselineAdminNetworkPolicy
metadata: {name: default}
spec: {subject: {namespaces: {}}, ingress: [{action: Deny, from: [{namespaces: {}}]}]}
"""
    policies, web = read(text), pod("shop", app="web")
    assert ingress(policies, web, pod("ops", team="ops"), 9100)
    assert not ingress(policies, web, pod("ops", team="ops"), 9101)
    # Passed on, to the baseline.
    assert not ingress(policies, web, pod("shop", app="front"), 9100)
    named = policies + network_policy("{podSelector: {}, ingress: [{}]}")
    assert ingress(named, web, pod("shop", app="front"), 9100) and not ingress(named, web, pod("shop"), 9100)
    assert ingress(policies, web, WORLD, 9100)


@pytest.mark.parametrize(
    ("name", "action", "path"), [("default", "Pass", "spec.ingress[0].action"), ("other", "Deny", "metadata.name")]
)
def test_a_baseline_passes_nothing_on_and_is_the_only_one(name: str, action: str, path: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        read(
            f"apiVersion: policy.networking.k8s.io/v1alpha1\nkind: BaselineAdminNetworkPolicy\nmetadata: {{name: {name}}}\n"
            f"spec: {{subject: {{namespaces: {{}}}}, ingress: [{{action: {action}, from: [{{namespaces: {{}}}}]}}]}}"
        )
    assert refused.value.field == path


def test_a_cluster_network_policy() -> None:
    policies = read("""
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: c}
spec:
  tier: Admin
  priority: 1
  subject: {namespaces: {}}
  egress:
  - {action: Accept, to: [{networks: [203.0.113.0/24]}], protocols: [{tcp: {destinationPort: {number: 443}}}]}
  - {action: Deny, to: [{networks: [0.0.0.0/0]}], protocols: [{tcp: {}}, {udp: {destinationPort: {range: {start: 1, end: 9}}}}]}
""")
    web = pod("shop")
    assert egress(policies, web, WORLD, 443) and not egress(policies, web, WORLD, 80)
    assert not egress(policies, web, WORLD, 9, 17) and egress(policies, web, WORLD, 10, 17)


# -- what is refused


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ("{endpointSelector: {}, egress: [{toFQDNs: [{matchName: a.b}]}]}", "spec.egress[0].toFQDNs"),
        ("{endpointSelector: {}, ingress: [{toPorts: [{rules: {http: [{}]}}]}]}", "spec.ingress[0].toPorts[0].rules"),
        ("{endpointSelector: {}, ingress: [{authentication: {mode: required}}]}", "spec.ingress[0].authentication"),
        ("{endpointSelector: {}, ingress: [{fromEndpoint: [{}]}]}", "spec.ingress[0].fromEndpoint"),
        ("{endpointSelector: {}, ingress: [{fromCIDR: [10.0.0.1/8]}]}", "spec.ingress[0].fromCIDR[0]"),
        ("{endpointSelector: {}, ingress: [{fromCIDR: [10.0.0.0/255.0.0.0]}]}", "spec.ingress[0].fromCIDR[0]"),
        ("{endpointSelector: {}, ingress: [{fromCIDR: [10.0.0.0/0.255.255.255]}]}", "spec.ingress[0].fromCIDR[0]"),
        ("{endpointSelector: {}, ingress: [{fromCIDR: ['fe80::1%1/128']}]}", "spec.ingress[0].fromCIDR[0]"),
        ("{endpointSelector: {}, ingress: [{fromEntities: [moon]}]}", "spec.ingress[0].fromEntities"),
        ("{endpointSelector: {}, ingress: [{toPorts: [{ports: [{port: '70000'}]}]}]}", "spec.ingress[0].toPorts[0].ports[0]"),
        ("{endpointSelector: {matchLabels: {a: 1}}}", "spec.endpointSelector.matchLabels.a"),
        ("{endpointSelector: {}, nodeSelector: {}}", "spec"),
        ("{endpointSelector: [], ingress: []}", "spec.endpointSelector"),
        ("{nodeSelector: {}, ingress: [{}]}", "spec.nodeSelector"),
        ("{endpointSelector: {matchLabels: {'io.kubernetes.pod.namespace': other}}, ingress: [{}]}", "spec.endpointSelector"),
        ("{endpointSelector: {}, ingress: []}", "spec"),
        ("{endpointSelector: {}}", "spec"),
        ("{endpointSelector: {}, ingress: [{icmps: [{}]}]}", "spec.ingress[0].icmps[0].fields"),
        ("{endpointSelector: {}, ingress: [{icmps: [{fields: [{type: ²}]}]}]}", "spec.ingress[0].icmps[0].fields[0].type"),
        ("{endpointSelector: {}, ingress: [{toPorts: [{ports: []}]}]}", "spec.ingress[0].toPorts[0].ports"),
        ("{endpointSelector: {}, ingress: [{toPorts: [{ports: [{port: a_b}]}]}]}", "spec.ingress[0].toPorts[0].ports[0].port"),
        (
            "{endpointSelector: {}, egress: [{toCIDRSet: [{cidr: 10.0.0.0/8, except: [10.0.0.0/9, 11.0.0.0/9]}]}]}",
            "spec.egress[0].toCIDRSet[0].except[1]",
        ),
        ("{endpointSelector: {matchLabels: {'k8s:': x}}}", "spec.endpointSelector.matchLabels.k8s:"),
    ],
)
def test_what_is_not_understood_is_refused_by_its_path(spec: str, path: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        cilium(spec)
    assert refused.value.field.startswith(path) and "CiliumNetworkPolicy p" in refused.value.message


@pytest.mark.parametrize(
    ("port", "path"),
    [
        ("{port: 0}", "port"),
        ("{port: '²'}", "port"),
        ("{port: '٨٠'}", "port"),
        (f"{{port: '{'9' * 5000}'}}", "port"),
        ("{port: 80, endPort: '²'}", "endPort"),
        ("{port: -1}", "port"),
        ("{port: 1.5}", "port"),
    ],
)
def test_ports_are_numbers_of_ports(port: str, path: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        network_policy(f"{{podSelector: {{}}, ingress: [{{ports: [{port}]}}]}}")
    assert refused.value.field == f"spec.ingress[0].ports[0].{path}"


@pytest.mark.parametrize(
    ("rule", "path"),
    [
        ("{action: Allow, to: [{networks: []}]}", "to[0].networks"),
        ("{action: Allow, to: [{namespaces: {}}], ports: [{portNumber: {}}]}", "ports[0].portNumber.port"),
        ("{action: Allow, to: [{namespaces: {}}], ports: [{portNumber: {port: 0}}]}", "ports[0].portNumber.port"),
        ("{action: Deny, to: []}", "to"),
    ],
)
def test_what_an_administrators_rule_leaves_empty_is_not_everything(rule: str, path: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        read(
            "apiVersion: policy.networking.k8s.io/v1alpha1\nkind: AdminNetworkPolicy\nmetadata: {name: a}\n"
            f"spec: {{priority: 1, subject: {{namespaces: {{}}}}, egress: [{rule}]}}"
        )
    assert refused.value.field == f"spec.egress[0].{path}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a: b",
        "kind: NetworkPolicy",
        "- 1",
        "{",
        "apiVersion: networking.k8s.io/v2\nkind: NetworkPolicy\nmetadata: {name: x}\nspec: {podSelector: {}}",
        "apiVersion: v1\nkind: List\nitems: 3",
        "a: &x [1]\nb: *x",
        "a: 1\na: 2",
        "[" * 100_000,
        "{a: " * 5000,
        "? [1]\n: 2",
        "\0",
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: []\nspec: {podSelector: {}}",
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: 'a b'}\nspec: {podSelector: {}}",
        "a: 0x" + "f" * 5000,
        "a: 1" + ":1" * 100_000,
        "a: 1" + ":1" * 300 + ".5",
        "a: !!bool maybe",
        "a: !!timestamp never",
        "a: !!int ''",
    ],
)
def test_what_is_no_policy_is_refused_quickly(text: str) -> None:
    began = time.process_time()
    with pytest.raises(InvalidArgument):
        read(text)
    assert time.process_time() - began < 2


def test_aliases_are_refused_before_anything_is_made_of_them() -> None:
    """Each line has nine of the one before: a gigabyte, written out."""
    names = "abcdefghi"
    lines = [f"  {one}: &{one} [{', '.join([f'*{before}'] * 9)}]" for before, one in pairwise(names)]
    text = "\n".join(
        [
            "apiVersion: networking.k8s.io/v1",
            "kind: NetworkPolicy",
            "metadata:",
            "  name: p",
            f"  a: &a [{', '.join('x' * 9)}]",
            *lines,
            "spec: {podSelector: {}}",
        ]
    )
    with pytest.raises(InvalidArgument, match="line 6: aliases"):
        read(text)


def test_lists_json_and_twice_the_same() -> None:
    one: dict[str, Any] = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "a", "labels": {"x": "y"}, "resourceVersion": "7", "managedFields": [{}]},
        "spec": {"podSelector": {}},
        "status": {},
    }
    two = json.loads(json.dumps(one))
    two["metadata"]["name"] = "b"
    both = json.dumps({"apiVersion": "v1", "kind": "NetworkPolicyList", "items": [one, two]})
    assert [policy.key.name for policy in read(both, "shop")] == ["a", "b"]
    assert json.loads(read(json.dumps(one))[0].document)["metadata"]["name"] == "a"
    with pytest.raises(InvalidArgument, match="document 2"):
        read(yaml.safe_dump_all([one, one]))


def test_options_are_annotations() -> None:
    text = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: a, annotations: {fibril.io/reject: "true", fibril.io/keep-established: "true", other: x}}
spec: {podSelector: {}}
"""
    assert all(rule.reject and rule.keep_established for rule in read(text)[0].rules)
    with pytest.raises(InvalidArgument, match="reject"):
        read(text.replace('"true", fibril.io/keep', '"yes", fibril.io/keep'))
