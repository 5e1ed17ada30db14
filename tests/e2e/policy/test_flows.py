"""Flows of real pods: what is allowed, closed and refused, as `fibril flow` shows it while it happens and afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.modes.modelab import FIBRIL, ROOT, ModeLab, lab, wait_for

NODE = "c1n1"
POLICY = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web}
spec:
  podSelector: {matchLabels: {app: back}}
  ingress: [{from: [{podSelector: {matchLabels: {app: front}}}], ports: [{port: 8080}]}]
"""
_SERVE = """
import socket
with socket.create_server(("", 8080)) as listener:
    print("ready", flush=True)
    while True:
        listener.accept()[0].close()
"""
_REACH = """
import socket, sys
try:
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), 0.5) as conn:
        conn.recv(1)
except OSError as error:
    print(type(error).__name__)
"""


@pytest.fixture(scope="module")
def landscape() -> Iterator[ModeLab]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with lab("--nodes", "1", "--pods", "2", "--mode", "overlay") as made:
        for pod, app in (("p1", "front"), ("p2", "back")):
            made.command("-i", made.instance(NODE).name, "endpoint", "label", pod, f"app={app}")
        yield made


def reach(landscape: ModeLab, address: str, port: int) -> str:
    return landscape.pod_exec(NODE, "p1", sys.executable, "-c", _REACH, address, str(port)).strip()


def flows(landscape: ModeLab, *words: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = landscape.json(NODE, "flow", "ls", *words)
    return found


def test_what_pods_do_is_shown_with_names(landscape: ModeLab, tmp_path: Path) -> None:
    name, target = landscape.instance(NODE).name, landscape.pod(NODE, "p2")
    (tmp_path / "policy.yaml").write_text(POLICY)
    landscape.command("-i", name, "policy", "apply", "-f", str(tmp_path / "policy.yaml"), "--wait")
    words = [
        *FIBRIL,
        "-i",
        name,
        "-o",
        "json",
        "flow",
        "follow",
        "--to-pod",
        target["pod"],
        "--verdict",
        "dropped",
        "--last",
        "1",
    ]
    serving = landscape.started(
        NODE, "fibril", "pod", "exec", "p2", "--", sys.executable, "-c", _SERVE, stdout=subprocess.PIPE
    )
    with serving as server:
        assert server.stdout is not None and server.stdout.readline() == "ready\n"
        wait_for(lambda: reach(landscape, target["ipv4"], 8080) == "", "the policy to know the labels")
        assert reach(landscape, target["ipv4"], 8081) == "TimeoutError"
        # What follows begins with the last that is known.
        wait_for(lambda: flows(landscape, "--port", "8081", "--verdict", "dropped"), "the drop")
    with subprocess.Popen(words, env=landscape.env, text=True, cwd=ROOT, stdout=subprocess.PIPE) as following:
        assert following.stdout is not None
        live = json.loads(following.stdout.readline())
        assert reach(landscape, target["ipv4"], 8082) == "TimeoutError"
        later = json.loads(following.stdout.readline())
        following.terminate()
    assert later["sequence"] > live["sequence"] and later["destination"]["port"] == 8082
    refused = flows(landscape, "--to-pod", target["pod"], "--port", "8081", "--verdict", "dropped")
    assert refused
    for flow in refused:
        assert (flow["type"], flow["direction"]) == ("FLOW_TYPE_DROP", "FLOW_DIRECTION_INGRESS")
        assert flow["drop_reason"].startswith("DROP_REASON_POLICY")
        assert flow["source"]["labels"]["app"] == "front" and flow["destination"]["labels"]["app"] == "back"
        assert flow["destination"]["address"] == target["ipv4"] and flow["node"]
    allowed = flows(
        landscape, "--label", "app=back", "--port", "8080", "--verdict", "forwarded", "--type", "new"
    )
    assert allowed[-1]["policy"].endswith("web") and allowed[-1]["rule"]
    assert wait_for(
        lambda: flows(landscape, "--port", "8080", "--type", "closed"), "the end of the connection"
    )
    # The client's own policy lets it go; the server's is the one that refuses.
    forwarded = flows(landscape, "--port", "8081", "--verdict", "forwarded")
    assert {flow["direction"] for flow in forwarded} <= {"FLOW_DIRECTION_EGRESS"}
    status = landscape.json(NODE, "flow", "status")
    assert status["seen"] >= status["remembered"] > 0 and status["lost"] == 0
