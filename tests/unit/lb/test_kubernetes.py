"""Kubernetes' objects as services, and slices applied alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import yaml

from fibril.lb.v1 import lb_pb2 as pb
from services.common.errors import FailedPrecondition, InvalidArgument
from services.lb import convert, kubernetes

SERVICE: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "web", "namespace": "shop", "labels": {"a": "b"}},
    "spec": {
        "type": "LoadBalancer",
        "clusterIP": "10.96.0.1",
        "clusterIPs": ["10.96.0.1", "fd00::1"],
        "ipFamilies": ["IPv4", "IPv6"],
        "externalIPs": ["192.0.2.7"],
        "selector": {"app": "web"},
        "sessionAffinity": "ClientIP",
        "externalTrafficPolicy": "Local",
        "healthCheckNodePort": 31000,
        "trafficDistribution": "PreferSameNode",
        "loadBalancerSourceRanges": ["198.51.100.0/24"],
        "ports": [
            {"name": "http", "port": 80, "targetPort": "web", "nodePort": 30080},
            {"name": "dns", "port": 53, "protocol": "UDP"},
        ],
    },
    "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.9"}]}},
}


def slice_of(
    name: str, *endpoints: dict[str, Any], ports: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": ports or [{"name": "http", "port": 8080}, {"name": "dns", "port": 5353, "protocol": "UDP"}],
        "endpoints": list(endpoints),
    }


def endpoint(address: str, **more: Any) -> dict[str, Any]:
    return {"addresses": [address], **more}


def parsed(*docs: Any) -> kubernetes.Parsed:
    return kubernetes.parse(yaml.safe_dump_all(docs))


def backends(service: pb.Service) -> dict[str, str]:
    return {
        f"{b.address}:{b.port}": pb.BackendState.Name(b.state).removeprefix("BACKEND_STATE_")
        for b in service.backends
    }


def test_a_service_is_one_of_ours_a_port() -> None:
    wanted = kubernetes.merge(
        parsed(SERVICE, slice_of("web-1", endpoint("10.0.0.1", nodeName="n1", zone="z1"))), {}
    )
    assert sorted(wanted) == ["shop/web:dns", "shop/web:http"]
    http = wanted["shop/web:http"]
    fronts = {
        (f.address, f.port): pb.FrontendType.Name(f.type).removeprefix("FRONTEND_TYPE_")
        for f in http.frontends
    }
    assert fronts == {
        ("10.96.0.1", 80): "CLUSTER_IP", ("fd00::1", 80): "CLUSTER_IP", ("192.0.2.7", 80): "EXTERNAL_IP",
        ("203.0.113.9", 80): "LOAD_BALANCER", ("0.0.0.0", 30080): "NODE_PORT", ("::", 30080): "NODE_PORT",
    }  # fmt: skip
    assert (http.affinity_timeout_s, http.topology) == (10800, pb.TOPOLOGY_SAME_NODE)
    assert http.external_traffic_policy == pb.TRAFFIC_POLICY_LOCAL
    assert (http.health_check_node_port, wanted["shop/web:dns"].health_check_node_port) == (31000, 0)
    assert list(http.source_ranges) == ["198.51.100.0/24"]
    assert backends(http) == {"10.0.0.1:8080": "ACTIVE"}
    assert (http.backends[0].node, http.backends[0].zone) == ("n1", "z1")
    dns = wanted["shop/web:dns"]
    assert backends(dns) == {"10.0.0.1:5353": "ACTIVE"} and {f.protocol for f in dns.frontends} == {
        pb.PROTOCOL_UDP
    }
    for service in wanted.values():
        convert.service(service)


@pytest.mark.parametrize(
    ("conditions", "state"),
    [
        ({}, "ACTIVE"),
        ({"ready": True, "serving": True, "terminating": False}, "ACTIVE"),
        ({"ready": False, "serving": True, "terminating": True}, "TERMINATING"),
        ({"ready": False, "serving": False, "terminating": True}, "QUARANTINED"),
        ({"ready": False}, "QUARANTINED"),
    ],
)
def test_conditions_are_states(conditions: dict[str, bool], state: str) -> None:
    wanted = kubernetes.merge(parsed(SERVICE, slice_of("s", endpoint("10.0.0.1", conditions=conditions))), {})
    assert backends(wanted["shop/web:http"]) == {"10.0.0.1:8080": state}


def test_a_slice_alone_replaces_its_own_backends() -> None:
    first = kubernetes.merge(
        parsed(
            SERVICE,
            slice_of("a", endpoint("10.0.0.1"), endpoint("10.0.0.2")),
            slice_of("b", endpoint("10.0.0.3")),
        ),
        {},
    )
    stored = first
    again = kubernetes.merge(parsed(slice_of("a", endpoint("10.0.0.2"), endpoint("10.0.0.9"))), stored)
    assert backends(again["shop/web:http"]).keys() == {"10.0.0.2:8080", "10.0.0.9:8080", "10.0.0.3:8080"}
    # The Service alone keeps what slices have said.
    alone = kubernetes.merge(parsed(SERVICE), again)
    assert backends(alone["shop/web:http"]) == backends(again["shop/web:http"])
    # One that moves from slice to slice is there once.
    moved = kubernetes.merge(
        parsed(slice_of("b", endpoint("10.0.0.3"), endpoint("10.0.0.2", conditions={"ready": False}))), again
    )
    assert backends(moved["shop/web:http"])["10.0.0.2:8080"] == "ACTIVE"
    assert len(moved["shop/web:http"].backends) == 3


def test_lists_and_endpoints_are_taken() -> None:
    older = {
        "apiVersion": "v1", "kind": "Endpoints", "metadata": {"name": "web", "namespace": "shop"},
        "subsets": [{"addresses": [{"ip": "10.0.0.1"}], "notReadyAddresses": [{"ip": "10.0.0.2"}],
                     "ports": [{"name": "http", "port": 8080}]}],
    }  # fmt: skip
    wanted = kubernetes.merge(parsed({"apiVersion": "v1", "kind": "List", "items": [SERVICE, older]}), {})
    assert backends(wanted["shop/web:http"]) == {"10.0.0.1:8080": "ACTIVE", "10.0.0.2:8080": "QUARANTINED"}
    assert backends(wanted["shop/web:dns"]) == {}


def test_what_has_no_address_is_left_out_and_said() -> None:
    headless = {**SERVICE, "spec": {"clusterIP": "None", "ports": [{"port": 80}]}}
    external = {
        **SERVICE,
        "metadata": {"name": "x"},
        "spec": {"type": "ExternalName", "externalName": "a.example"},
    }
    found = parsed(headless, external)
    assert not found.services and len(found.notes) == 2 and "headless" in found.notes[0]


def test_what_goes_with_a_service_that_is_left_out_is_left_out_too() -> None:
    """As all of a cluster's objects come in one file."""
    headless = {**SERVICE, "spec": {"clusterIP": "None", "ports": [{"port": 80}]}}
    assert kubernetes.merge(parsed(headless, slice_of("a", endpoint("10.0.0.1"))), {}) == {}
    others = {**SERVICE, "metadata": {**SERVICE["metadata"], "labels": {"service.kubernetes.io/service-proxy-name": "x"}}}
    found = parsed(others, slice_of("a", endpoint("10.0.0.1")))
    assert kubernetes.merge(found, {}) == {} and "to be served by x" in found.notes[0]


