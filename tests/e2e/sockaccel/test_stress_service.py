"""Conversations between two pods, every byte checked, while their service is killed again and again, and policies come and go.

FIBRIL_SOAK_S: how long, seconds; by default a few.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import stressplay
from test_accel_service import AGENT, NODE, Agent, fibril, landscape, pairs, pods, running, wait_for

from services.sockaccel import abi
from services.sockaccel.tables import Tables
from tests.e2e.modes.modelab import ModeLab

__all__ = ["AGENT", "landscape", "pods"]  # fixtures
SECONDS = float(os.environ.get("FIBRIL_SOAK_S", "6"))
POLICY = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: let, namespace: default}
spec:
  endpointSelector: {matchLabels: {app: p2}}
  ingress: [{fromEndpoints: [{matchLabels: {app: p1}}]}, {fromEntities: [host]}]
"""


@pytest.fixture
def any_port(landscape: ModeLab) -> Iterator[ModeLab]:
    """With a class for all connections between pods."""
    fibril(landscape, "sockaccel", "class", "set", "all-pods", "--scope", "pods")
    try:
        yield landscape
    finally:
        fibril(landscape, "sockaccel", "class", "rm", "all-pods")


def test_every_byte_arrives_with_the_service_killed(
    any_port: ModeLab, pods: tuple[Agent, Agent], tmp_path: Path
) -> None:
    client, server = pods
    allow = tmp_path / "allow.yaml"
    allow.write_text(POLICY)
    seed = secrets.randbits(48)
    print(f"\nseed {seed}")
    for each in pods:
        each(f"exec(open({stressplay.__file__!r}).read(), globals())")
    hosts = [(2, server.ipv4), (10, server.ipv6)]
    places = [(family, host, server(f"listen({family}, {host!r})")) for family, host in hosts]
    instance = any_port.instance(NODE)
    with Tables(instance) as tables:
        counted = (abi.Stat.PAIRS, abi.Stat.SHORTENED, abi.Stat.SENDS, abi.Stat.TCP_SENDS)
        before = [tables.stat(which) for which in counted]
        client(f"begin({places!r}, 40, {seed})")
        began, kills = time.monotonic(), 0
        for number in itertools.count():
            if time.monotonic() - began > SECONDS and kills >= 2:
                break
            time.sleep(0.5)
            process = running(instance)
            if process is not None:
                process.signal(signal.SIGKILL)
                process.close()
                kills += 1
            # What concerns policy is not asked of the one that is dead.
            fibril(any_port, "policy", *(("rm", "-f", str(allow)) if number % 2 else ("apply", "-f", str(allow))))
            wait_for(lambda: fibril(any_port, "sockaccel", "usage", code=None).returncode == 0, "the service to be back", 60)
            with contextlib.suppress(AssertionError):
                fibril(any_port, "sockaccel", *(("off", "--all") if number % 2 else ("on", "--all")))
        fibril(any_port, "sockaccel", "on", "--all")
        fibril(any_port, "policy", "rm", "-f", str(allow), code=None)
        assert client("finish()") == 0
        tallies = [each("tally()") for each in pods]
        made, shortened, sends, tcp = (tables.stat(which) - was for which, was in zip(counted, before, strict=True))
    print({"kills": kills, "pairs": made, "shortened": shortened, "sends": sends, "tcp_sends": tcp}, tallies[0])
    assert [error for tally in tallies for error in tally["errors"]] == []
    assert tallies[0]["connections"] > 10 * SECONDS and made > 0.3 * tallies[0]["connections"]
    assert shortened > 0.3 * made
    wait_for(lambda: not pairs(any_port), "the end of all pairs")
