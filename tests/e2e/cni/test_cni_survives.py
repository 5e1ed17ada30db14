"""Storms and violent deaths: whatever happens in the middle of ADD or DEL, nothing is left in the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from lab.cniruntime import CniRuntime, PluginError
from services.ipam.cni import spec
from tests.e2e.cni.netkit import UP, Fibril, echo, echo_server, netns_path

PODS, AT_ONCE = 200, 20


def every_address(result: dict[str, list[dict[str, str]]]) -> list[str]:
    return [entry["address"] for entry in result["ips"]]


def test_a_storm_leaves_nothing(fibril: Fibril) -> None:
    before = fibril.belongings()
    pods = [fibril.namespace() for _ in range(PODS)]
    with fibril.network() as network, ThreadPoolExecutor(AT_ONCE) as storm:
        results = list(storm.map(lambda pod: network.add(pod, netns_path(pod)), pods))
        given = [address for result in results for address in every_address(result)]
        assert len(given) == len(set(given)) == 2 * PODS
        # The whole way still works in the thick of it.
        address = given[-2].split("/")[0]
        with echo_server(pods[-1], address):
            echo(pods[0], address)
        list(storm.map(lambda pod: network.delete(pod, netns_path(pod)), pods))
    assert fibril.belongings() == before


def test_a_storm_of_adds_and_dels_at_once_leaves_nothing(fibril: Fibril) -> None:
    before = fibril.belongings()

    def life(_: int) -> None:
        pod = fibril.namespace()
        for _ in range(3):
            network.add(pod, netns_path(pod))
            network.delete(pod, netns_path(pod))
        network.add(pod, netns_path(pod))
        # The namespace goes first, as when a node's containers die all at once.
        fibril.drop(pod)
        network.delete(pod, netns_path(pod))

    with fibril.network() as network, ThreadPoolExecutor(AT_ONCE) as storm:
        list(storm.map(life, range(2 * AT_ONCE)))
    assert fibril.belongings() == before


def kill_during(fibril: Fibril, network: CniRuntime, pod: str, command: str, delay: float) -> None:
    """Begin a call, kill the service `delay` seconds into it, start it again, see the call through."""
    failure: list[PluginError] = []

    def call() -> None:
        try:
            if command == "ADD":
                network.add(pod, netns_path(pod))
            else:
                network.delete(pod, netns_path(pod))
        except PluginError as error:
            failure.append(error)

    victim = fibril.pid()
    # A supervisor would wait longer each time; without one nothing but `fibril up` starts the service again.
    os.kill(fibril.supervisor_pid(), signal.SIGKILL)
    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(delay)  # not a wait for something: the moment of death is what varies
    os.kill(victim, signal.SIGKILL)
    fibril.node.fibril(*UP)
    thread.join()
    assert not failure or failure[0].code == spec.TRY_AGAIN_LATER, failure


@pytest.mark.parametrize("command", ["ADD", "DEL"])
def test_a_service_killed_mid_call_leaves_a_whole_endpoint_or_none(fibril: Fibril, command: str) -> None:
    before = fibril.belongings()
    with fibril.network() as network:
        for delay in (0.008, 0.012, 0.016, 0.022, 0.03):
            pod, other = fibril.namespace(), fibril.namespace()
            network.add(other, netns_path(other))
            if command == "DEL":
                network.add(pod, netns_path(pod))
            kill_during(fibril, network, pod, command, delay)
            # What a runtime does next works: the same call again, then the pod works (or is gone).
            if command == "ADD":
                for address in every_address(network.add(pod, netns_path(pod))):
                    with echo_server(pod, address.split("/")[0]):
                        echo(other, address.split("/")[0])
            for name in (pod, other):
                network.delete(name, netns_path(name))
            assert fibril.belongings() == before


def test_a_plugin_killed_mid_call_leaves_a_whole_endpoint_or_none(fibril: Fibril) -> None:
    before = fibril.belongings()
    config = json.dumps({"cniVersion": "1.1.0", "name": "test", "type": fibril.plugin}).encode()
    with fibril.network() as network:
        for delay in (0.006, 0.009, 0.012, 0.015, 0.02):
            pod = fibril.namespace()
            variables = {"CNI_COMMAND": "ADD", "CNI_CONTAINERID": pod, "CNI_IFNAME": "eth0"}
            plugin = subprocess.Popen(
                [fibril.installed.plugin],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                env={**variables, "CNI_NETNS": str(netns_path(pod))},
            )
            assert plugin.stdin is not None
            plugin.stdin.write(config)
            plugin.stdin.close()
            time.sleep(delay)  # not a wait for something: the moment of death is what varies
            plugin.kill()
            plugin.wait()
            network.delete(pod, netns_path(pod))
            assert fibril.belongings() == before


def test_a_node_that_is_down_is_retryable_and_comes_back(fibril: Fibril) -> None:
    pods = [fibril.namespace(), fibril.namespace()]
    with fibril.network() as network:
        address = every_address(network.add(pods[0], netns_path(pods[0])))[0].split("/")[0]
        os.kill(fibril.supervisor_pid(), signal.SIGKILL)
        os.kill(fibril.pid(), signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(PluginError) as raised:
            network.add(pods[1], netns_path(pods[1]))
        assert raised.value.code == spec.TRY_AGAIN_LATER
        assert time.monotonic() - began < 30
        with pytest.raises(PluginError) as raised:
            network.status()
        assert raised.value.code == spec.NOT_AVAILABLE
        fibril.node.fibril(*UP)
        network.add(pods[1], netns_path(pods[1]))
        with echo_server(pods[0], address):
            echo(pods[1], address)
        for pod in pods:
            network.delete(pod, netns_path(pod))