def test_ports_that_a_service_has_no_more_go() -> None:
    stored = kubernetes.merge(parsed(SERVICE, slice_of("a", endpoint("10.0.0.1"))), {})
    own = pb.Service(name="shop/web:mine")
    stored["shop/web:mine"], stored["shop/webs:http"] = own, _renamed(stored["shop/web:http"], "shop/webs:http")
    fewer = {**SERVICE, "spec": {**SERVICE["spec"], "ports": [{"name": "web", "port": 80}]}}
    found = parsed(fewer, slice_of("a", endpoint("10.0.0.2")))
    assert kubernetes.gone(found, stored) == ["shop/web:dns", "shop/web:http"]
    # A slice does not bring them back.
    assert kubernetes.merge(found, stored).keys() == {"shop/web:web", "shop/web:mine"}
    headless = parsed({**SERVICE, "spec": {"clusterIP": "None", "ports": [{"port": 80}]}})
    assert kubernetes.gone(headless, stored) == ["shop/web:dns", "shop/web:http"]
    # Who speaks of slices alone does not speak of ports.
    assert kubernetes.gone(parsed(slice_of("a", endpoint("10.0.0.1"))), stored) == []


def _renamed(service: pb.Service, name: str) -> pb.Service:
    made = pb.Service()
    made.CopyFrom(service)
    made.name = name
    return made


def test_many_services_are_merged_in_a_moment() -> None:
    """Each is looked at once: if each were compared with each, this would take minutes."""
    docs = [{**SERVICE, "metadata": {"name": f"s{n}", "namespace": "shop"}} for n in range(3000)]
    slices = [slice_of(f"s{n}-a", endpoint("10.0.0.1")) for n in range(3000)]
    found = kubernetes.Parsed()
    for number, doc in enumerate(docs):
        kubernetes._document(found, doc, f"documents[{number}]")
        each = kubernetes._slice(slices[number], "x")
        found.slices.append(replace(each, service=f"shop/s{number}"))
    assert len(kubernetes.merge(found, {})) == 6000


def test_own_form() -> None:
    found = parsed(
        {"name": "a", "frontends": [{"address": "10.96.0.1", "port": 80}], "algorithm": "ALGORITHM_MAGLEV"}
    )
    assert found.own["a"].algorithm == pb.ALGORITHM_MAGLEV


