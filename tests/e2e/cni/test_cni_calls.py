"""The plugin on a real node, driven as a container runtime drives it."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lab.cniruntime import CniRuntime, PluginError
from services.ipam.cni import spec
from tests.e2e.cni.netkit import Fibril, echo, echo_server, ip, ip_json, netns_path

VERSIONS = spec.VERSIONS


def addresses(result: dict[str, Any]) -> list[str]:
    """IPv4 and IPv6 address of a result of any version."""
    if "ips" in result:
        return [entry["address"].split("/")[0] for entry in result["ips"]]
    return [result[key]["ip"].split("/")[0] for key in ("ip4", "ip6")]


def in_pod(netns: str) -> set[str]:
    """Global addresses of eth0 in a pod."""
    link = ip_json("-n", netns, "addr", "show", "eth0")[0]
    return {
        f"{entry['local']}/{entry['prefixlen']}" for entry in link["addr_info"] if entry["scope"] == "global"
    }


def refused(code: int, runtime: CniRuntime, netns: str, **options: Any) -> PluginError:
    """ADD must end with this code."""
    with pytest.raises(PluginError) as raised:
        runtime.add(netns, netns_path(netns), **options)
    assert raised.value.code == code, raised.value
    return raised.value


@pytest.mark.parametrize("version", VERSIONS)
def test_a_pods_life_in_every_version(fibril: Fibril, version: str) -> None:
    before = fibril.belongings()
    pods = [fibril.namespace(), fibril.namespace()]
    with fibril.network(version=version) as network:
        results = [network.add(pod, netns_path(pod)) for pod in pods]
        for pod, result in zip(pods, results, strict=True):
            assert result["cniVersion"] == version
            assert in_pod(pod) == {f"{addresses(result)[0]}/32", f"{addresses(result)[1]}/128"}
        for address in addresses(results[1]):
            with echo_server(pods[1], address):
                echo(pods[0], address)
        if spec.parse_version(version) >= (0, 4, 0):
            network.check(pods[0], netns_path(pods[0]))
        for pod in pods:
            network.delete(pod, netns_path(pod))
            network.delete(pod, netns_path(pod))
        assert all("eth0" not in [link["ifname"] for link in ip_json("-n", pod, "link")] for pod in pods)
    assert fibril.belongings() == before


@pytest.mark.parametrize("version", VERSIONS)
def test_del_of_something_never_added_succeeds(fibril: Fibril, version: str) -> None:
    with fibril.network(version=version) as network:
        network.delete("never-added")
        network.delete("never-added", "/run/netns/no-such-namespace")


def test_del_after_the_namespace_is_gone(fibril: Fibril) -> None:
    before = fibril.belongings()
    pod = fibril.namespace()
    with fibril.network() as network:
        network.add(pod, netns_path(pod))
        fibril.drop(pod)
        network.delete(pod, netns_path(pod))
    assert fibril.belongings() == before


def test_the_same_container_gets_the_same_interface(fibril: Fibril) -> None:
    pod = fibril.namespace()
    with fibril.network() as network:
        first = network.add(pod, netns_path(pod))
        assert network.add(pod, netns_path(pod)) == first
        network.delete(pod)


def test_two_adds_for_one_container_at_once(fibril: Fibril) -> None:
    before = fibril.belongings()
    pod = fibril.namespace()
    with fibril.network() as network, ThreadPoolExecutor(2) as both:
        results = list(both.map(lambda _: network.add(pod, netns_path(pod)), range(2)))
        assert results[0] == results[1]
        network.delete(pod)
    assert fibril.belongings() == before


def test_two_interfaces_of_one_container(fibril: Fibril) -> None:
    pod = fibril.namespace()
    with fibril.network() as network:
        network.add(pod, netns_path(pod), "eth0")
        network.add(pod, netns_path(pod), "net1")
        network.delete(pod, ifname="eth0")
        assert [entry.ifname for entry in fibril.endpoints() if entry.container_id == pod] == ["net1"]
        network.delete(pod, ifname="net1")


def test_what_the_runtime_says_of_a_pod_is_recorded(fibril: Fibril) -> None:
    pod = fibril.namespace()
    labels = {"cni": {"labels": [{"key": "app", "value": "web"}]}}
    with fibril.network(args=labels, mtu=1400) as network:
        network.add(pod, netns_path(pod), args="K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0;IgnoreUnknown=1")
        recorded = next(entry for entry in fibril.endpoints() if entry.container_id == pod)
        assert (recorded.pod, recorded.labels["app"], recorded.mtu) == ("shop/cart-0", "web", 1400)
        assert ip_json("-n", pod, "link", "show", "eth0")[0]["mtu"] == 1400
        network.delete(pod)


def test_addresses_can_be_asked_for(fibril: Fibril) -> None:
    pod = fibril.namespace()
    with fibril.network() as network:
        given = addresses(network.add(pod, netns_path(pod)))
        network.delete(pod)
        wanted = {"ips": [f"{address}/24" if "." in address else address for address in given]}
        assert addresses(network.add(pod, netns_path(pod), runtime_config=wanted)) == given
        network.delete(pod, runtime_config=wanted)


def test_check_finds_what_somebody_changed(fibril: Fibril) -> None:
    pod = fibril.namespace()
    with fibril.network() as network:
        address = addresses(network.add(pod, netns_path(pod)))[0]
        ip("-n", pod, "addr", "del", f"{address}/32", "dev", "eth0")
        with pytest.raises(PluginError, match=re.escape(address)):
            network.check(pod, netns_path(pod))
        network.delete(pod)
        with pytest.raises(PluginError) as raised:
            network.check(pod, netns_path(pod))
        assert raised.value.code == spec.UNKNOWN_CONTAINER


def test_gc_removes_what_the_runtime_has_forgotten(fibril: Fibril) -> None:
    kept, lost = fibril.namespace(), fibril.namespace()
    with fibril.network() as network:
        for pod in (kept, lost):
            network.add(pod, netns_path(pod))
        network.gc([(kept, "eth0")])
        assert {entry.container_id for entry in fibril.endpoints()} & {kept, lost} == {kept}
        network.delete(kept)


def test_status_of_a_healthy_node(fibril: Fibril) -> None:
    with fibril.network() as network:
        network.status()


def test_what_is_wrong_is_named_and_leaves_nothing(fibril: Fibril) -> None:
    before = fibril.belongings()
    pod = fibril.namespace()
    with fibril.network(pool="no-such-pool") as network:
        assert "no-such-pool" in str(refused(spec.INVALID_CONFIG, network, pod))
    with fibril.network() as network:
        outside = {"ips": ["203.0.113.9"]}
        assert "203.0.113.9" in str(refused(spec.INVALID_CONFIG, network, pod, runtime_config=outside))
        with pytest.raises(PluginError, match="no-such-namespace"):
            network.add("x", "/run/netns/no-such-namespace")
        refused(spec.INVALID_ENVIRONMENT, network, pod, ifname="sixteen-letters-")
        ip("-n", pod, "link", "add", "eth0", "type", "veth", "peer", "name", "other")
        with pytest.raises(PluginError, match="eth0"):
            network.add(pod, netns_path(pod))
    with fibril.network(version="1.2.0") as network:
        refused(spec.INCOMPATIBLE_VERSION, network, pod)
    with fibril.network(bridge="cni0") as network:
        refused(spec.UNSUPPORTED_FIELD, network, pod)
    assert fibril.belongings() == before


def test_malformed_input_of_the_real_plugin(fibril: Fibril) -> None:
    with fibril.network() as network:
        for config in (b"", b"{", b"[]", b'"x"', b"\xff\xfe", b"[" * 100_000):
            with pytest.raises(PluginError) as raised:
                network.run("ADD", fibril.plugin, config, "c", "/run/netns/x", "eth0")
            assert raised.value.code == spec.DECODING_FAILURE


def test_a_service_that_hangs_is_retryable_within_bounds(fibril: Fibril) -> None:
    pod = fibril.namespace()
    plugin = fibril.installed.plugin
    impatient = plugin.with_name(f"{plugin.name}-{secrets.token_hex(2)}")
    impatient.write_text(
        re.sub(r"^ANSWER_SECONDS = .*$", "ANSWER_SECONDS = 1", plugin.read_text(), flags=re.MULTILINE)
    )
    impatient.chmod(0o755)
    config = json.dumps({"cniVersion": "1.1.0", "name": "test", "type": impatient.name}).encode()
    with fibril.network() as network:
        os.kill(fibril.pid(), signal.SIGSTOP)
        try:
            with pytest.raises(PluginError) as raised:
                network.run("ADD", impatient.name, config, pod, str(netns_path(pod)), "eth0")
            assert raised.value.code == spec.TRY_AGAIN_LATER
        finally:
            os.kill(fibril.pid(), signal.SIGCONT)
        # The call that was given up is carried out: DEL takes it away, whichever comes first.
        network.delete(pod)
        assert pod not in {entry.container_id for entry in fibril.endpoints()}