@pytest.mark.parametrize(
    ("doc", "field"),
    [
        ({**SERVICE, "spec": {**SERVICE["spec"], "newThing": 1}}, "documents[0].spec.newThing"),
        ({**SERVICE, "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 0}]}}, "documents[0].spec.ports[0].port"),
        ({**SERVICE, "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80, "protocol": "X"}]}},
         "documents[0].spec.ports[0].protocol"),
        ({**SERVICE, "spec": {"clusterIP": "10.96.0.1", "ports": []}}, "documents[0].spec.ports"),
        ({**SERVICE, "status": {}, "spec": {"ports": [{"port": 80}]}}, "documents[0].spec.clusterIP"),
        ({**SERVICE, "kind": "Ingress"}, "documents[0].kind"),
        ({**SERVICE, "metadata": {}}, "documents[0].metadata.name"),
        ({**slice_of("a"), "addressType": "FQDN"}, "documents[0].addressType"),
        ({**slice_of("a"), "metadata": {"name": "a"}}, "documents[0].metadata.labels"),
        ({**SERVICE, "spec": {**SERVICE["spec"], "publishNotReadyAddresses": "false"}},
         "documents[0].spec.publishNotReadyAddresses"),
        ({**SERVICE, "spec": {**SERVICE["spec"], "loadBalancerSourceRanges": "10.0.0.0/8"}},
         "documents[0].spec.loadBalancerSourceRanges"),
        ({**SERVICE, "spec": {**SERVICE["spec"], "ipFamilies": ["IPv5"]}}, "documents[0].spec.ipFamilies"),
        ({**SERVICE, "spec": {**SERVICE["spec"], "type": "Nodeport"}}, "documents[0].spec.type"),
        ({**SERVICE, "status": {"loadBalancer": {"ingress": "192.0.2.1"}}},
         "documents[0].status.loadBalancer.ingress"),
        (slice_of("a", endpoint("10.0.0.1", conditions={"ready": "false"})),
         "documents[0].endpoints[0].conditions.ready"),
        (slice_of("a", ports=[{"name": "http", "port": 1, "protocol": "tcp"}]), "documents[0].ports[0].protocol"),
        ({**slice_of("a"), "endpoints": [None]}, "documents[0].endpoints"),
        ({**slice_of("a"), "endpoints": {"addresses": []}}, "documents[0].endpoints"),
        ({"apiVersion": "v1", "kind": "Endpoints", "metadata": {"name": "a"}, "subsets": ["x"]}, "documents[0].subsets[0]"),
        ({"name": "a", "nonsense": 1}, "documents[0]"),
        ({**SERVICE, "Spec": {}}, "documents[0].Spec"),
        ({**SERVICE, "metadata": {"name": "a", "namspace": "b"}}, "documents[0].metadata.namspace"),
        ({**SERVICE, "metadata": {"name": "a", "annotations": {"service.kubernetes.io/topology-mode": "Auto"}}},
         "documents[0].metadata.annotations.service.kubernetes.io/topology-mode"),
        ({**SERVICE, "spec": {**SERVICE["spec"], "sessionAffinityConfig": {"clientIP": {"timeout": 5}}}},
         "documents[0].spec.sessionAffinityConfig.clientIP.timeout"),
        (slice_of("a", ports=[{"name": "http", "port": 1, "prot": "UDP"}]), "documents[0].ports[0].prot"),
        (slice_of("a", endpoint("10.0.0.1", conditions={"Ready": False})), "documents[0].endpoints[0].conditions.Ready"),
        ({"apiVersion": "v1", "kind": "Endpoints", "metadata": {"name": "a"}, "subsets": [{"address": []}]},
         "documents[0].subsets[0].address"),
        ({"apiVersion": "v1", "kind": "List", "items": [], "more": []}, "documents[0].more"),
        ([3], "documents[0][0]"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(doc: Any, field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        parsed(doc)
    assert refused.value.field == field


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]", "a: 2020-13-45", 'name: "\\ud83d"', "a: " + "[" * 5000, "a: " + "[" * 500_000, "name: " + "9" * 5000,
        "a: {", "kind: Service\nkind: Service", "a: {b: 1, c: 2, b: 3}", "a: &x 1\nb: *x", "? [a]\n: b", "a: !!bool maybe",
    ],
)
def test_what_is_no_document_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        kubernetes.parse(text)
    assert refused.value.field == "file"


def test_a_slice_needs_its_service() -> None:
    with pytest.raises(FailedPrecondition, match="shop/web"):
        kubernetes.merge(parsed(slice_of("a")), {})
    with pytest.raises(InvalidArgument):
        kubernetes.parse("a: [")
    with pytest.raises(InvalidArgument, match="twice"):
        parsed(SERVICE, SERVICE)
